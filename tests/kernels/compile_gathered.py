"""Compiles the kernels of gathered queries for NVIDIA GPUs, which needs none, and prints what they take.

``python tests/kernels/compile_gathered.py choose:90:bf16:128 gather:86:fp16:64`` prints a line of JSON per
``kernel:capability:dtype:head_dim``. The kernels are ``means``, ``choose``, ``choose-many`` (more chunks than a tile
holds), ``place``, ``gather``, ``lists`` and ``merge``. Run it outside Triton's interpreter.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from ahead_of_time import DTYPES, resource_usage
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from draftattn.kernels import triton_gathered_choice, triton_gathered_merge, triton_gathered_queries

GROUP, SLOTS = 4, 11
TYPES = {"p_own_lse": "fp32", "p_part_lses": "fp32"}
INT32 = ("p_choice", "p_members", "p_place", "p_counts", "p_starts", "p_offsets", "p_ids")


def kernel_and_constants(name: str, dtype: str, head_dim: int) -> tuple[Any, dict[str, Any], int]:
    """A kernel with its constants and warps for a call of 127 chunks, or of 1023."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    parts, step = triton_gathered_choice._PARTS[DTYPES[dtype]]
    channels = dict(D=head_dim, BLOCK_D=block_d)
    rows = dict(GROUP=GROUP, SLOTS=SLOTS, **channels)
    match name:
        case "means":
            constants = dict(BLOCK_N=8192 // block_d, PARTS=parts, STEP=step, **channels)
            return triton_gathered_choice.chunk_means_kernel, constants, 4
        case "choose" | "choose-many":
            num_chunks = 127 if name == "choose" else 1023
            tile = triton_gathered_choice.choose_tile(DTYPES[dtype], head_dim, num_chunks)
            constants = dict(BLOCK_R=tile.rows, BLOCK_C=tile.columns, BLOCK_S=16, TILE=min(32, tile.rows))
            constants |= dict(SINGLE=num_chunks <= tile.columns, PARTS=parts, STEP=step, FORCE_FIRST=False, **rows)
            return triton_gathered_choice.choose_chunks_kernel, constants, tile.num_warps
        case "place":
            return triton_gathered_choice.place_kernel, dict(SLOTS=SLOTS, TILE=32, BLOCK=256), 4
        case "gather":
            return triton_gathered_queries.gather_kernel, dict(BLOCK_R=4096 // block_d, **rows), 4
        case "lists":
            return triton_gathered_queries.lists_kernel, dict(BLOCK_SIZE=128, BLOCK=256), 4
        case _:
            return triton_gathered_merge.gathered_merge_kernel, dict(BLOCK_R=4096 // block_d, **rows), 8


def compile_kernel(name: str, capability: int, dtype: str, head_dim: int) -> triton.compiler.CompiledKernel:
    kernel, constants, num_warps = kernel_and_constants(name, dtype, head_dim)
    signature, attributes = {}, {}
    for index, parameter in enumerate(kernel.params):
        argument = parameter.name
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.startswith("p_"):
            signature[argument] = "*" + ("i32" if argument in INT32 else TYPES.get(argument, dtype))
        else:
            signature[argument] = "i32"
        if argument.startswith(("p_", "stride_")) and not parameter.do_not_specialize and argument not in constants:
            attributes[(index,)] = [["tt.divisibility", 16]]
    indices = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(kernel, signature, indices, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(num_warps=num_warps))


if __name__ == "__main__":
    for job in sys.argv[1:]:
        name, capability, dtype, head_dim = job.split(":")
        compiled = compile_kernel(name, int(capability), dtype, int(head_dim))
        registers, stack = resource_usage(compiled.asm["cubin"])
        result = dict(job=job, registers=registers, stack_bytes=stack, shared_kb=compiled.metadata.shared / 1024)
        print(json.dumps(result), flush=True)
