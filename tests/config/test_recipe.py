"""The recipe: what is accepted, what is rejected, and the error messages."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from diffit_train import storage
from diffit_train.config import dump_recipe, load_recipe, packaged_recipes, validate, with_overrides
from diffit_train.errors import UserError


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipes_survive_a_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    assert validate(yaml.safe_load(dump_recipe(recipe)), name) == recipe
    assert recipe.storage.root.startswith("/")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "imagenet256",
            {
                "data.resolution": 256,
                "data.num_classes": 1000,
                "autoencoder.source": "stabilityai/sd-vae-ft-ema",
                "autoencoder.scale": 0.18215,
                "model.hidden_size": 1152,
                "model.num_heads": 16,
                "model.depth": 28,
                "model.patch_size": 2,
                "model.mlp_ratio": 4.0,
                "model.label_init_std": 0.02,
                "diffusion.timesteps": 1000,
                "diffusion.beta_start": 1e-4,
                "diffusion.beta_end": 0.02,
                "train.lr": 3e-4,
                "train.betas": [0.9, 0.999],
                "train.weight_decay": 0.0,
                "train.batch_size": 256,
                "train.ema.ema.decay": 0.9999,
                "train.label_dropout": 0.1,
                "evaluate.samples": 50_000,
                "evaluate.sampler.name": "ddpm",
                "evaluate.sampler.steps": 250,
                "evaluate.guidance.kind": "power_cosine",
                "evaluate.guidance.scale": 4.4,
                "evaluate.guidance.power": 4.0,
                "evaluate.guidance.channels": 3,
                "evaluate.reference_images": 10_000,
            },
        ),
        (
            "imagenet512",
            {
                "data.resolution": 512,
                "model.depth": 28,
                "train.lr": 1e-4,
                "train.batch_size": 512,
                "evaluate.sampler.steps": 250,
                "evaluate.guidance.kind": "constant",
                "evaluate.guidance.scale": 1.49,
            },
        ),
    ],
)
def test_imagenet_recipes_hold_the_published_numbers(name: str, expected: dict) -> None:
    flat = load_recipe(name).flat()
    assert {key: flat[key] for key in expected} == expected


def test_later_overrides_win_and_root_wins_over_all() -> None:
    recipe = load_recipe("demo", ["train.lr=1", "train.lr=2e-3", "storage.root=a"], root="b c")
    assert recipe.train.lr == 2e-3
    assert recipe.storage.root == str(Path.cwd() / "b c")


def test_only_local_paths_are_made_absolute() -> None:
    recipe = load_recipe("demo", ["data.source=images", "autoencoder.source=./vae"], root="r")
    assert recipe.data.source == str(Path.cwd() / "images")
    assert recipe.autoencoder.source == str(Path.cwd() / "vae")
    recipe = load_recipe("imagenet256", ["data.source=s3://b/train"], root="s3://bucket/p")
    assert recipe.storage.root == "s3://bucket/p"
    assert recipe.data.source == "s3://b/train"
    assert recipe.autoencoder.source == "stabilityai/sd-vae-ft-ema"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lrr=1", ["'train.lrr'", "did you mean 'lr'"]),
        ("lr=1", ["'lr'", "did you mean 'train.lr'"]),
        ("seed=1", ["'seed'", "did you mean 'train.seed' or 'evaluate.seed'"]),
        ("trian.lr=1", ["'trian'", "did you mean 'train'"]),
        ("tra-in.lr=1", ["'tra-in'", "did you mean 'train'"]),
        ("train.zzz=1", ["'train.zzz'", "allowed here", "batch_size"]),
        ("train.lr=fast", ["train.lr", "'fast'", "number"]),
        ("train.lr=.nan", ["train.lr", "nan"]),
        ("train.lr=-1", ["train.lr", "-1", "greater than 0"]),
        ("train.steps=0", ["train.steps", "0", "greater than 0"]),
        ("train.batch_size=60", ["data.shuffle_streams is 8", "train.batch_size (60)"]),
        ("scaling.workers=9", ["scaling.workers is 9", "at most data.shuffle_streams (8)"]),
        ("scaling.workers=4..2", ["scaling.workers", "'4..2'", "first number"]),
        ("scaling.workers=few", ["scaling.workers", "'few'"]),
        ("train.ema.ema.sigma_rel=0.1", ["exactly one of", "decay, sigma_rel"]),
        ("train.ema.b.ramp_ratio=0.1", ["exactly one of", "none"]),
        ("train.ema.raw.decay=0.9", ["'raw'", "names are reserved"]),
        ("train.ema.b.sigma_rel=0.3", ["sigma_rel", "0.3", "0.28"]),
        ("evaluate.weights=slow", ["evaluate.weights is 'slow'", "raw, ema"]),
        ("train.ema_snapshot_every=10", ["ema_snapshot_every is 10", "sigma_rel"]),
        ("train.offload=parameters", ["zero_stage is 2", "offload 'parameters'", "stage 3"]),
        ("train.keep_every=50", ["checkpoint_every", "train.keep_every (50)"]),
        ("train.profile_steps=[5,2]", ["profile_steps is [5, 2]", "first and last"]),
        ("model.patch_size=3", ["model.patch_size is 3", "latent size"]),
        ("model.num_heads=5", ["model.num_heads is 5", "hidden_size"]),
        ("autoencoder.downsample=3", ["autoencoder.downsample is 3", "data.resolution (16)"]),
        ("train.checkpoint_every=35", ["train.log_every is 10", "checkpoint_every (35)"]),
        ("train.warmup_steps=100000", ["train.warmup_steps is 100000", "train.steps"]),
        ("evaluate.sampler.steps=1001", ["evaluate.sampler.steps is 1001", "timesteps (1000)"]),
        ("evaluate.sampler.name=eulr", ["evaluate.sampler.name", "'eulr'", "'euler'"]),
        ("evaluate.sampler=3", ["evaluate.sampler is 3"]),
        ("evaluate.sampler.stesp=3", ["'evaluate.sampler.stesp'", "'steps'"]),
        ("evaluate.sampler.diffusion=sigma", ["sampler.diffusion", "name=sde", "'ddim'"]),
        ("evaluate.guidance.power=2", ["guidance.power", "kind=power_cosine", "'constant'"]),
        ("diffusion.objective=epsilom", ["diffusion.objective", "'epsilom'", "'epsilon'"]),
        ("diffusion.p_mean=1", ["diffusion.p_mean", "objective=edm", "'epsilon'"]),
        ("evaluate.sampler.spacing=odd", ["evaluate.sampler.spacing", "'odd'", "'even'"]),
        ("evaluate.guidance.channels=5", ["guidance.channels is 5", "latent_channels (4)"]),
        ("evaluate.guidance.scale=-1", ["evaluate.guidance.scale", "-1"]),
        ("diffusion.beta_start=0.5", ["diffusion.beta_start is 0.5", "beta_end"]),
        ("storage.root=s3:/work/project", ["storage.root is 's3:/work/project'", "s3://…"]),
        ("name=a/b", ["name", "'a/b'"]),
        ("data=3", ["data", "3"]),
        ("train", ["'train'", "key.sub=value"]),
        ("train.lr=[", ["'train.lr=['", "YAML"]),
        ("name.x=1", ["'name'", "'demo'", "not a section"]),
    ],
)
def test_bad_values_are_named(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("demo", [override])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["name=ddpm", "spacing=ddim"], ["sampler.spacing", "name=ddim", "'ddpm'"]),
        (["eta=0.5", "name=ddpm"], ["sampler.eta", "name=ddim", "'ddpm'"]),
        (["spacing=ddim", "steps=300"], ["steps is 300", "(1000)", "250 or 334"]),
        (["spacing=ddim", "steps=1"], ["steps is 1,", "(1000)", "2"]),
        (["name=sde", "steps=1"], ["sampler.steps is 1"]),
        (["name=sde", "last_step_size=1"], ["last_step_size is 1"]),
    ],
)
def test_options_must_match_the_sampler(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("demo", [f"evaluate.sampler.{text}" for text in overrides])
    for word in words:
        assert word in str(caught.value)


def test_another_variant_takes_its_own_defaults_and_the_shared_keys() -> None:
    recipe = load_recipe("demo", ["evaluate.sampler.eta=0.5"])
    changed = with_overrides(recipe, ["evaluate.sampler.name=heun"], "demo").evaluate.sampler
    assert changed.model_dump() == {"name": "heun", "steps": 50}
    edm = ["diffusion.objective=edm", "evaluate.sampler.churn=3", "evaluate.sampler.name=edm"]
    changed = with_overrides(recipe, edm, "demo").evaluate.sampler
    assert (changed.steps, changed.churn, changed.sigma_max) == (18, 3.0, 80.0)
    # A later section replaces all of it.
    whole = [*edm[:2], "evaluate.sampler={name: edm}"]
    assert with_overrides(recipe, whole, "demo").evaluate.sampler.churn == 0.0


def test_sampler_options_are_accepted() -> None:
    ddim = ["steps=250", "spacing=ddim", "eta=1"]
    sampler = load_recipe("demo", [f"evaluate.sampler.{text}" for text in ddim]).evaluate.sampler
    assert (sampler.spacing, sampler.eta) == ("ddim", 1.0)
    sde = ["name=sde", "diffusion=sigma", "last_step=euler", "last_step_size=0.01"]
    overrides = ["diffusion.objective=flow", *(f"evaluate.sampler.{text}" for text in sde)]
    sampler = load_recipe("demo", overrides).evaluate.sampler
    assert (sampler.diffusion, sampler.last_step) == ("sigma", "euler")


def test_every_error_of_a_recipe_is_reported_at_once() -> None:
    with pytest.raises(UserError, match=r"(?s)train\.lr.*train\.step"):
        load_recipe("demo", ["train.lr=x", "train.stepz=3"])


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("dmo", ["'dmo'", "did you mean 'demo'"]),
        ("nothing/here.yaml", ["nothing/here.yaml", "No such file"]),
        ("memory://nothing/here.yaml", ["memory://nothing/here.yaml", "No such file"]),
        ("s3:/work/recipe.yaml", ["recipe is 's3:/work/recipe.yaml'", "s3://…"]),
    ],
)
def test_unknown_recipes_are_named(reference: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(reference)
    for word in words:
        assert word in str(caught.value)


def test_a_recipe_can_be_on_any_storage() -> None:
    recipe = load_recipe("demo", ["train.lr=0.5"])
    storage.write_text("memory://work/runs/x/recipe.yaml", dump_recipe(recipe))
    assert load_recipe("memory://work/runs/x/recipe.yaml") == recipe


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "just words", ""])
def test_files_that_are_not_recipes_are_rejected(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"r\.yaml"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("train.zero_stage=0 train.precision=bf16", ["zero_stage is 0", "precision 'bf16'"]),
        ("train.zero_stage=0 train.offload=optimizer", ["zero_stage is 0", "offload"]),
        ("train.zero_stage=3 train.compile=true", ["zero_stage is 3", "compile"]),
        (
            "train.zero_stage=1 train.precision=bf16 train.micro_batch_size=4",
            ["zero_stage is 1", "micro_batch_size", "bf16"],
        ),
    ],
)
def test_incompatible_execution_settings_are_rejected(changes: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("demo", changes.split())
    for word in words:
        assert word in str(caught.value)


@given(
    key=st.sampled_from(
        [
            "scaling.workers=4",
            "scaling.workers=2..4",
            "train.zero_stage=0",
            "train.offload=optimizer",
            "train.micro_batch_size=3",
            "train.keep_every=1200",
            "train.max_rollbacks=0",
            "train.profile_steps=[1,2]",
            "scaling.evaluate_actors=7",
            "storage.root=x",
            "tracking.experiment=y",
        ]
    )
)
def test_resources_and_locations_do_not_change_a_run(key: str) -> None:
    assert load_recipe("demo", [key]).train_hash() == load_recipe("demo").train_hash()


def test_what_changes_the_weights_changes_the_hash() -> None:
    plain = load_recipe("demo")
    for key in ("train.seed=1", "model.depth=5", "data.shuffle_window=7", "autoencoder.scale=2"):
        assert load_recipe("demo", [key]).train_hash() != plain.train_hash()
    assert load_recipe("demo", ["train.seed=1"]).encode_hash() == plain.encode_hash()
    assert load_recipe("demo", ["data.flip=true"]).encode_hash() != plain.encode_hash()


def test_more_steps_are_the_same_run_unless_the_schedule_depends_on_them() -> None:
    constant = ["train.lr_schedule=constant"]
    longer = [*constant, "train.steps=9999"]
    assert load_recipe("demo", constant).train_hash() == load_recipe("demo", longer).train_hash()
    assert (
        load_recipe("demo", ["train.steps=9999"]).train_hash() != load_recipe("demo").train_hash()
    )


def test_a_preset_sets_its_sizes() -> None:
    recipe = load_recipe("imagenet256", ["model.preset=dit_b", "model.depth=3"])
    assert (recipe.model.architecture, recipe.model.hidden_size) == ("dit", 768)
    assert (recipe.model.depth, recipe.model.num_heads) == (3, 12)
    # Even if the file lists the sizes, as a stored recipe does.
    assert load_recipe("demo", ["model.preset=diffit_s"]).model.hidden_size == 384
    with pytest.raises(UserError, match=r"model\.preset is 'dit_m'.*diffit_s"):
        load_recipe("demo", ["model.preset=dit_m"])


def test_how_a_step_is_computed_does_not_change_the_run() -> None:
    base = load_recipe("imagenet256")
    spelled_out = ["model.preset=null", "model.hidden_size=1152", "model.depth=28"]
    for changes in (
        ["train.zero_stage=1", "train.compile=true", "model.attention=reference"],
        ["train.activation_checkpointing=blocks", "train.activation_checkpoint_every=2"],
        spelled_out,
    ):
        assert load_recipe("imagenet256", changes).train_hash() == base.train_hash()
    for change in ("train.precision=fp32", "diffusion.objective=flow", "model.conditional=false"):
        sampler = ["evaluate.sampler.name=heun", "evaluate.guidance.kind=none"]
        assert load_recipe("imagenet256", [change, *sampler]).train_hash() != base.train_hash()


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["diffusion.objective=flow"], r"evaluate\.sampler\.name is 'ddim'.*euler, heun, sde"),
        (["evaluate.sampler.name=sde"], r"evaluate\.sampler\.name is 'sde'.*ddpm, ddim"),
        (["model.conditional=false"], r"evaluate\.guidance\.kind.*model\.conditional"),
        (
            ["evaluate.guidance={kind: interval, low: 0.5, high: 0.5}"],
            r"evaluate\.guidance\.low is 0\.5.*evaluate\.guidance\.high",
        ),
        (["evaluate.guidance.channels=5"], r"evaluate\.guidance\.channels is 5.*latent_channels"),
        (["evaluate.sampler.steps=1001"], r"evaluate\.sampler\.steps is 1001.*timesteps"),
        (["evaluate.sampler.steps=-1"], r"evaluate\.sampler\.steps is -1"),
        (["evaluate.guidance.scale=-1"], r"evaluate\.guidance\.scale is -1"),
    ],
)
def test_objectives_samplers_and_guidance_must_agree(overrides: list[str], key: str) -> None:
    with pytest.raises(UserError, match=key):
        load_recipe("demo", overrides)


def test_deterministic_training_refuses_atomics_and_keeps_the_hash() -> None:
    with pytest.raises(UserError, match=r"train\.deterministic.*model\.attention=sdpa"):
        load_recipe("demo", ["train.deterministic=true", "model.attention=flex"])
    deterministic = load_recipe("demo", ["train.deterministic=true"])
    assert deterministic.train_hash() == load_recipe("demo").train_hash()


def test_a_missing_space_in_yaml_is_named() -> None:
    with pytest.raises(UserError, match=r"'train\.ema\.wide\.sigma_rel:0\.1'.* sigma_rel: 0\.1"):
        load_recipe("demo", ["train.ema={wide: {sigma_rel:0.1}}"])


def test_the_levels_of_a_fitted_autoencoder_follow_from_its_downsampling() -> None:
    fit = load_recipe("demo", ["autoencoder.fit.width=8"]).autoencoder.fit
    assert [fit.block_out_channels(n) for n in (1, 4, 8)] == [(8,), (8, 16, 16), (8, 16, 16, 16)]


def test_pixels_have_no_keys_of_an_autoencoder() -> None:
    recipe = load_recipe("demo", ["autoencoder.kind=identity", "evaluate.guidance.channels=3"])
    assert recipe.flat()["autoencoder.kind"] == "identity"
    assert (recipe.autoencoder.latent_channels, recipe.latent_size) == (3, 16)
    for change in ("autoencoder.scale=2", "autoencoder.fit.steps=3"):
        with pytest.raises(UserError, match=r"autoencoder\.(scale|fit) .*kind.*'identity'"):
            load_recipe("cifar10", [change])
