"""Compiles the decode and probability kernels for NVIDIA GPUs, which needs none, and prints what they take.

``python tests/kernels/compile_decode.py decode:90:bf16:128 max:86:fp32:64`` prints a line of JSON per
``kernel:capability:dtype:head_dim``, with every option of the kernel on; a fifth part, ``plain``, turns them off. The
kernels are ``decode``, ``max`` and ``sum``. Run it outside Triton's interpreter.
"""

from __future__ import annotations

import json
import sys

import triton
from ahead_of_time import DTYPES, SHARED_KB, resource_usage
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from draftattn.kernels import triton_decode, triton_probabilities

INT32 = ("p_counts", "p_ids", "p_query_offsets", "p_key_offsets", "p_shifts", "p_starts")
OPTIONAL = ("p_shifts", "p_whole", "p_starts", "p_mean_k", "p_mean_v", "p_map")
BLOCK_SIZE, GROUP = 128, 4


def decode_options(capability: int, dtype: str, head_dim: int, options: bool) -> tuple[object, dict, dict]:
    plan = triton_decode.choose_plan(
        DTYPES[dtype],
        head_dim,
        batch=8,
        heads=8 * GROUP,
        kv_heads=8,
        mask_heads=8,
        num_query_blocks=1,
        query_block_size=1,
        block_size=BLOCK_SIZE,
        capacity=1024,
        num_multiprocessors=132,
        shared_memory=SHARED_KB[capability] * 1024,
    )
    constants = dict(GROUP=GROUP, PACK=plan.pack, BLOCK_M=plan.rows, BLOCK_N=plan.columns, TILES_M=plan.tiles_m)
    constants |= dict(TILES_N=plan.tiles_n, ENTRIES=plan.entries, WIDTH=head_dim + 4, CAUSAL=options, WINDOW=options)
    return triton_decode.decode_kernel, constants, dict(num_warps=plan.num_warps, num_stages=plan.num_stages)


def probability_options(
    capability: int, dtype: str, head_dim: int, options: bool, maximum: bool
) -> tuple[object, dict, dict]:
    sizes = BLOCK_SIZE, BLOCK_SIZE
    tiling = triton_probabilities.choose_tiling(DTYPES[dtype], head_dim, *sizes, SHARED_KB[capability] * 1024)
    constants = dict(GROUP=GROUP, MASK_GROUP=1, BLOCK_M=tiling.rows, BLOCK_N=tiling.columns, MAXIMUM=maximum)
    constants |= dict(TILES_M=triton.cdiv(BLOCK_SIZE, tiling.rows), TILES_N=triton.cdiv(BLOCK_SIZE, tiling.columns))
    constants |= dict(CAUSAL=options, WINDOW=options)
    launch = dict(num_warps=tiling.num_warps, num_stages=tiling.num_stages)
    return triton_probabilities.block_probabilities_kernel, constants, launch


def compile_kernel(
    name: str, capability: int, dtype: str, head_dim: int, options: bool
) -> tuple[triton.compiler.CompiledKernel, dict]:
    if name == "decode":
        kernel, constants, launch = decode_options(capability, dtype, head_dim, options)
    else:
        kernel, constants, launch = probability_options(capability, dtype, head_dim, options, name == "max")
    constants |= dict(D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim))
    if not options:
        constants |= {name: None for name in OPTIONAL if name in kernel.arg_names}
    not_divisible = set(triton_decode._ANY_VALUE + triton_probabilities._ANY_VALUE)
    signature, attributes = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument == "scale_log2":
            signature[argument] = "fp32"
        elif argument.startswith("p_"):
            element = "i32" if argument in INT32 else "u8" if argument in ("p_whole", "p_map") else dtype
            signature[argument] = "*fp32" if argument in ("p_partial", "p_lse", "p_out") else "*" + element
        else:
            signature[argument] = "i32"
        if argument.startswith(("p_", "stride_")) and argument not in constants and argument not in not_divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    constants = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch), launch


if __name__ == "__main__":
    for job in sys.argv[1:]:
        name, capability, dtype, head_dim, *plain = job.split(":")
        kernel, launch = compile_kernel(name, int(capability), dtype, int(head_dim), not plain)
        registers, stack = resource_usage(kernel.asm["cubin"])
        result = dict(job=job, registers=registers, stack_bytes=stack, shared_kb=kernel.metadata.shared / 1024)
        print(json.dumps(result | launch), flush=True)
