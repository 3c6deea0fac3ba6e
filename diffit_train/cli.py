"""The command `diffit`. Each command's help shows an example; errors say what to do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import diffit_train
from diffit_train import command, storage
from diffit_train.config import Recipe, load_recipe, packaged_recipes
from diffit_train.errors import UserError


class WorkOrder(TyperGroup):
    """Lists the commands in the order in which they are used."""

    order = (
        *("data", "autoencoder", "features", "plan", "encode", "verify", "train", "references"),
        *("evaluate", "sweep", "sample", "compare", "ema", "import", "export", "submit"),
    )

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the commands."""
        return sorted(super().list_commands(ctx), key=self.order.index)


app = typer.Typer(
    name="diffit",
    cls=WorkOrder,
    help="Train diffusion vision transformers (DiffiT): encode pictures to latents, train, "
    "evaluate and compare, on this machine or on a Ray cluster.\n\n"
    "Every command takes a RECIPE: a packaged name, or the path or URL of a YAML file. Rerunning "
    "a command continues it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
autoencoder_app = typer.Typer(help="An autoencoder of your own.", no_args_is_help=True)
features_app = typer.Typer(help="A feature network of your own.", no_args_is_help=True)
data_app = typer.Typer(help="Data sets that need no download.", no_args_is_help=True)
verify_app = typer.Typer(help="Check what was written.", no_args_is_help=True)
sweep_app = typer.Typer(help="Sweeps begun by `diffit evaluate --sweep`.", no_args_is_help=True)
ema_app = typer.Typer(help="Averages of the weights.", no_args_is_help=True)
app.add_typer(ema_app, name="ema")
app.add_typer(sweep_app, name="sweep")
app.add_typer(data_app, name="data")
app.add_typer(verify_app, name="verify")
app.add_typer(autoencoder_app, name="autoencoder")
app.add_typer(features_app, name="features")

RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help=f"Packaged recipe ({', '.join(packaged_recipes())}), or path or URL of a YAML file.",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Keys of the recipe to change, as train.lr=1e-4.",
        show_default=False,
    ),
]
Root = Annotated[
    str | None,
    typer.Option(help="Folder or s3://bucket/prefix that holds the project (storage.root)."),
]
ProjectRoot = Annotated[str, typer.Option("--root", help="Folder of the project.")]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster, as 10.0.0.1:6379 or auto. Default: this machine."),
]
RunName = Annotated[
    str | None, typer.Option("--run", help="Name of the run. Default: the recipe's name.")
]
Steps = Annotated[
    list[str] | None,
    typer.Option("--step", help="Checkpoint by its step, or `newest`; may be repeated."),
]
Source = Annotated[
    str | None,
    typer.Option("--from", help="RUN or RUN@STEP whose weights a new run starts from."),
]
SourceWeights = Annotated[
    str, typer.Option("--from-weights", help="Which of them: raw, or the name of an average.")
]
# A flag takes no value, so help shows none.
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", metavar="", help="Read a weight file that is a pickle.")
]
Json = Annotated[
    bool, typer.Option("--json", metavar="", help="Print the result as JSON on standard output.")
]


def _print(value: Any, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(value, indent=2) + "\n")


def _recipe(name: str, overrides: list[str] | None, root: str | None) -> Recipe:
    return load_recipe(name, overrides or (), root)


@data_app.command("digits")
def data_digits(
    folder: Annotated[str, typer.Argument(help="Where the pictures go.", show_default=False)],
    size: Annotated[int, typer.Option(help="Side of the pictures in pixels, 16 or 32.")] = 16,
) -> None:
    """Write scikit-learn's 1,797 handwritten digits as pictures, a folder for each class.

    Example: `diffit data digits my-project/pictures/digits`
    """
    from diffit_train.data.digits import write_digits

    write_digits(folder, size)


@autoencoder_app.command("fit")
def autoencoder_fit(name: RecipeName, overrides: Overrides = None, root: Root = None) -> None:
    """Train a small AutoencoderKL on the recipe's pictures, for domains no published VAE fits.

    It is saved in diffusers' format at `autoencoder.source`, with a picture of reconstructions.

    Example: `diffit autoencoder fit demo --root my-project`
    """
    from diffit_train.data.autoencoder_fit import fit_autoencoder

    fit_autoencoder(_recipe(name, overrides, root))


@features_app.command("fit")
def features_fit(name: RecipeName, overrides: Overrides = None, root: Root = None) -> None:
    """Train a small classifier on the recipe's pictures, whose features measure quality.

    The Frechet distance on them is called `fd_NAME`; only Inception's is a FID.

    Example: `diffit features fit demo --root my-project`
    """
    from diffit_train.evaluation.features_fit import fit_features

    fit_features(_recipe(name, overrides, root))


@app.command()
def encode(
    name: RecipeName,
    overrides: Overrides = None,
    root: Root = None,
    address: Address = None,
    append: Annotated[
        bool,
        typer.Option(
            "--append", metavar="", help="Add pictures that have come since, as new shards."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Encode pictures (a folder, tars or parquet files) into shards of VAE latents.

    Example: `diffit encode imagenet256 --root s3://bucket/project data.source=s3://bucket/train`
    """
    _print(command.encode(_recipe(name, overrides, root), address, append), as_json)


@verify_app.command("latents")
def verify_latents(
    url: Annotated[str, typer.Argument(help="Folder of the latents.", show_default=False)],
    picture: Annotated[
        str | None,
        typer.Option(help="PNG of originals beside reconstructions. Default: URL/verify.png."),
    ] = None,
    no_picture: Annotated[
        bool,
        typer.Option(
            "--no-picture", metavar="", help="Leave out the picture, which needs the source."
        ),
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", metavar="", help="Encode the bad shards again.")
    ] = False,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Recompute hashes and counts of latent shards, and test every member.

    Exit status 1 where something is bad and not repaired.

    Example: `diffit verify latents my-project/latents/digits --repair`
    """
    url = storage.absolute(url)
    target = storage.absolute(picture) if picture else storage.join(url, "verify.png")
    result = command.verify_latents(url, None if no_picture else target, repair, address)
    _print(result, as_json)


@app.command()
def train(
    name: RecipeName,
    overrides: Overrides = None,
    root: Root = None,
    run: RunName = None,
    source: Source = None,
    source_weights: SourceWeights = "ema",
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Train on the latents, from the newest checkpoint if there is one.

    The same command starts a run, continues it after any end, and with a larger train.steps trains
    it on. SIGTERM makes it save and leave.

    Example: `diffit train demo --root my-project --run first train.lr=1e-3`

    Example: `diffit train imagenet512 --root s3://bucket/project --from imagenet256@400000`
    """
    recipe = _recipe(name, overrides, root)
    result = command.train(recipe, run or recipe.name, address, source, source_weights)
    _print(result, as_json)


@app.command()
def evaluate(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help=f"Packaged recipe ({', '.join(packaged_recipes())}), or path or URL of a YAML "
            "file.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    root: Root = None,
    run: RunName = None,
    step: Steps = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster, as 10.0.0.1:6379 or auto; with --fleet its job server, as "
            "http://head:8265. Default: this machine."
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep",
            help="KEY=VALUES, as guidance.scale=1.0:5.0:0.4 or sampler.steps=50,250; repeated, "
            "all combinations.",
        ),
    ] = None,
    sweep_name: Annotated[
        str | None,
        typer.Option("--name", help="Name of the sweep. Default: made of its keys."),
    ] = None,
    fleet: Annotated[
        bool,
        typer.Option("--fleet", metavar="", help="Send each evaluation as a Ray job of its own."),
    ] = False,
    at_most: Annotated[int, typer.Option(min=1, help="Jobs of the fleet that run at once.")] = 4,
    retries: Annotated[
        int, typer.Option(min=0, help="Times that a failed job of the fleet is sent again.")
    ] = 2,
    python: Annotated[
        str | None, typer.Option(help="Python of the cluster. Default: `python` there.")
    ] = None,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", metavar="", help="Evaluate each new checkpoint while training goes on."
        ),
    ] = False,
    npz: Annotated[
        bool, typer.Option("--npz", metavar="", help="Write samples.npz as ADM's evaluator reads.")
    ] = False,
    conformance: Annotated[
        str | None,
        typer.Option(
            help="Folder with the published self-check (weights, reference and sample batch); its "
            "figures beside the expected ones. Precision and recall are rounded as by ADM's "
            "evaluator (float16 distances) here, and exact in every other evaluation."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Generate pictures from checkpoints of a run and measure them.

    With --sweep: every combination of some keys' values, with a table and a picture. The same
    command goes on with what is missing.

    Example: `diffit evaluate demo --root my-project --step 0 --step newest`

    Example: `diffit evaluate imagenet256 --root s3://bucket/project --step newest
    --sweep guidance.scale=1.0:5.0:0.4 --fleet --address http://head:8265`
    """
    if conformance is not None:
        from diffit_train.evaluation.conformance import conform

        _print(conform(storage.absolute(conformance)), as_json)
        return
    if name is None:
        raise UserError("evaluate needs a RECIPE, as `diffit evaluate demo`")
    if watch and (sweep or step or fleet):
        raise UserError("--watch evaluates every checkpoint; leave out --step, --sweep and --fleet")
    if fleet and (not sweep or address is None):
        raise UserError("--fleet needs --sweep, and the job server's --address http://head:8265")
    if sweep and npz:
        raise UserError("--npz is for single evaluations; leave out --sweep")
    recipe = _recipe(name, overrides, root)
    run = run or recipe.name
    if watch:
        _print(command.watch(recipe, run, address), as_json)
    elif sweep:
        jobs = command.Fleet(address, at_most, retries, python) if fleet and address else None
        cluster = None if fleet else address
        found = command.sweep(recipe, run, step or [], sweep, sweep_name, cluster, jobs)
        _print(found, as_json)
    else:
        _print(command.evaluate(recipe, run, step or [], address, npz=npz), as_json)


@sweep_app.command("show")
def sweep_show(
    sweep: Annotated[str, typer.Argument(metavar="NAME", help="Of the sweep.")],
    run: Annotated[str, typer.Option("--run", help="Name of the run.")],
    root: ProjectRoot = ".",
    as_json: Json = False,
) -> None:
    """Print the table of a sweep as far as it has got.

    Example: `diffit sweep show guidance.scale --root my-project --run demo`
    """
    _print(command.show_sweep(root, run, sweep), as_json)


@sweep_app.command("cancel")
def sweep_cancel(
    sweep: Annotated[str, typer.Argument(metavar="NAME", help="Of the sweep.")],
    run: Annotated[str, typer.Option("--run", help="Name of the run.")],
    address: Annotated[str, typer.Option(help="Ray's job server, as http://head:8265.")],
    root: ProjectRoot = ".",
    as_json: Json = False,
) -> None:
    """Stop the jobs of a sweep; the same `diffit evaluate` goes on with it.

    Example: `diffit sweep cancel guidance.scale --root my-project --run demo
    --address http://head:8265`
    """
    _print(command.cancel_sweep(root, run, sweep, address), as_json)


@app.command()
def references(
    name: RecipeName,
    overrides: Overrides = None,
    root: Root = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Compute the statistics of the real pictures that evaluations compare with.

    `diffit evaluate` does so itself where they are missing.

    Example: `diffit references imagenet256 --root s3://bucket/project data.source=s3://bucket/train`
    """
    _print(command.references(_recipe(name, overrides, root), address), as_json)


@app.command()
def plan(
    name: RecipeName,
    overrides: Overrides = None,
    root: Root = None,
    gpu: Annotated[str, typer.Option(help="GPU that is reckoned with.")] = "H100",
    mfu: Annotated[
        float, typer.Option(help="Share of its bf16 matrix rate that training reaches.")
    ] = 0.4,
    price: Annotated[float | None, typer.Option(help="Price of a GPU-hour.")] = None,
    emas: Annotated[
        int | None,
        typer.Option(min=0, help="Averages of the weights that are kept. Default: the recipe's."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a run needs: parameters, work, memory per GPU, storage, hours and cost.

    Example: `diffit plan imagenet256 --gpu H100 --mfu 0.4 --price 2.5 scaling.workers=16`
    """
    from diffit_train import plan as planning

    recipe = _recipe(name, overrides, root)
    result = planning.plan(recipe, planning.Machine(gpu, mfu, price), emas)
    if as_json:
        _print(result, as_json)
    else:
        planning.print_plan(result)


@app.command()
def sample(
    name: RecipeName,
    overrides: Overrides = None,
    root: Root = None,
    run: RunName = None,
    step: Annotated[
        str, typer.Option("--step", help="Checkpoint by its step, or `newest`.")
    ] = command.NEWEST,
    weights: Annotated[
        str | None,
        typer.Option(help="Weights from a file (an export, or published) instead of a run."),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", help="Class by name or number; may be repeated."),
    ] = None,
    seeds: Annotated[
        str, typer.Option(help="Seeds, as 0-3,8: a picture of each class for each.")
    ] = "0-3",
    out: Annotated[str, typer.Option(help="Folder for grid.png and single pictures.")] = "samples",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures made at once.")] = 16,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
) -> None:
    """Make pictures of chosen classes and seeds; sampler and guidance are those of the recipe.

    Example: `diffit sample demo --root my-project --class 3 --class 7 --seeds 0-9 --out threes`
    """
    recipe = _recipe(name, overrides, root)
    source = command.WeightSource(run or recipe.name, step, weights, allow_pickle)
    _print(command.sample(recipe, source, classes or [], seeds, out, batch_size), as_json)


@app.command("import")
def import_(
    file: Annotated[str, typer.Argument(help="Weight file.", show_default=False)],
    overrides: Overrides = None,
    name: Annotated[
        str | None,
        typer.Option("--recipe", help="Recipe of the weights. Default: what the file itself says."),
    ] = None,
    root: Root = None,
    run: RunName = None,
    step: Annotated[
        int | None,
        typer.Option(
            min=0, help="Step under which the weights are kept. Default: the file's own, or 0."
        ),
    ] = None,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
) -> None:
    """Read a weight file under the published names into a run, ready to sample and evaluate.

    A folder of DeepSpeed's `save_checkpoint` becomes a run that can be trained on.

    Example: `diffit import diffit_256.safetensors --root my-project --run nvidia`
    """
    recipe = command.recipe_of_weights(file, name, overrides or (), root, allow_pickle)
    result = command.import_weights(recipe, run or recipe.name, file, step, allow_pickle)
    _print(result, as_json)


@app.command()
def export(
    name: RecipeName,
    overrides: Overrides = None,
    root: Root = None,
    run: RunName = None,
    step: Annotated[
        str, typer.Option("--step", help="Checkpoint by its step, or `newest`.")
    ] = command.NEWEST,
    weights: Annotated[
        str, typer.Option(help="Which weights: raw, or the name of an average.")
    ] = "ema",
    out: Annotated[
        str | None, typer.Option(help="File. Default: RUN/export/ema-STEP.safetensors.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint's weights to one safetensors file under the published names.

    Example: `diffit export demo --root my-project --step newest`
    """
    recipe = _recipe(name, overrides, root)
    result = command.export_weights(recipe, run or recipe.name, step, weights, out)
    _print(result, as_json)


@ema_app.command("reconstruct")
def ema_reconstruct(
    name: RecipeName,
    sigma_rel: Annotated[
        float, typer.Option(help="Width of the profile, relative to the training up to the step.")
    ],
    overrides: Overrides = None,
    root: Root = None,
    run: RunName = None,
    step: Annotated[
        str, typer.Option("--step", help="Step of the average, or `newest`: the last snapshot's.")
    ] = command.NEWEST,
    out: Annotated[
        str | None, typer.Option(help="File. Default: RUN/export/ema-SIGMA-STEP.safetensors.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make an average with another profile than those trained with, from a run's snapshots.

    The run needs averages with a sigma_rel in train.ema, and train.ema_snapshot_every (EDM2).

    Example: `diffit ema reconstruct demo --root my-project --run first --sigma-rel 0.07`
    """
    recipe = _recipe(name, overrides, root)
    result = command.reconstruct_ema(recipe, run or recipe.name, sigma_rel, step, out)
    _print(result, as_json)


@app.command()
def compare(
    selection: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN|RUN@STEP|RUN/SWEEP]...",
            help="Runs by name; with @STEP (or @newest) or /SWEEP only those of their evaluations. "
            "Default: every run.",
            show_default=False,
        ),
    ] = None,
    root: Annotated[
        str, typer.Option(help="Folder of the project, whose MLflow store is read.")
    ] = ".",
    uri: Annotated[
        str | None, typer.Option("--tracking-uri", help="MLflow, where it is not under the root.")
    ] = None,
    experiment: Annotated[
        str | None, typer.Option(help="Experiment to compare. Default: every one in the store.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Where the curves go. Default: ROOT/compare.png.")
    ] = None,
    html: Annotated[
        str | None,
        typer.Option(help="File for a report with curves and sample grids that opens anywhere."),
    ] = None,
    csv: Annotated[
        str | None, typer.Option(help="File for a table with a row for each evaluation.")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="Metric to rank by. Default: fid, else another distance."),
    ] = None,
    markdown: Annotated[
        bool,
        typer.Option("--markdown", metavar="", help="Print the tables as GitHub's Markdown."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Print runs, checkpoints or sweeps side by side, and draw their curves.

    Evaluations that differ in seeds only are shown as mean and standard deviation, too. Those with
    other numbers of samples, features or references are never ranked together.

    Example: `diffit compare --root my-project`

    Example: `diffit compare first@400000 second@400000 --root my-project --html report.html`
    """
    from diffit_train.evaluation import report

    if markdown and as_json:
        raise UserError("--markdown and --json both print; choose one of them")
    comparison = report.compare_store(
        root,
        uri,
        experiment,
        picture,
        selection=selection or (),
        metric=metric,
        html=html and storage.absolute(html),
        csv=csv and storage.absolute(csv),
    )
    if as_json:
        _print(comparison.as_json(), as_json)
    elif markdown:
        sys.stdout.write(comparison.markdown())
    else:
        comparison.print_table()


@app.command()
def submit(
    stage: Annotated[str, typer.Argument(help="encode, train or evaluate.", show_default=False)],
    name: RecipeName,
    address: Annotated[
        str, typer.Option(help="Ray's job server, as http://head:8265.", show_default=False)
    ],
    overrides: Overrides = None,
    root: Root = None,
    run: RunName = None,
    step: Steps = None,
    source: Source = None,
    source_weights: SourceWeights = "ema",
    follow: Annotated[
        bool, typer.Option(metavar="", help="Follow the job's log until it ends.")
    ] = True,
    python: Annotated[
        str | None, typer.Option(help="Python of the cluster. Default: `python` there.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Send encode, train or evaluate to a cluster as a Ray job, and follow its log.

    Submitted again under the same name, a running job is followed and an ended one continued.

    Example: `diffit submit train imagenet256 --address http://head:8265 --root s3://bucket/project`
    """
    from diffit_train import submit as jobs

    recipe = _recipe(name, overrides, root)
    recipe = command.starting_from(recipe, run or recipe.name, source, source_weights)
    job = jobs.job(stage, recipe, run, step or [])
    submission_id = jobs.submit(job, address, follow=follow, python=python)
    _print({"submission_id": submission_id, "name": job.name}, as_json)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(diffit_train.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Hold the options of `diffit` itself."""


def main() -> None:
    """Entry point of the command `diffit`."""
    sys.exit(command.guarded(app))
