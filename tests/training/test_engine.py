"""The ZeRO engine against plain PyTorch, and its checkpoints across world sizes and stages."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from diffit_train import storage
from diffit_train.config.train import Train
from diffit_train.errors import DiffitError, UserError
from diffit_train.models.latent import LatentDiffiT, Shape
from diffit_train.progress import show_log
from diffit_train.runs.checkpoints import STATES, Checkpoint, Checkpoints, Slice, State
from diffit_train.runs.deepspeed import is_deepspeed_checkpoint, read_deepspeed_checkpoint
from diffit_train.training.checkpointer import (
    FAILED_SAVES,
    CheckpointWriter,
    load_checkpoint,
    load_newest,
)
from diffit_train.training.engine import AcceptStep, Engine, accept_finite, learning_rate
from tests.made import make_state
from tests.training.ranks import on_ranks

BATCH = 4
# Gradients are large enough to reveal DeepSpeed's default clipping at 1.
STEEP = 30.0
EMA = {"ema": {"decay": 0.9}, "power": {"sigma_rel": 0.1}}
KINDS = (*STATES, *EMA)
CPU = torch.device("cpu")
# Four processes that each import DeepSpeed take most of a minute to start on two cores.
FOUR_RANKS = pytest.param((4, 2), (2, 1), marks=pytest.mark.slow)


def _train(**changes: object) -> Train:
    values: dict[str, object] = {"steps": 100, "batch_size": BATCH, "lr": 1e-2}
    values |= {"ema": EMA}
    values |= {"warmup_steps": 3, "lr_schedule": "cosine", "weight_decay": 0.01}
    return Train.model_validate(values | changes)


def _model() -> LatentDiffiT:
    torch.manual_seed(0)
    sizes = {"latent_size": 4, "latent_channels": 2, "out_channels": 4, "num_classes": 3}
    model = LatentDiffiT(Shape(**sizes, hidden_size=8, depth=2, num_heads=2))
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    return model


def _batch(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 2, 4, 4, generator=generator)
    t = torch.randint(1000, (BATCH,), generator=generator)
    return x, t, torch.randint(4, (BATCH,), generator=generator)


def _state(step: int, engine: Engine, world: int) -> State:
    return make_state(
        step,
        images_seen=step * BATCH,
        optimizer_steps=engine.optimizer_steps(),
        world_size=world,
        zero_stage=engine.train.zero_stage,
    )


def _engine(model: LatentDiffiT, train: Train, rank: int, world: int) -> Engine:
    micro_batches = math.ceil(BATCH / world / (train.micro_batch_size or BATCH))
    return Engine(model, train, rank, world, CPU, micro_batches)


def _one_step(engine: Engine, step: int, accept: AcceptStep = accept_finite) -> bool:
    mine = slice(engine.rank * BATCH // engine.world_size, None)
    count = BATCH // engine.world_size // engine.micro_batches
    x, t, y = (part[mine] for part in _batch(step))
    for number in range(engine.micro_batches):
        part = slice(number * count, (number + 1) * count)
        squares = engine.forward(x[part], t[part], y[part]) ** 2
        last = number == engine.micro_batches - 1
        engine.backward(STEEP * squares.mean(dim=(1, 2, 3)).sum() / BATCH, last)
    taken = engine.step(step, accept)
    engine.update_ema(step)
    return taken


def _steps(engine: Engine, first: int, last: int) -> None:
    for step in range(first, last):
        assert _one_step(engine, step)


def _save(engine: Engine, run: str, step: int) -> None:
    CheckpointWriter(engine).save_now(
        Checkpoint(run, step), _state(step, engine, engine.world_size)
    )


def _train_and_save(rank: int, world: int, run: str, train: Train, steps: int) -> None:
    engine = _engine(_model(), train, rank, world)
    _save(engine, run, 0)
    _steps(engine, 0, steps)
    _save(engine, run, steps)


def _assert_computes_with(engine: Engine, weights: dict[str, torch.Tensor]) -> None:
    """The engine's model has these weights, not only its masters."""
    plain = _model()
    plain.load_state_dict(weights, strict=False)
    with torch.no_grad():
        output = engine.forward(*_batch(0))
        torch.testing.assert_close(output, plain(*_batch(0)))


def _resume_and_save(
    rank: int, world: int, run: str, step: int, train: Train, steps: int, into: str
) -> None:
    engine = _engine(_model(), train, rank, world)
    assert load_checkpoint(engine, Checkpoint(run, step)).step == step
    _assert_computes_with(engine, Checkpoint(run, step).load("raw"))
    _save(engine, into, step)
    _steps(engine, step, steps)
    _save(engine, into, steps)


def _plain(train: Train, steps: int) -> tuple[dict[str, torch.Tensor], ...]:
    """Weights, EMA and first moments of a plain loop over the whole batch."""
    model = _model()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        named.values(), lr=train.lr, betas=train.betas, weight_decay=train.weight_decay
    )
    ema = {n: p.detach().clone() for n, p in named.items()}
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate(train, step)
        optimizer.zero_grad()
        x, t, y = _batch(step)
        (STEEP * model(x, t, y) ** 2).mean().backward()
        if train.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(named.values(), train.grad_clip)
        optimizer.step()
        for name, parameter in named.items():
            ema[name] = 0.9 * ema[name] + 0.1 * parameter.detach()
    moments = {n: optimizer.state[p]["exp_avg"] for n, p in named.items()}
    return {n: p.detach() for n, p in named.items()}, ema, moments


def _contents(run: str, step: int) -> dict[str, torch.Tensor]:
    shapes = {n: p.shape for n, p in Checkpoint(run, step).index.parameters.items()}
    wanted = [Slice(n, 0, torch.Size(shape).numel()) for n, shape in sorted(shapes.items())]
    loaded = Checkpoint(run, step).read(wanted, KINDS)
    return {
        f"{kind}/{part.name}": values
        for kind in KINDS
        for part, values in zip(wanted, loaded[kind], strict=True)
    }


def _assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, values in a.items():
        assert torch.equal(values, b[name]), name


@pytest.mark.parametrize(
    ("world", "stage", "changes"),
    [
        pytest.param(1, 0, {}, marks=pytest.mark.slow),
        (1, 1, {}),
        (2, 0, {"micro_batch_size": 1, "grad_clip": 0.5}),
        (2, 1, {}),
        pytest.param(2, 1, {"grad_clip": 0.5}, marks=pytest.mark.slow),
        (2, 2, {"micro_batch_size": 1}),
        (2, 2, {"overlap_comm": True}),
        pytest.param(2, 2, {"precision": "fp32"}, marks=pytest.mark.slow),
        (2, 3, {"micro_batch_size": 1}),
        (2, 3, {"grad_clip": 0.5}),
        pytest.param(2, 2, {"offload": "optimizer"}, marks=pytest.mark.slow),
        (2, 3, {"offload": "parameters"}),
    ],
)
def test_training_equals_a_plain_loop(
    tmp_path: Path, world: int, stage: int, changes: dict[str, object]
) -> None:
    train, run = _train(zero_stage=stage, **changes), str(tmp_path)
    on_ranks(world, _train_and_save, run, train, 8)
    weights, ema, moments = _plain(train, 8)
    saved, saved_ema = Checkpoint(run, 8).load("raw"), Checkpoint(run, 8).load("ema")
    contents, largest = _contents(run, 8), max(float(m.abs().max()) for m in moments.values())
    assert saved.keys() == weights.keys()
    for name in weights:
        # Weights move by up to 1e-2 per step. Shifting all keys of an image equally has no gradient
        # but rounding noise, since softmax ignores it; Adam amplifies that noise.
        shifts_keys = "qkv_temb" in name or name.endswith("qkv.bias")
        atol = 5e-2 if shifts_keys else 2e-4
        torch.testing.assert_close(saved[name], weights[name], atol=atol, rtol=1e-3)
        torch.testing.assert_close(saved_ema[name], ema[name], atol=atol, rtol=1e-3)
        # Moments are linear in the gradients, so they reveal a wrong scale or clip.
        mine, plain = contents[f"exp_avg/{name}"], moments[name].reshape(-1)
        torch.testing.assert_close(mine, plain, atol=3e-3 * largest, rtol=0.0)
    assert Checkpoint(run, 8).state.optimizer_steps == 8


@pytest.mark.parametrize(
    ("before", "after"),
    [
        *[((2, 2), (2, 2)), ((2, 2), (1, 1)), ((1, 1), (2, 3))],
        *[((2, 3), (2, 0)), ((2, 0), (1, 3)), FOUR_RANKS],
    ],
)
def test_a_checkpoint_loads_bit_for_bit_at_any_world_size_and_stage(
    tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    run, into = str(tmp_path / "run"), str(tmp_path / "into")
    on_ranks(before[0], _train_and_save, run, _train(zero_stage=before[1]), 5)
    on_ranks(after[0], _resume_and_save, run, 5, _train(zero_stage=after[1]), 8, into)
    _assert_same(_contents(run, 5), _contents(into, 5))


def test_resuming_at_the_same_world_size_changes_nothing(tmp_path: Path) -> None:
    whole, run, into = (str(tmp_path / name) for name in ("whole", "run", "into"))
    on_ranks(2, _train_and_save, whole, _train(), 8)
    on_ranks(2, _train_and_save, run, _train(), 5)
    on_ranks(2, _resume_and_save, run, 5, _train(), 8, into)
    _assert_same(_contents(whole, 8), _contents(into, 8))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = str(tmp_path_factory.mktemp("trained"))
    on_ranks(2, _train_and_save, run, _train(), 2)
    return run


def _copy(trained: str, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(trained, tmp_path / "copy"))


@pytest.mark.parametrize(
    "file", ["ema/rank-00001-of-00002.safetensors", "index.json", "state.json"]
)
@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_reported(
    trained: str, tmp_path: Path, file: str, how: str
) -> None:
    run = str(_copy(trained, tmp_path))
    assert Checkpoint(run, 2).find_corruption() is None
    path = Path(Checkpoint(run, 2).url) / file
    data = bytearray(path.read_bytes())
    if how == "remove":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(data[:-1])
    else:
        data[-2] ^= 1
        path.write_bytes(data)
    with pytest.raises(DiffitError, match=rf"step-0000000002 .*: {file}"):
        _ = Checkpoint(run, 2).state
        Checkpoint(run, 2).load("ema")
    assert (Checkpoint(run, 2).find_corruption() or "").startswith(file)
    if file.startswith("ema/"):  # the other kinds are in other files
        assert Checkpoint(run, 2).load("raw")


def test_a_checkpoint_needs_a_commit_marker(trained: str, tmp_path: Path) -> None:
    run = str(_copy(trained, tmp_path))
    storage.remove(storage.join(Checkpoint(run, 2).url, "commit.json"))
    assert Checkpoints(run).steps == [0]
    with pytest.raises(DiffitError, match="not committed"):
        Checkpoint(run, 2).load("ema")
    with pytest.raises(UserError, match="step 2.*: 0"):
        Checkpoints(run)[2]
    assert Checkpoints(run)["newest"].step == 0
    with pytest.raises(UserError, match="diffit train"):
        Checkpoints(str(tmp_path / "nothing"))["newest"]


def test_a_checkpoint_of_another_model_is_refused(trained: str) -> None:
    with pytest.raises(DiffitError, match=r"'blocks\.9\.x'"):
        Checkpoint(trained, 2).read([Slice("blocks.9.x", 0, 4)], KINDS)


def _save_where_one_rank_cannot(rank: int, world: int, run: str) -> None:
    engine = _engine(_model(), _train(), rank, world)
    if rank == 1:
        storage.write_text(f"{run}/blocked", "a file where rank 1 wants a folder")
    with pytest.raises(DiffitError, match=r"rank 1: .*blocked"):
        _save(engine, run if rank == 0 else f"{run}/blocked", 0)
    dist.barrier()


def test_a_rank_that_cannot_write_stops_the_commit(tmp_path: Path) -> None:
    on_ranks(2, _save_where_one_rank_cannot, str(tmp_path))
    assert Checkpoints(str(tmp_path)).steps == []


def test_retention_keeps_the_newest_and_the_first(trained: str, tmp_path: Path) -> None:
    run = _copy(trained, tmp_path)
    folder = run / "checkpoints"
    for step in (4, 6, 8):
        (folder / "step-0000000002").rename(folder / f"step-{step:010d}")
        _copy_step(folder, step)
    Checkpoints(str(run)).prune(keep=2)
    assert Checkpoints(str(run)).steps == [0, 6, 8]


def _copy_step(folder: Path, step: int) -> None:
    import shutil

    shutil.copytree(folder / f"step-{step:010d}", folder / "step-0000000002")


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.25), (3, 1.0), (50, 0.5), (100, 0.0)],
)
def test_learning_rate_warms_up_then_decays_by_a_cosine(step: int, expected: float) -> None:
    train = _train(lr=1.0, warmup_steps=4)
    assert learning_rate(train, step) == pytest.approx(expected, abs=3e-3)
    constant = _train(lr=1.0, warmup_steps=4, lr_schedule="constant")
    assert learning_rate(constant, max(step, 4)) == 1.0


def _refuse_some(rank: int, world: int, run: str, train: Train) -> None:
    engine = _engine(_model(), train, rank, world)
    seen: list[float] = []

    def refuse(norm: torch.Tensor) -> tuple[bool, float]:
        _, value = accept_finite(norm)
        seen.append(value)
        return False, value

    _steps(engine, 0, 2)
    _save(engine, run, 2)
    assert not _one_step(engine, 2, refuse)
    assert len(seen) == 1
    assert 0.0 < seen[0] == engine.grad_norm() < math.inf
    # A NaN gradient reaches `accept` on every rank, at every stage and in every precision.
    parameter = next(iter(engine.names))
    hook = parameter.register_hook(lambda grad: grad * float("nan") if rank == 0 else grad)
    assert not _one_step(engine, 3, refuse)
    assert len(seen) == 2
    assert not math.isfinite(seen[1])
    assert not _one_step(engine, 3)
    assert not math.isfinite(engine.grad_norm())
    hook.remove()
    assert engine.optimizer_steps() == 2
    _save(engine, run, 4)
    assert _one_step(engine, 4)
    assert engine.optimizer_steps() == 3
    _save(engine, run, 5)


def _save_start(rank: int, world: int, run: str, train: Train) -> None:
    model = _model()
    if rank:  # such as where rank 0 alone has read the weights to start from
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
    _save(_engine(model, train, rank, world), run, 0)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_starts_from_the_weights_unrounded(tmp_path: Path, stage: int) -> None:
    run = str(tmp_path)
    on_ranks(2, _save_start, run, _train(zero_stage=stage, precision="bf16"))
    found = _contents(run, 0)
    for name, parameter in _model().named_parameters():
        if parameter.requires_grad:
            for kind in ("master", "ema"):
                assert torch.equal(found[f"{kind}/{name}"], parameter.detach().view(-1)), name


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        *[(stage, "fp32") for stage in range(4)],
        *[(stage, "bf16") for stage in (1, 2, 3)],
        *[(stage, "bf16_autocast") for stage in range(4)],
    ],
)
def test_a_rejected_step_changes_only_the_ema(tmp_path: Path, stage: int, precision: str) -> None:
    run = str(tmp_path)
    on_ranks(2, _refuse_some, run, _train(zero_stage=stage, precision=precision))
    before, after, later = (_contents(run, step) for step in (2, 4, 5))
    for name, values in before.items():
        moved = name.split("/")[0] in EMA
        assert torch.equal(values, after[name]) or moved, name
        assert later[name].isfinite().all()
    assert any(not torch.equal(after[n], before[n]) for n in before if n.startswith("ema/"))
    assert any(not torch.equal(later[n], after[n]) for n in before if n.startswith("master/"))


def _find_newest(rank: int, world: int, run: str, expected: int | None, words: str) -> None:
    lines: list[str] = []
    with show_log(lines.append):
        state = load_newest(_engine(_model(), _train(), rank, world), Checkpoints(run))
    assert (state.step if state else None) == expected
    assert bool(lines) == (rank == 0 and bool(words))
    assert all(words in line for line in lines)


def _storage_is_away(rank: int, world: int, run: str) -> None:
    def away(url: str, start: int, stop: int) -> bytes:
        raise DiffitError(f"could not reach {url}")

    before, storage.read_range = storage.read_range, away
    try:
        with pytest.raises(DiffitError, match="could not reach"):
            load_newest(_engine(_model(), _train(), rank, world), Checkpoints(run))
    finally:
        storage.read_range = before


def _all_damaged(rank: int, world: int, run: str) -> None:
    with pytest.raises(DiffitError, match=r"step-0000000000.*--run"):
        load_newest(_engine(_model(), _train(), rank, world), Checkpoints(run))


def test_a_damaged_newest_checkpoint_is_skipped(trained: str, tmp_path: Path) -> None:
    run = _copy(trained, tmp_path)
    on_ranks(2, _find_newest, str(run), 2, "")
    # An unreachable checkpoint is not considered damaged.
    on_ranks(2, _storage_is_away, str(run))
    assert Checkpoints(str(run)).steps == [0, 2]
    name = "rank-00001-of-00002.safetensors"
    file = Path(Checkpoint(str(run), 2).url) / "exp_avg" / name
    file.write_bytes(file.read_bytes()[:-3])
    on_ranks(2, _find_newest, str(run), 0, f"exp_avg/{name} differs")
    assert Checkpoints(str(run)).steps == [0]
    (Path(Checkpoint(str(run), 0).url) / "master" / name).unlink()
    on_ranks(2, _all_damaged, str(run))
    on_ranks(2, _find_newest, str(tmp_path / "nothing"), None, "")


def _save_with_failures(rank: int, world: int, run: str) -> None:
    engine = _engine(_model(), _train(), rank, world)
    lines: list[str] = []
    writer = CheckpointWriter(engine)
    writer.save(Checkpoint(run, 0), _state(0, engine, world))
    writer.wait()
    with show_log(lines.append):
        for step in range(1, 1 + FAILED_SAVES):
            folder = f"{run}/blocked" if rank == 1 else run
            writer.save(Checkpoint(folder, step), _state(step, engine, world))
        writer.wait()
    assert len(writer.failures) == FAILED_SAVES
    assert len(lines) == (FAILED_SAVES if rank == 0 else 0)
    with pytest.raises(DiffitError, match=r"step-0000000003 .*: rank 1"):
        writer.save(Checkpoint(run, 4), _state(4, engine, world))


def test_training_survives_a_few_failed_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file where a folder is wanted")
    on_ranks(2, _save_with_failures, str(tmp_path))
    assert Checkpoints(str(tmp_path)).steps == [0]


def test_retention_keeps_every_kth_permanently(trained: str, tmp_path: Path) -> None:
    run = _copy(trained, tmp_path)
    folder = run / "checkpoints"
    for step in (4, 6, 8, 10):
        (folder / "step-0000000002").rename(folder / f"step-{step:010d}")
        _copy_step(folder, step)
    Checkpoints(str(run)).prune(keep=1, every=4, protected={6})
    assert Checkpoints(str(run)).steps == [0, 4, 6, 8, 10]
    Checkpoints(str(run)).prune(keep=2, every=4)
    assert Checkpoints(str(run)).steps == [0, 4, 8, 10]


def test_inverse_sqrt_decay_starts_at_lr_decay_start() -> None:
    train = _train(lr=1.0, warmup_steps=0, lr_schedule="inverse_sqrt", lr_decay_start=100)
    rates = [learning_rate(train, step) for step in (0, 100, 400, 10_000)]
    assert rates == pytest.approx([1.0, 1.0, 0.5, 0.1])


def _train_with_deepspeed_alone(rank: int, world: int, folder: str, stage: int) -> None:
    """A checkpoint as another script would write it, and its contents read by DeepSpeed."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    model = _model()
    parameters = [p for p in model.parameters() if p.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": BATCH // world,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(3):
        mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        engine.backward((engine(*(part[mine] for part in _batch(step))) ** 2).mean())
        engine.step()
    engine.save_checkpoint(folder, tag="mine")
    values = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            values[f"master/{name}"] = safe_get_full_fp32_param(parameter)
            for kind in ("exp_avg", "exp_avg_sq"):
                values[f"{kind}/{name}"] = safe_get_full_optimizer_state(parameter, kind)
    if rank == 0:
        torch.save(values, f"{folder}/expected.pt")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_own_checkpoints_are_read(tmp_path: Path, stage: int) -> None:
    on_ranks(2, _train_with_deepspeed_alone, str(tmp_path), stage)
    assert is_deepspeed_checkpoint(str(tmp_path))
    assert is_deepspeed_checkpoint(str(tmp_path / "mine"))
    found = read_deepspeed_checkpoint(str(tmp_path))
    assert (found.step, found.optimizer_steps) == (3, 3)
    expected = torch.load(tmp_path / "expected.pt")
    mine = {f"{kind}/{n}": v for kind, named in found.values.items() for n, v in named.items()}
    assert mine.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(mine[name], values.reshape(-1)), name
    optimizer = next((tmp_path / "mine").glob("*zero_pp_rank_1_*optim*"))
    torch.save({"optimizer_state_dict": {"zero_stage": stage}}, optimizer)
    with pytest.raises(UserError, match=r"DeepSpeed.*KeyError"):
        read_deepspeed_checkpoint(str(tmp_path))
    optimizer.write_bytes(b"no pickle")
    with pytest.raises(UserError, match=r"optim_states\.pt"):
        read_deepspeed_checkpoint(str(tmp_path))
    optimizer.unlink()
    with pytest.raises(UserError, match=r"2 ranks; .*\[1\]"):
        read_deepspeed_checkpoint(str(tmp_path))
    assert not is_deepspeed_checkpoint(str(tmp_path / "nowhere"))
