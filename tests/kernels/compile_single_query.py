"""Compiles the kernels of single-query scores for NVIDIA GPUs, which needs none, and prints what they take.

``python tests/kernels/compile_single_query.py logits:90:bf16:128 maxima:86:fp32:64`` prints a line of JSON per
``kernel:capability:dtype:head_dim``. The kernels are ``logits`` and ``maxima``. Run it outside Triton's interpreter.
"""

from __future__ import annotations

import json
import sys

import triton
from ahead_of_time import resource_usage
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from draftattn.kernels import triton_single_query_scores

GROUP, BLOCK_WIDTH = 4, 4


def compile_kernel(name: str, capability: int, dtype: str, head_dim: int) -> triton.compiler.CompiledKernel:
    if name == "logits":
        kernel, num_warps = triton_single_query_scores.single_query_logits_kernel, 4
        constants = dict(GROUP=GROUP, ROWS=16, D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim))
        constants |= dict(BLOCK_N=32 if dtype == "fp32" else 64)
    else:
        kernel, num_warps = triton_single_query_scores.single_query_maxima_kernel, 2
        constants = dict(GROUP=GROUP, ROWS=GROUP, BLOCK_WIDTH=BLOCK_WIDTH, KEY_WIDTH=2, BLOCK_J=64, BLOCK_P=64)
    signature, attributes = {}, {}
    for index, parameter in enumerate(kernel.params):
        argument = parameter.name
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.startswith("p_"):
            signature[argument] = "*" + (dtype if argument in ("p_q", "p_k") else "fp32")
        else:
            signature[argument] = "fp32" if argument.startswith("scale") else "i32"
        if argument.startswith(("p_", "stride_")):
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
