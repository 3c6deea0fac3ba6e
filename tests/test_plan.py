"""The plan against published counts, and its memory against that of a real engine."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffit_train.cli.plan import plan_command
from diffit_train.config import Recipe, load_recipe
from diffit_train.config.presets import PAPER_COSTS
from diffit_train.config.train import Train
from diffit_train.data.autoencoder import CPU_BUDGET
from diffit_train.data.loader import READERS, SampleOrder
from diffit_train.errors import UserError
from diffit_train.jobs.plan import (
    DECODE_MULTIPLY_ADDS,
    ENCODE_MULTIPLY_ADDS,
    GPUS,
    MARGIN_S,
    PROCESS_BYTES,
    Machine,
    NodeSize,
    autoencoder_bytes,
    between,
    compare,
    latent_bytes,
    loader_bytes,
    node_sizes,
    plan,
    print_comparison,
    print_plan,
    quantity,
    state_bytes,
)
from diffit_train.models.backbone import trainable_parameters
from diffit_train.models.cost import activation_bytes
from diffit_train.models.latent import LatentDiffiT, Shape
from diffit_train.models.wrap import checkpoint_activations, use_kernel
from diffit_train.storage import GIB
from diffit_train.training.engine import Engine
from tests.training.ranks import on_ranks

H100 = Machine("H100", 0.4, 2.0)


@pytest.mark.parametrize(
    ("name", "parameters", "forward", "plain"),
    [("imagenet256", 561_035_232, 118.5, 114.3), ("imagenet512", 562_382_816, 524.4, 456.8)],
)
def test_published_counts(name: str, parameters: int, forward: float, plain: float) -> None:
    result = plan(load_recipe(name), H100)
    assert result["parameters"]["total"] == parameters
    parts = [value for part, value in result["parameters"].items() if part != "total"]
    assert sum(parts) == parameters
    work = result["multiply_adds"]
    assert work["forward"] / 1e9 == pytest.approx(forward, abs=0.05)
    assert work["forward_without_attention_products"] / 1e9 == pytest.approx(plain, abs=0.05)
    assert work["training_image"] == 3 * work["forward"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_cost_follows_from_the_time_of_a_step() -> None:
    time = plan(load_recipe("imagenet256", ["scaling.workers=4"]), H100)["time"]
    computed = 256 / 4 * 6 * 118.5e9 / (GPUS["H100"].tflops_bf16 * 1e12 * 0.4)
    assert time["step_parts_s"]["compute"] == pytest.approx([computed] * 2, rel=1e-3)
    assert computed < time["step_s"][0] < time["step_s"][1] < 1.5 * computed
    for step_s, hours, spent, cost in zip(
        time["step_s"], time["hours"], time["gpu_hours"], time["cost"], strict=True
    ):
        assert hours == pytest.approx(7_000_000 * step_s / 3600)
        assert (spent, cost) == (pytest.approx(4 * hours), pytest.approx(8 * hours))
    assert time["epochs"] == pytest.approx(7_000_000 * 256 / 1_281_167)


def _steps(*overrides: str, **machine: float) -> dict[str, Any]:
    recipe = load_recipe("imagenet256", ["data.shuffle_streams=256", *overrides])
    return plan(recipe, Machine("H100", **machine), measured=False)["time"]


def test_many_gpus_wait_for_launches_and_links() -> None:
    few, many = _steps("scaling.workers=8"), _steps("scaling.workers=128")
    assert few["images_per_gpu"] > few["images_to_keep_a_gpu_busy"]
    assert many["images_per_gpu"] == 2 < many["images_to_keep_a_gpu_busy"]
    # Sixteen times the GPUs do not give even twice the speed.
    assert many["images_per_s"][1] < 2 * few["images_per_s"][0]
    parts = many["step_parts_s"]
    assert parts["exchange"][0] > parts["launch"][0] > parts["compute"][0]
    faster = _steps("scaling.workers=128", node_link_gb_per_s=400.0)
    assert faster["step_parts_s"]["exchange"][0] < 0.5 * parts["exchange"][0]
    one = _steps("scaling.workers=1")
    assert one["step_parts_s"]["exchange"] == [0.0, 0.0]


def test_bytes_exchanged_follow_the_stage() -> None:
    # Bandwidth so low that latency does not count; at worst 60% of it is reached.
    links = {"link_gb_per_s": 0.1, "node_link_gb_per_s": 0.1}
    whole = 561_035_232 * 2 * 7 / 8 / (0.1e9 * 0.6)
    for stage, times in ((1, 3), (2, 3), (3, 3)):
        found = _steps(
            "scaling.workers=8", f"train.zero_stage={stage}", "train.compile=false", **links
        )
        assert found["step_parts_s"]["exchange"][1] == pytest.approx(times * whole, rel=1e-3)
    micro = _steps("scaling.workers=8", "train.micro_batch_size=8", **links)
    assert micro["step_parts_s"]["exchange"][1] == pytest.approx((4 * 2 + 1) * whole, rel=1e-3)


def test_stages_of_the_project_have_hours_and_costs() -> None:
    overrides = ["train.validate_every=1000000"]
    result = plan(load_recipe("imagenet256", overrides), Machine("H100", None, 2.0))
    rows = {row["stage"]: row for row in result["stages"]}
    assert list(rows) == ["encode", "train", "evaluate while training", "evaluate"]
    for row in rows.values():
        assert 0 < row["hours"][0] < row["hours"][1]
        assert row["cost"] == pytest.approx([2 * spent for spent in row["gpu_hours"]])
    # Seven evaluations of 10,000 images against one of 50,000.
    shorter = rows["evaluate while training"]["hours"][0]
    assert shorter == pytest.approx(7 / 5 * rows["evaluate"]["hours"][0])
    full = plan(load_recipe("imagenet256", ["evaluate.precision=fp32"]), H100)["stages"]
    assert full[-1]["hours"][0] > 3 * rows["evaluate"]["hours"][1]
    unknown = plan(load_recipe("demo"), H100)["stages"]
    assert [row["hours"] is None for row in unknown] == [True, False, True]


@pytest.mark.slow
def test_the_autoencoders_work_is_that_of_diffusers() -> None:
    from diffusers import AutoencoderKL

    channels = (128, 256, 512, 512)
    with torch.device("meta"):
        model = AutoencoderKL(
            block_out_channels=channels,
            layers_per_block=2,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
        )
        inputs = ((model.encode, (3, 256)), (model.decode, (4, 32)))
        for (run, (depth, side)), per_pixel in zip(
            inputs, (ENCODE_MULTIPLY_ADDS, DECODE_MULTIPLY_ADDS), strict=True
        ):
            counter = FlopCounterMode(display=False)
            with torch.no_grad(), counter:
                run(torch.empty(1, depth, side, side))
            assert counter.get_total_flops() / 2 / 256**2 == pytest.approx(per_pixel, rel=1e-5)


def test_small_models_have_visible_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(plan(load_recipe("demo"), H100))
    out = capsys.readouterr().out
    assert " 0.0 " not in out
    assert " 0.00 " not in out
    assert "3.4 M" in out
    assert "Not estimated: encode, evaluate" in out


def test_a_recipe_for_cpus_is_planned_as_if_for_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(plan(load_recipe("demo"), H100))
    out = capsys.readouterr().out
    assert "This recipe trains on CPUs" in out
    assert "keep it busy" not in out
    print_plan(plan(load_recipe("demo", ["scaling.gpus_per_worker=1"]), H100))
    out = capsys.readouterr().out
    assert "This recipe trains on CPUs" not in out
    assert "keep it busy" in out


def test_numbers_keep_two_digits() -> None:
    assert [quantity(v) for v in (12, 1.2e6, 118.5e9)] == ["12", "1.2 M", "118.5 G"]
    assert between([0.0312, 0.00051]) == "0.00051 to 0.031"
    assert between([12_000.0, 12_000.2]) == "12,000"
    assert between(None) == "-"


def test_another_preset_is_compared() -> None:
    recipe = load_recipe("imagenet256")
    other = compare(recipe, "dit_xl", H100)
    assert other["parameters"]["total"] == 674_834_720
    with pytest.raises(UserError, match=r"--compare is 'dit_9', but must be one of: diffit_s"):
        compare(recipe, "dit_9", H100)
    with pytest.raises(UserError, match=r"'dit_xl', a model on latents, but recipe 'cifar10'"):
        compare(load_recipe("cifar10"), "dit_xl", H100)


def test_the_papers_table_9(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe("imagenet256")
    others = {name: compare(recipe, name, H100) for name in PAPER_COSTS}
    for name, (parameters, gflops, _) in PAPER_COSTS.items():
        counted = others[name]
        assert counted["parameters"]["total"] / 1e6 == pytest.approx(parameters, abs=0.5)
        tolerance = 4.6 if name == "diffit_xl" else 0.5  # counted without attention products
        assert counted["multiply_adds"]["forward"] / 1e9 == pytest.approx(gflops, abs=tolerance)
    print_comparison(plan(recipe, H100), others)
    lines = [line.split("\u2502") for line in capsys.readouterr().out.splitlines()]
    shown = {cells[1].strip(): [cell.strip() for cell in cells[3:-1]] for cells in lines[4:-1]}
    assert shown["paper: FID at 256x256"] == ["2.27", "1.73"]


def test_recomputing_blocks_costs_a_forward_pass_but_no_mfu() -> None:
    plain = plan(load_recipe("imagenet256"), H100)
    again = plan(load_recipe("imagenet256", ["train.activation_checkpointing=blocks"]), H100)
    forward = plain["multiply_adds"]["forward"]
    assert again["multiply_adds"]["training_image"] == 4 * forward
    # Recomputing takes time that counts as no useful work.
    assert again["time"]["mfu"][0] == pytest.approx(3 / 4 * plain["time"]["mfu"][0], rel=0.05)
    few = again["memory"]["zero_stage"]["2"]["activations"]
    assert few < 0.2 * plain["memory"]["zero_stage"]["2"]["activations"]


@pytest.mark.parametrize("bf16", [False, True])
def test_higher_stages_shard_more(bf16: bool) -> None:
    totals = [state_bytes(10**6, stage, 4, 1, bf16).total for stage in range(4)]
    # Stage 1 in fp32 pays for its own copy of the master weights with a share of the moments.
    assert totals == sorted(totals, reverse=True)
    alone = state_bytes(1000, 2, 1, 3, bf16)
    assert alone.ema == 3 * 4000
    assert alone.moments == 8000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_match_those_of_a_forward_pass(dtype: torch.dtype) -> None:
    shape = Shape(latent_size=16, hidden_size=64, depth=6, num_heads=2, num_classes=3)
    for mode, every_nth in (("none", 1), ("blocks", 1), ("selective", 1), ("blocks", 2)):
        model = LatentDiffiT(shape).to(dtype)
        use_kernel(model, "chunked", torch.device("cpu"))
        checkpoint_activations(model, mode, every_nth)
        x, t = torch.randn(8, 4, 16, 16, dtype=dtype), torch.zeros(8, dtype=torch.long)
        # Checkpointing leaves cycles: the last mode's tensors must not be freed in this profile.
        gc.collect()
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            out = model(x, t, t)
        lasting = sum(event.self_cpu_memory_usage for event in profile.key_averages())
        del out
        covered = 0 if mode == "none" else -(-6 // every_nth)
        # Without what one block holds while it is recomputed, which comes only later.
        with torch.device("meta"):
            meta = LatentDiffiT(shape)
        one = activation_bytes(meta, 8, "none", 1, dtype) // 6 if covered else 0
        planned = activation_bytes(meta, 8, mode, every_nth, dtype) - one
        assert planned == pytest.approx(lasting, rel=0.12), mode


def test_a_batch_of_the_autoencoder_needs_no_more_than_its_slices() -> None:
    recipe = load_recipe("imagenet512")
    image = 768 * 4 * 512**2
    assert autoencoder_bytes(recipe, 1) == image
    assert autoencoder_bytes(recipe, 64) == CPU_BUDGET
    assert autoencoder_bytes(load_recipe("demo"), 4) == 4 * 768 * 4 * 16**2


def test_latents_on_the_host_are_what_the_loader_may_hold() -> None:
    recipe = load_recipe("imagenet256", ["scaling.workers=8"])
    counts = [512] * 2503
    order = SampleOrder(counts, 256, recipe.data.shuffle_streams, recipe.data.shuffle_window, 0)
    shards = len(order.rank_streams(0, 8)) * order.shards_per_window()
    held = loader_bytes(recipe, sum(counts))
    assert held == (shards + 2 * READERS) * 512 * latent_bytes(recipe)
    assert loader_bytes(recipe, 512) == 3 * 512 * latent_bytes(recipe)
    assert plan(recipe, H100, measured=False)["memory"]["latents_on_host"] == held


def test_an_unknown_gpu_is_named() -> None:
    with pytest.raises(UserError, match=r"--gpu is 'H9', but must be one of: A10G"):
        plan(load_recipe("demo"), Machine("H9"))


def test_the_table_shows_counts_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(plan(load_recipe("imagenet256"), H100))
    out = capsys.readouterr().out
    for text in ("561,035,232", "118.5 G", "114.3 G", "ZeRO stage", "fits H100", "1,281,167"):
        assert text in out


def test_estimated_latents_have_their_real_size(encoded: Path) -> None:
    from tests.conftest import tiny_recipe

    recipe = tiny_recipe(encoded, "data.expected_images=24")
    real = plan(recipe, H100)["storage"]
    guess = plan(tiny_recipe(encoded / "elsewhere", "data.expected_images=24"), H100)["storage"]
    assert real["images"] == guess["images"] == 24
    # Each shard ends with up to 10 KiB of zeros.
    assert guess["latents"] == pytest.approx(real["latents"], abs=5 * 10240)


def _held(rank: int, world: int, stage: int, precision: str) -> None:
    """Compare the bytes of all tensors after two steps with the plan."""
    torch.manual_seed(0)
    sizes = {"latent_size": 8, "hidden_size": 192, "depth": 4, "num_heads": 4, "num_classes": 10}
    gc.collect()
    before = _tensor_bytes()
    model = LatentDiffiT(Shape(**sizes))
    count = trainable_parameters(model)
    train = Train(steps=9, batch_size=4, zero_stage=stage, precision=precision)
    engine = Engine(model, train, rank, world, torch.device("cpu"))
    x, t = torch.randn(4 // world, 4, 8, 8), torch.zeros(4 // world, dtype=torch.long)
    for step in range(2):
        engine.backward(engine.forward(x, t, t).square().mean() / world)
        assert engine.step(step)
        engine.update_ema(step)
    gc.collect()
    held = _tensor_bytes() - before
    planned = state_bytes(count, stage, world, 1, precision == "bf16")
    # ZeRO frees the gradients between steps.
    expected = planned.total - planned.gradients
    assert held == pytest.approx(expected, rel=0.05), (held / count, expected / count)


def _tensor_bytes() -> int:
    storages = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor) and not item.is_meta:
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_states_match_those_that_ranks_keep(stage: int, precision: str) -> None:
    on_ranks(2, _held, stage, precision)


# ---- Nodes ----


def _recipe(*overrides: str, name: str = "imagenet256") -> Recipe:
    return load_recipe(name, overrides, "s3://bucket/project")


def _planned(of: Recipe) -> dict[str, Any]:
    return plan(of, Machine("H100", 0.4), measured=False)


def _sizes(of: Recipe, workers_per_node: int = 8) -> dict[str, NodeSize]:
    return node_sizes(of, _planned(of), workers_per_node)


def test_nodes_follow_from_workers_and_gpus() -> None:
    two = _sizes(_recipe("scaling.workers=16"))["train"]
    assert (two.nodes, two.gpus, two.cpus) == (2, 8, 65)
    four = _sizes(_recipe("scaling.workers=16"), workers_per_node=4)["train"]
    assert (four.nodes, four.gpus) == (4, 4)
    assert _sizes(_recipe(name="demo"))["train"].gpus == 0
    shared = _sizes(_recipe("scaling.gpus_per_actor=0.5"))["evaluate"]
    assert (shared.nodes, shared.gpus) == (1, 4)


def test_states_on_the_host_need_memory() -> None:
    offloading = _recipe("train.offload=optimizer")
    states = _planned(offloading)["memory"]["zero_stage"]["2"]["of_them_on_host"]
    more = _sizes(offloading)["train"].memory - _sizes(_recipe())["train"].memory
    assert more == pytest.approx(8 * states, abs=GIB)
    on_cpu = _recipe("scaling.gpus_per_worker=0", "scaling.workers=2")
    total = _planned(on_cpu)["memory"]["zero_stage"]["2"]["total"]
    assert _sizes(on_cpu)["train"].memory > 2 * (total + PROCESS_BYTES)


def test_the_cache_holds_the_latents_and_the_grace_a_checkpoint() -> None:
    storage, size = _planned(_recipe())["storage"], _sizes(_recipe())["train"]
    assert storage["latents"] <= size.shard_cache < storage["latents"] + GIB
    assert size.grace_s > storage["checkpoint"] / 100e6 + MARGIN_S


@pytest.mark.parametrize("name", ["demo", "imagenet256", "imagenet512"])
def test_parts_fit_into_each_other(name: str) -> None:
    found = _sizes(_recipe(name=name))
    for size in found.values():
        assert size.object_store < size.shm < size.memory
        assert size.shard_cache < size.disk
        assert name == "demo" or size.memory <= max(found["workers"].memory, found["head"].memory)


def test_plan_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    plan_command("imagenet256", nodes=True, as_json=True)
    train = json.loads(capsys.readouterr().out)["train"]
    assert (train["gpus"], train["memory"] // GIB) == (8, 80)
    plan_command("imagenet256", nodes=True)
    shown = capsys.readouterr().out
    assert "scaling.shard_cache_gib=42" in shown
    assert any(line.split()[1:2] == ["workers"] for line in shown.splitlines())
