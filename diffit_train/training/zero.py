"""What ZeRO has no public name for: which slices a rank owns, and the norm before a step.

Every private name of DeepSpeed that this package uses is in this file. Seen in DeepSpeed 0.19.8:

| name (of the optimizer, unless it says otherwise) | stages | without it |
|---|---|---|
| `bit16_groups`, a parameter's `_hp_mapping` | 1, 2 | no checkpoint: owned slices are unknown |
| `single_partition_of_fp32_groups` | 1, 2 | no checkpoint: master weights are unknown |
| `fp16_groups`, a parameter's `partition_numel`, `ds_numel` | 3 | as above |
| `fp32_partitioned_groups_flat` | 3 | as above |
| `update_lp_params` | 1, 2 | a loaded checkpoint does not reach the model |
| `_reassign_or_swap_out_partitioned_parameters`, `persistent_parameters` | 3 | as above |
| `scaled_global_norm`, `check_overflow` | 1, 2 | no step is skipped for its loss or norm |
| `_get_norm_groups` | 3 | as above |
| `overflow` | 1 to 3 | a skipped step counts as taken |
| `deepspeed.ops.__compatible_ops__` | all | the first start on CPUs compiles for a minute |

`tests/training/test_zero.py` has a test per row.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffit_train.runs.checkpoints import Slice


@dataclass(frozen=True)
class FlatSlice:
    """A slice of a parameter, `start` elements into the flat tensor `flat` of fp32 masters."""

    slice: Slice
    flat: Tensor
    start: int


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, which picks its accelerator when it is imported, without its log lines."""
    # A CPU run must not pick up an unused GPU.
    os.environ["DS_ACCELERATOR"] = "cpu" if device.type == "cpu" else device.type
    with _absent("mlflow"):
        import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # With a cold extension cache, DeepSpeed would spend most of a minute compiling a shared-memory
    # all-reduce for CPUs; gloo is good enough.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def _absent(module: str) -> Iterator[None]:
    """Let imports in the block do without an optional module, unless it is imported already.

    DeepSpeed's autotuner, which nothing here uses, would spend a second on MLflow.
    """
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


class Zero:
    """ZeRO stage 1, 2 or 3 of an initialized DeepSpeed engine.

    Args:
        optimizer: as `deepspeed.initialize` returns it.
        names: of the trainable parameters.
    """

    def __init__(
        self, optimizer: Any, stage: int, rank: int, names: Mapping[nn.Parameter, str]
    ) -> None:
        self.optimizer, self.stage, self.rank, self.names = optimizer, stage, rank, names

    def owned(self) -> Iterator[FlatSlice]:
        """The slices that this rank owns; all ranks together cover every parameter."""
        return self._owned_of_parameters() if self.stage == 3 else self._owned_of_groups()

    def _owned_of_groups(self) -> Iterator[FlatSlice]:
        """Stages 1 and 2: a group's parameters concatenated and split into one part per rank."""
        masters = self.optimizer.single_partition_of_fp32_groups
        for group, flat in zip(self.optimizer.bit16_groups, masters, strict=True):
            for parameter in group:
                part = parameter._hp_mapping
                if part is None:  # entirely on other ranks
                    continue
                source = part.lp_fragment_address
                slice_ = Slice(self.names[parameter], source.start, source.numel)
                yield FlatSlice(slice_, flat, part.hp_fragment_address.start)

    def _owned_of_parameters(self) -> Iterator[FlatSlice]:
        """Stage 3: each parameter split into one part per rank, the last ones padded."""
        flats = self.optimizer.fp32_partitioned_groups_flat
        for group, flat in zip(self.optimizer.fp16_groups, flats, strict=True):
            start = 0
            for parameter in group:
                size = parameter.partition_numel()
                offset = self.rank * size
                length = min(size, parameter.ds_numel - offset)
                if length > 0:
                    yield FlatSlice(Slice(self.names[parameter], offset, length), flat, start)
                start += size

    def publish(self) -> None:
        """Make the weights that the model computes with from all ranks' masters (collective)."""
        if self.stage < 3:
            self.optimizer.update_lp_params()
            return
        for group in range(len(self.optimizer.fp32_partitioned_groups_flat)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if persistent := self.optimizer.persistent_parameters:
            persistent[0].all_gather(persistent)

    def check_norm(self, check: Callable[[Tensor], Tensor]) -> None:
        """Let `check` replace the norm of each step's gradients, as an infinite one skips it.

        DeepSpeed skips a step with a non-finite norm on all ranks, and clears its gradients.

        Args:
            check: gets the norm on the device, negative or not finite if a gradient is not finite.
        """
        if self.stage < 3:
            norm = self.optimizer.scaled_global_norm
            self.optimizer.scaled_global_norm = lambda *args, **kwargs: check(norm(*args, **kwargs))
            # In bf16, DeepSpeed looks for non-finite gradients and skips the step before it
            # computes the norm, so that `check` would never see it. The norm also shows them.
            self.optimizer.check_overflow = lambda *args, **kwargs: None
        else:
            groups = self.optimizer._get_norm_groups
            self.optimizer._get_norm_groups = lambda: [check(_total_norm(groups()))]

    @property
    def skipped(self) -> bool:
        """Whether the last step was skipped."""
        return bool(self.optimizer.overflow)


def _total_norm(norms: list[Any]) -> Tensor:
    """The norm of all groups together; not finite or negative if one of them is."""
    values = torch.stack([torch.as_tensor(n, dtype=torch.float32) for n in norms])
    bad = (~torch.isfinite(values) | (values < 0)).any()
    return torch.where(bad, math.inf, torch.linalg.vector_norm(values))
