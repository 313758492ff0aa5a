"""Compiles the Triton forward kernel for NVIDIA GPUs, which needs none, and prints what it takes.

``python tests/kernels/compile_triton_forward.py 90:bf16:128:all 86:fp32:64:plain`` prints a line of JSON per
``capability:dtype:head_dim:options``. Options are ``plain``; ``residual``; ``all`` (causal, LSE, residual, shifts); or
``window`` (what language models ask for: windows and sinks, 4 heads of 4 tokens packed). Run it outside Triton's
interpreter.
"""

from __future__ import annotations

import json
import sys

import triton
from ahead_of_time import DTYPES, SHARED_KB, resource_usage
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from draftattn.kernels.triton_forward import Tiling, attention_forward_kernel, choose_tiling

# arguments that are left out (None), by options
RESIDUAL = {"p_mean_k", "p_mean_v", "d_mean_k", "d_mean_v", "p_map", "p_bias", "num_means"}
WINDOW = {"window", "sink", "p_whole", "p_starts"}
LEFT_OUT = {
    "plain": RESIDUAL | WINDOW | {"p_lse", "p_shifts"},
    "residual": WINDOW | {"p_lse", "p_shifts"},
    "all": WINDOW,
    "window": RESIDUAL,
}
POINTERS = {"p_lse": "fp32", "p_bias": "fp32", "p_map": "u8", "p_whole": "u8"} | dict.fromkeys(
    ("p_counts", "p_ids", "p_query_offsets", "p_key_offsets", "p_shifts", "p_starts"), "i32"
)


def compile_kernel(
    capability: int, dtype: str, head_dim: int, options: str, tiling: Tiling | None = None
) -> dict[str, object]:
    """Registers per thread, stack bytes (spills) and shared memory of the kernel for blocks of 128 tokens."""
    pack = 4 if options == "window" else 1
    rows = 16 if options == "window" else 128
    if tiling is None:
        tiling = choose_tiling(DTYPES[dtype], head_dim, rows, 128, SHARED_KB[capability] * 1024)
    descriptors = capability in (90, 100) and dtype != "fp32"
    left_out = LEFT_OUT[options] | (set() if descriptors else {"d_k", "d_v", "d_mean_k", "d_mean_v"})
    constants = dict.fromkeys(left_out) | dict(
        D=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_M=tiling.rows,
        BLOCK_N=tiling.columns,
        TILES_M=triton.cdiv(rows, tiling.rows),
        TILES_N=triton.cdiv(128, tiling.columns),
        PACK=pack,
        CAUSAL=options in ("all", "window"),
        FLIP=False,
        STAGES=tiling.num_stages,
    )
    names = attention_forward_kernel.arg_names
    signature, attributes = {}, {}
    for index, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "scale_log2":
            signature[name] = "fp32"
        elif name.startswith("d_"):
            signature[name] = f"tensordesc<{dtype}[1, 1, {tiling.columns}, {constants['BLOCK_D']}]>"
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
    registers, stack = resource_usage(kernel.asm["cubin"])
    return dict(
        capability=capability,
        dtype=dtype,
        head_dim=head_dim,
        options=options,
        tiling=tuple(tiling),
        registers=registers,
        stack_bytes=stack,
        shared_kb=kernel.metadata.shared / 1024,
    )


if __name__ == "__main__":
    for job in sys.argv[1:]:
        capability, dtype, head_dim, options = job.split(":")
        print(json.dumps(compile_kernel(int(capability), dtype, int(head_dim), options)), flush=True)
