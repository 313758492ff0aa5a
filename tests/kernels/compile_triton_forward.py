"""Compiles the Triton forward kernel for NVIDIA GPUs, which needs none, and prints what it takes.

``python tests/kernels/compile_triton_forward.py 90:bf16:128 86:fp32:64`` prints a line of JSON per
``capability:dtype:head_dim``, with every option of the kernel on. Run it outside Triton's interpreter.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from draftattn.kernels.triton_forward import attention_forward_kernel, choose_tiling

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}
POINTERS = {"p_lse": "fp32", "p_map": "u8", "p_counts": "i32", "p_ids": "i32"} | {
    "p_query_offsets": "i32",
    "p_key_offsets": "i32",
}


def compile_kernel(capability: int, dtype: str, head_dim: int, options: bool = True) -> dict[str, object]:
    """Registers per thread, stack bytes (spills) and shared memory of the kernel for blocks of 128 tokens."""
    tiling = choose_tiling(DTYPES[dtype], head_dim, 128, SHARED_KB[capability] * 1024)
    constants = dict(
        D=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_M=tiling.rows,
        BLOCK_N=tiling.columns,
        BLOCK_R=min(64, tiling.columns),
        TILES_M=triton.cdiv(128, tiling.rows),
        TILES_N=triton.cdiv(128, tiling.columns),
        CAUSAL=options,
        RESIDUAL=options,
        RETURN_LSE=options,
    )
    names = attention_forward_kernel.arg_names
    signature, attributes = {}, {}
    for index, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "scale_log2":
            signature[name] = "fp32"
        else:
            signature[name] = "*" + POINTERS.get(name, dtype) if name.startswith("p_") else "i32"
            if name.startswith(("p_", "stride_")):
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        attention_forward_kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        attributes,
    )
    launch = dict(num_warps=tiling.num_warps, num_stages=tiling.num_stages)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
    registers, stack = _resource_usage(kernel.asm["cubin"])
    return dict(
        capability=capability,
        dtype=dtype,
        head_dim=head_dim,
        tiling=tuple(tiling),
        registers=registers,
        stack_bytes=stack,
        shared_kb=kernel.metadata.shared / 1024,
    )


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    match = re.search(r"REG:(\d+) STACK:(\d+)", text.stdout)
    assert match, text.stdout
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    for job in sys.argv[1:]:
        capability, dtype, head_dim = job.split(":")
        print(json.dumps(compile_kernel(int(capability), dtype, int(head_dim))), flush=True)
