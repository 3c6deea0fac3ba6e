"""Counts how often a computation waits for its device, also where the device is the CPU."""

from __future__ import annotations

import traceback
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_READS = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero")


class DeviceReads(TorchDispatchMode):
    """Counts copies to the host, and values read from tensors that were not copied to it.

    A tensor is on the host if it was copied there by `.to("cpu", copy=True)` without a cast, was
    made without any tensor as input, or was computed from such tensors only. All others are on
    the device.

    Attributes:
        where: the call stack of each read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.where: list[str] = []
        self._host_ids: dict[int, weakref.ref[Tensor]] = {}

    def _is_host(self, tensor: Tensor) -> bool:
        found = self._host_ids.get(id(tensor))
        return found is not None and found() is tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        given = [v for v in tree_iter((args, kwargs)) if isinstance(v, Tensor)]
        # `torch.tensor` of numbers begins with this call.
        on_host = name == "lift_fresh" or all(self._is_host(tensor) for tensor in given)
        to_cpu = name == "_to_copy" and kwargs.get("device") == torch.device("cpu")
        # Autograd casts on a tensor's own device, which is the CPU here.
        copied = to_cpu and kwargs.get("dtype") in (None, given[0].dtype)
        if not on_host and (name in _READS or copied):
            self.where.append(name + "".join(traceback.format_stack(limit=8)[:-1]))
        out = func(*args, **kwargs)
        if on_host or copied:
            for made in tree_iter(out):
                if isinstance(made, Tensor):
                    self._host_ids[id(made)] = weakref.ref(made)
        return out
