"""CUDA devices for torch's CPU build.

After `install`, tensors say `cuda:N`, operations on them run the CPU's kernels on the same memory,
mixed devices raise, and `counters` tells what a GPU would have waited for. NCCL is gloo.
`torch.compile` traces with AOTAutograd and generates no code.

What this cannot show: NCCL, races of streams, numerics of cuBLAS and cuDNN, fragmentation of
memory, speed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import types
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_suffix(".cpp")
DEVICES = 8
H100 = {
    "name": "NVIDIA H100 80GB HBM3",
    "major": 9,
    "minor": 0,
    "total_memory": 85_029_158_912,
    "multi_processor_count": 132,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "regs_per_multiprocessor": 65_536,
    "warp_size": 32,
    "L2_cache_size": 52_428_800,
    "shared_memory_per_block": 49_152,
    "shared_memory_per_block_optin": 232_448,
    "shared_memory_per_multiprocessor": 233_472,
    "gcnArchName": "",
}


def missing() -> str | None:
    """Why there can be no stand-in on this machine; None if there can."""
    if shutil.which("g++") is None:
        return "g++, which builds the stand-in for CUDA, is not installed"
    if not _torch_version().endswith("+cpu"):
        return f"torch {_torch_version()} is not a CPU build"
    return None


def _torch_version() -> str:
    return metadata.version("torch")


def library() -> Path:
    """The shared library, built on first use with this torch (20 s), then kept for the user."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    include, libraries = (Path(spec.origin).parent / name for name in ("include", "lib"))
    # It finds torch's libraries where it was linked to them.
    built_for = f"{_torch_version()} {libraries}".encode()
    key = hashlib.sha256(SOURCE.read_bytes() + built_for).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"diffit-rehearsal-{os.getuid()}"
    file = folder / f"stand-in-{key}.so"
    if file.exists():
        return file
    folder.mkdir(mode=0o700, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    command = ["g++", "-O1", "-shared", "-fPIC", "-std=c++20", str(SOURCE), "-o", str(unfinished)]
    command += [f"-I{include}", f"-I{include}/torch/csrc/api/include"]
    command += [f"-L{libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}"]
    subprocess.run(command, check=True)
    unfinished.replace(file)
    return file


@functools.cache
def _library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library()))
    loaded.stand_in_allocated.restype = loaded.stand_in_peak.restype = ctypes.c_long
    return loaded


def reset_counters() -> None:
    """Count from zero."""
    _library().stand_in_reset()


def counters(*kinds: str) -> dict[str, int]:
    """What was counted since the last reset, of the kinds that a name begins with:

    operation:NAME; product:NAME:DTYPE of matrix products, convolutions and attention; read:NAME by
    the host; to_host:async, to_host:blocking:BYTES and the same of to_device; sync, the host
    waiting for a stream, event or device; collective:NAME:DTYPE:BYTES; attention:FACTS.
    """
    buffer = ctypes.create_string_buffer(1 << 20)
    _library().stand_in_counters(buffer, len(buffer))
    pairs = (line.split("\t") for line in buffer.value.decode().splitlines())
    return {name: int(value) for name, value in pairs if name.startswith(kinds or "")}


def install(compile_backend: str | None = "aot_eager") -> None:
    """Give this process its CUDA devices, before it imports torch.

    Args:
        compile_backend: of `torch.compile`; None for the one that is asked for.
    """
    assert "torch" not in sys.modules, "install the stand-in before importing torch"
    assert _library().stand_in_install() == 1
    import torch

    _replace_cuda(torch)
    _replace_nccl(torch)
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign]
    # Copies of CUDA tensors are made through the storage, which belongs to two devices here.
    for kind in (torch.Tensor, torch.nn.Parameter):
        kind.__deepcopy__ = functools.partialmethod(_deepcopy, kind.__deepcopy__)  # type: ignore
    if compile_backend is not None:
        compiled = torch.compile

        def traced(model: Any = None, **options: Any) -> Any:
            options = {k: v for k, v in options.items() if k not in ("mode", "options")}
            options["backend"] = compile_backend
            return compiled(model, **options)

        torch.compile = traced  # type: ignore[assignment]


def _deepcopy(self: Any, original: Any, memo: dict[int, Any]) -> Any:
    if not self.is_cuda or not self.is_leaf:
        return original(self, memo)
    if id(self) not in memo:
        values = self.detach().clone()
        memo[id(self)] = (
            type(self)(values, self.requires_grad)
            if type(self).__name__ == "Parameter"
            else values.requires_grad_(self.requires_grad)
        )
    return memo[id(self)]


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _library().stand_in_count(b"sync")

    def elapsed_time(self, other: Any) -> float:
        return 1.0


class _Stream:
    cuda_stream = 0

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device, self.priority = device, priority

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _library().stand_in_count(b"sync")

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()


@contextlib.contextmanager
def _on_stream(_: Any) -> Iterator[None]:
    yield


def _replace_cuda(torch: Any) -> None:
    lib = _library()
    stream = _Stream()
    properties = types.SimpleNamespace(**H100)

    def set_device(device: Any) -> None:
        index = device if isinstance(device, int) else torch.device(device).index
        if not 0 <= index < DEVICES:
            raise RuntimeError(f"CUDA error: invalid device ordinal {index}")
        lib.stand_in_set_device(index)

    def exchange_device(index: int) -> int:
        before = lib.stand_in_device()
        if index >= 0:
            lib.stand_in_set_device(index)
        return int(before)

    def always(value: Any) -> Any:
        return lambda *_, **__: value

    # Functions each of its own: Dynamo tells them apart by identity.
    replaced = {
        "is_available": always(True),
        "_is_compiled": always(True),
        "is_initialized": always(True),
        "init": always(None),
        "_lazy_init": always(None),
        "device_count": always(DEVICES),
        "current_device": lambda: int(lib.stand_in_device()),
        "set_device": set_device,
        "_exchange_device": lambda index: exchange_device(index),
        "_maybe_exchange_device": lambda index: exchange_device(index),
        "get_device_properties": always(properties),
        "get_device_name": always(H100["name"]),
        "get_device_capability": always((9, 0)),
        "get_arch_list": always(["sm_90"]),
        "get_gencode_flags": always(""),
        "can_device_access_peer": always(True),
        "is_bf16_supported": always(True),
        "is_current_stream_capturing": always(False),
        "mem_get_info": always((H100["total_memory"],) * 2),
        "memory_allocated": lambda *_: lib.stand_in_allocated(),
        "memory_reserved": lambda *_: lib.stand_in_allocated(),
        "max_memory_allocated": lambda *_: lib.stand_in_peak(),
        "max_memory_reserved": lambda *_: lib.stand_in_peak(),
        "reset_peak_memory_stats": lambda *_: lib.stand_in_reset_peak(),
        "reset_max_memory_allocated": lambda *_: lib.stand_in_reset_peak(),
        "memory_stats": lambda *_: defaultdict(int),
        "empty_cache": always(None),
        "ipc_collect": always(None),
        "synchronize": lambda *_: lib.stand_in_count(b"sync"),
        "utilization": always(0),
        "Event": _Event,
        "Stream": _Stream,
        "ExternalStream": _Stream,
        "current_stream": always(stream),
        "default_stream": always(stream),
        "set_stream": always(None),
        "stream": _on_stream,
        "manual_seed": always(None),
        "manual_seed_all": always(None),
        "seed": always(None),
        "seed_all": always(None),
        "initial_seed": lambda: torch.initial_seed(),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch._C._cuda_getDeviceCount = always(DEVICES)
    torch._C._cuda_getCurrentRawStream = always(0)
    torch._C._cuda_isInBadFork = False
    # Classes and functions that only a CUDA build has, and that imports mention.
    for name in (
        "_cuda_CUDAAllocator",
        "_cuda_CUDAAllocator_AllocatorState",
        "_cuda_checkPoolLiveAllocations",
    ):
        if not hasattr(torch._C, name):
            setattr(torch._C, name, type(name, (), {}))
    torch.version.cuda = "13.0"
    torch.backends.cuda.is_built = always(True)
    import torch.cuda.amp.common as amp
    import torch.cuda.nvtx as nvtx

    amp.amp_definitely_not_available = always(False)
    names = ("rangePushA", "rangePop", "rangeStartA", "rangeEnd", "markA")
    nvtx._nvtx = types.SimpleNamespace(**{name: always(0) for name in names})


def _replace_nccl(torch: Any) -> None:
    dist = torch.distributed
    start = dist.init_process_group

    def init_process_group(backend: str | None = None, *args: Any, **options: Any) -> Any:
        if backend is None or "nccl" in backend:
            backend = "cpu:gloo,cuda:gloo"
        return start(backend, *args, **options)

    dist.init_process_group = dist.distributed_c10d.init_process_group = init_process_group
    dist.is_nccl_available = lambda: True
