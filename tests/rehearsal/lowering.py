"""A block of the 561M model, compiled for sm_90: `python -m tests.rehearsal.lowering TOKENS`

Inductor writes the code that it would run on an H100, and ptxas of the package triton compiles
each kernel; nothing runs. The last line of output is JSON: by pass (forward, backward), launches
of Triton and of library kernels, kernels with atomic additions, and each kernel's registers and
spilled bytes.

Internals of torch 2.13 and triton 3.7 are used, which other versions may have under other names.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.rehearsal import stand_in

BATCH = 8


class _Enough(Exception):
    """The code of a pass has been written."""


def _driver() -> Any:
    """As much of a CUDA driver as a compilation asks for."""
    import torch
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int = 0) -> int:
            return 0

        def get_device_interface(self) -> Any:
            return torch.cuda

        def get_active_torch_device(self) -> Any:
            return torch.device("cuda", 0)

        def get_device_capability(self, device: int = 0) -> tuple[int, int]:
            return 9, 0

        @staticmethod
        def is_active() -> bool:
            return True

    return Driver()


def lower(tokens: int) -> dict[str, str]:
    """Inductor's code of the forward and backward pass of a block in training."""
    import torch
    from torch._inductor import compile_fx, config, graph

    from diffit_train.models.latent import Block
    from diffit_train.models.wrap import use_kernel

    config.compile_threads = 1
    config.force_disable_caches = True
    codes: dict[str, str] = {}
    current = ""

    def write(self: Any) -> Any:
        code, _ = self.codegen()
        codes[current] = getattr(code, "value", code)
        raise _Enough

    graph.GraphLowering.compile_to_module = write  # type: ignore[method-assign]
    inner = compile_fx.compile_fx_inner

    def compile_inner(module: Any, inputs: Any, **options: Any) -> Any:
        nonlocal current
        current = "backward" if options.get("is_backward") else "forward"
        try:
            inner(module, inputs, **options)
        except Exception as error:
            if not (isinstance(error, _Enough) or "_Enough" in repr(error)):
                raise
        if current == "backward":
            raise _Enough
        (results,) = (node.args[0] for node in module.graph.nodes if node.op == "output")

        def run(_: Any) -> list[Any]:
            """Results of the right shapes, from which the backward pass is traced."""
            out = []
            for node in results:
                value = getattr(node, "meta", {}).get("val")
                if isinstance(value, torch.Tensor):
                    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
                    out.append(made.to(value.device))
                else:
                    out.append(node)
            return out

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    device = torch.device("cuda", 0)
    side = int(tokens**0.5)
    block = Block(1152, 16, 4.0, side).to(device).bfloat16()
    use_kernel(block, "auto", device)
    block.compile(
        backend=lambda module, inputs: compile_fx.compile_fx(
            module, inputs, inner_compile=compile_inner
        )
    )
    x, c = (
        torch.zeros(shape, dtype=torch.bfloat16).to(device).requires_grad_()
        for shape in ((BATCH, tokens, 1152), (BATCH, 1152))
    )
    try:
        block(x, c).sum().backward()
    except Exception as error:
        if "_Enough" not in repr(error):
            raise
    return codes


def compile_kernels(code: str) -> list[dict[str, Any]]:
    """Registers and spills of each Triton kernel in Inductor's code, in its first configuration."""
    import triton
    from torch._inductor import config
    from torch._inductor.runtime import triton_helpers, triton_heuristics

    config.use_static_cuda_launcher = False
    triton_helpers.set_driver_to_gpu = lambda: triton.runtime.driver.set_active(_driver())
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    rows: list[dict[str, Any]] = []

    def precompile(self: Any, *_: Any, **__: Any) -> None:
        result = self._precompile_config(self.configs[0])
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(result.kernel.asm["ptx"])
            file.flush()
            done = subprocess.run(
                [ptxas, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
        found = {
            name: int(re.findall(pattern, done.stderr)[0])
            for name, pattern in (
                ("registers", r"Used (\d+) registers"),
                ("spilled", r"(\d+) bytes spill stores"),
            )
        }
        rows.append({"kernel": self.fn.__name__, **found})

    triton_heuristics.CachingAutotuner.precompile = precompile  # type: ignore[method-assign]
    exec(compile(code, "lowered", "exec"), {"__name__": "lowered"})
    return rows


def main() -> None:
    """Lower and compile."""
    os.environ["TRITON_BACKENDS_IN_TREE"] = "1"
    stand_in.install(compile_backend=None)
    import triton

    triton.runtime.driver.set_active(_driver())
    result = {}
    for name, code in lower(int(sys.argv[1])).items():
        kernels = re.split(r"(?=async_compile\.triton\()", code)[1:]
        result[name] = {
            "triton": len(re.findall(r"^\s+triton_\w+\.run\(", code, re.MULTILINE)),
            "library": len(re.findall(r"(?:extern_kernels|torch\.ops\.aten)\.[\w.]+\(", code)),
            "atomic": [re.findall(r"triton_\w+", k)[0] for k in kernels if "tl.atomic_add(" in k],
            "kernels": compile_kernels(code),
        }
    print(json.dumps(result), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
