"""Generation on a device: `python -m tests.rehearsal.sampling DEVICE ROOT OUT`

Every sampler with guidance, an autoencoder in slices, and a chunk of an evaluation of ROOT's run
`tiny`, written to OUT. DEVICE is cpu, or cuda for the stand-in. The last line of output is JSON:
what reached attention, what the host waited for, and differences of slices.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.rehearsal import stand_in

WAITS = ("read", "to_host", "to_device:blocking", "sync")


def samplers() -> dict[str, dict[str, int]]:
    """What the host waits for while each sampler runs, the second time."""
    import torch
    from pydantic import TypeAdapter

    from diffit_train.config.diffusion import Diffusion
    from diffit_train.config.evaluate import SAMPLERS, PowerCosineGuidance, Sampler
    from diffit_train.diffusion.generation import ImageNoise, generate_latents, weight_of_noise
    from diffit_train.diffusion.objective import build_objective
    from diffit_train.models.latent import LatentDiffiT, Shape
    from diffit_train.models.precision import arithmetic

    device = torch.device("cuda")
    waits = {}
    for name, known in SAMPLERS.items():
        objective = build_objective(TypeAdapter(Diffusion).validate_python({"objective": name}))
        shape = Shape(
            latent_size=8, hidden_size=32, depth=1, num_heads=2, num_classes=10,
            out_channels=8 if name == "epsilon" else 4,
        )  # fmt: skip
        model = LatentDiffiT(shape).to(device).eval().requires_grad_(False)
        guidance = PowerCosineGuidance()
        weight = weight_of_noise(objective, guidance)

        def predict(x: Any, t: Any, y: Any, model: Any = model) -> Any:
            with arithmetic("bf16_autocast", device):
                return model(x, t, y).float()

        for sampler in known:
            for _ in range(2):
                stand_in.reset_counters()
                noise = ImageNoise([(0, i) for i in range(4)], (4, 8, 8))
                labels = torch.zeros(4, dtype=torch.long, device=device)
                stand_in.reset_counters()
                chosen = TypeAdapter(Sampler).validate_python({"name": sampler, "steps": 6})
                with torch.no_grad():
                    generate_latents(
                        objective, chosen, guidance, weight, predict,
                        noise, labels, 10,
                    )  # fmt: skip
            waits[f"{name}, {sampler}"] = stand_in.counters(*WAITS)
    return waits


def chunk(device: str, root: Path, out: Path) -> dict[str, int]:
    """A chunk as an actor of the fleet makes it; what reached attention."""
    from diffit_train.evaluation import node_weights
    from diffit_train.evaluation.actors import ChunkTask, EvaluationActor, EvaluationTarget
    from diffit_train.evaluation.chunks import Range
    from tests.conftest import tiny_recipe

    node_weights.node_folder = lambda: out / "copies"  # type: ignore[assignment]
    recipe = tiny_recipe(root, f"scaling.gpus_per_actor={int(device == 'cuda')}")
    actor = EvaluationActor(recipe.model_dump(mode="json"))
    actor.ready()
    target = EvaluationTarget(str(root / "runs" / "tiny"), 12, str(out), "key")
    if device == "cuda":
        stand_in.reset_counters()
    actor.chunk(recipe.model_dump(mode="json"), ChunkTask(target, Range(0, 4)))
    return stand_in.counters("attention") if device == "cuda" else {}


def autoencoder_slices() -> dict[str, float]:
    """Largest differences of slices of a batch on the device from the whole batch on the CPU."""
    import numpy as np
    import torch

    from tests.gpu.autoencoder import WAYS, loaded, stable_diffusion_autoencoder
    from tests.gpu.kit import Machine

    torch.manual_seed(0)
    plain = stable_diffusion_autoencoder(Machine.of("cpu", tiny=True))
    random = np.random.default_rng(0)
    pixels = random.uniform(-1, 1, (5, 3, 32, 32)).astype(np.float32)
    latents = torch.from_numpy(random.standard_normal((5, 4, 4, 4), np.float32))
    whole = loaded(plain, WAYS["fp32"], torch.device("cpu"))
    # Less than one image needs: as many slices as images.
    sliced = replace(loaded(plain, WAYS["fp32"], torch.device("cuda")), budget=1)
    encoded = sliced.encode_moments(pixels) - whole.encode_moments(pixels)
    decoded = sliced.decode(latents.cuda()).astype(int) - whole.decode(latents)
    return {"encode": float(np.abs(encoded).max()), "decode": float(np.abs(decoded).max())}


def main() -> None:
    """All of it."""
    device, root, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if device == "cuda":
        stand_in.install()
    import torch

    torch.set_num_threads(1)
    result = {"attention": chunk(device, root, out)}
    if device == "cuda":
        result |= {"waits": samplers(), "slices": autoencoder_slices()}  # type: ignore[dict-item]
    print(json.dumps(result), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
