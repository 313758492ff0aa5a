"""Compiles the Triton backward kernels for NVIDIA GPUs, which needs none, and prints what they take.

``python tests/kernels/compile_triton_backward.py 90:bf16:128 86:fp32:64`` prints a line of JSON per kernel and
``capability:dtype:head_dim``, with every option of the kernels on; ``90:bf16:128:plain`` with none. Run it outside
Triton's interpreter.
"""

from __future__ import annotations

import json
import sys

import triton
from ahead_of_time import DTYPES, SHARED_KB, resource_usage
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from draftattn.kernels import triton_gradients
from draftattn.kernels.triton_backward import Tiling, choose_tilings

POINTERS = {
    "p_neg_lse": "fp32", "p_delta": "fp32", "p_counts": "i32", "p_ids": "i32", "p_query_offsets": "i32",
    "p_key_offsets": "i32", "p_shifts": "i32", "p_starts": "i32", "p_whole": "u8", "p_map": "u8",
}  # fmt: skip
KERNELS = ("query", "key", "mean")


def compile_kernel(
    kind: str, capability: int, dtype: str, head_dim: int, tiling: Tiling, options: bool
) -> dict[str, object]:
    """Registers per thread, stack bytes (spills) and shared memory of a kernel for blocks of 128 tokens."""
    kernel = getattr(triton_gradients, f"{kind}_gradient_kernel")
    constants = dict(
        D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), BLOCK_L=128,
        BLOCK_M=tiling.rows, BLOCK_N=tiling.columns, BLOCK_R=tiling.columns,
        TILES_M=triton.cdiv(128, tiling.rows), TILES_N=triton.cdiv(128, tiling.columns),
        PACK=1, DESCRIPTORS=capability >= 90 and dtype != "fp32",
        CAUSAL=options, SHIFTED=options, WINDOW=options, STARTS=options, WHOLE=options, RESIDUAL=options,
    )  # fmt: skip
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    # of a mean's gradients, sums in float32
    pointers = POINTERS | (dict(p_dk="fp32", p_dv="fp32") if kind == "mean" else {})
    signature, attributes = {}, {}
    for index, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("scale"):
            signature[name] = "fp32"
        else:
            signature[name] = "*" + pointers.get(name, dtype) if name.startswith("p_") else "i32"
            if name.startswith(("p_", "stride_")):
                attributes[(index,)] = [["tt.divisibility", 16]]
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs, attributes)
    launch = dict(num_warps=tiling.num_warps, num_stages=tiling.num_stages)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
    registers, stack = resource_usage(compiled.asm["cubin"])
    return dict(
        kernel=kind,
        capability=capability,
        dtype=dtype,
        head_dim=head_dim,
        tiling=tuple(tiling),
        registers=registers,
        stack_bytes=stack,
        shared_kb=compiled.metadata.shared / 1024,
    )


if __name__ == "__main__":
    for job in sys.argv[1:]:
        capability, dtype, head_dim, *plain = job.split(":")
        tilings = choose_tilings(DTYPES[dtype], int(head_dim), SHARED_KB[int(capability)] * 1024)
        for kind in KERNELS[: 2 if plain else 3]:
            tiling = tilings.query if kind == "query" else tilings.key
            result = compile_kernel(kind, int(capability), dtype, int(head_dim), tiling, options=not plain)
            print(json.dumps(result), flush=True)
