"""A training step of the ImageNet recipes on fake tensors: `python -m tests.rehearsal.budgets`

Nothing is computed: tensors have a shape, a dtype and the device cuda. The last line of output is
JSON: by recipe, kernels and bytes moved of forward and backward pass, bytes without those of matrix
products and attention, bytes kept between the passes, and the largest tensor.

Counted at two depths, and extended to the recipe's: all blocks are alike.
"""

from __future__ import annotations

import json
import os
from typing import Any

from tests.rehearsal import stand_in

RECIPES = ("imagenet256", "imagenet512")
DEPTHS = (1, 2)


def count(recipe: Any, depth: int, batch: int) -> dict[str, int]:
    """Of a model of this depth, with bf16 weights."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    from diffit_train.models.build import build_model
    from diffit_train.models.wrap import KEPT_OPERATIONS, checkpoint_activations, use_kernel

    totals = {"kernels": 0, "bytes": 0, "bytes_of_others": 0, "kept": 0, "largest": 0}

    def storage_bytes(tensor: torch.Tensor) -> int:
        """Of the memory behind a tensor; expanded dimensions are none."""
        sizes = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
        elements = 1
        for size in sizes:
            elements *= size
        return elements * tensor.element_size()

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = op(*args, **(kwargs or {}))
            views = any(r.alias_info and not r.alias_info.is_write for r in op._schema.returns)
            made = [tensor for tensor in tree_iter(out) if isinstance(tensor, torch.Tensor)]
            if views or not made or "empty" in op.overloadpacket.__name__:
                return out
            seen = {id(t): t for t in tree_iter((args, kwargs, out)) if isinstance(t, torch.Tensor)}
            totals["kernels"] += 1
            moved = sum(map(storage_bytes, seen.values()))
            totals["bytes"] += moved
            if op not in KEPT_OPERATIONS:
                totals["bytes_of_others"] += moved
            totals["largest"] = max(totals["largest"], *map(storage_bytes, made))
            return out

    shorter = recipe.model_copy(update={"model": recipe.model.model_copy(update={"depth": depth})})
    device = torch.device("cuda")
    train = recipe.train
    with FakeTensorMode(), device:
        torch.set_default_dtype(torch.bfloat16)
        model = build_model(shorter)
        torch.set_default_dtype(torch.float32)
        use_kernel(model, recipe.model.attention, device)
        checkpoint_activations(
            model, train.activation_checkpointing, train.activation_checkpoint_every
        )
        own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        kept: dict[int, Any] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return tensor

        x = torch.empty(batch, *model.input_shape)
        t, y = torch.zeros(batch, dtype=torch.long), torch.zeros(batch, dtype=torch.long)
        with Counted():
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                out = model(x, t, y)
            totals["kept"] = sum(storage.nbytes() for storage in kept.values())
            out.float().square().mean().backward()
    return totals


def main() -> None:
    """Count each recipe, and what `diffit plan` says of it."""
    stand_in.install()
    import torch

    from diffit_train.config import load_recipe
    from diffit_train.models.build import build_model
    from diffit_train.models.cost import activation_bytes, bias_bytes, kernel_launches

    # It looks at the values that it draws.
    torch.nn.init.trunc_normal_ = lambda tensor, **_: tensor  # type: ignore[assignment]
    result = {}
    for name in RECIPES:
        recipe = load_recipe(name, [])
        train, depth = recipe.train, recipe.model.depth
        batch = train.micro_batch_size or train.batch_size // recipe.scaling.workers
        one, two = (count(recipe, depth, batch) for depth in DEPTHS)
        counted = {key: one[key] + (depth - 1) * (two[key] - one[key]) for key in one}
        counted["largest"] = two["largest"]
        with torch.device("meta"):
            model = build_model(recipe)
        launches, moved = kernel_launches(model, batch, torch.bfloat16)
        planned = activation_bytes(
            model, batch, train.activation_checkpointing, train.activation_checkpoint_every,
            torch.bfloat16,
        )  # fmt: skip
        result[name] = {
            "images": batch,
            **counted,
            "attention": stand_in.counters("attention"),
            "planned": {
                "kept": planned,
                "kernels": launches,
                "bytes": moved + bias_bytes(model, batch, 2),
            },
        }
        stand_in.reset_counters()
    print(json.dumps(result), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
