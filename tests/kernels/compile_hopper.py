"""Compiles the Hopper kernel, which needs no GPU, and prints what it takes.

``python tests/kernels/compile_hopper.py bf16:128 fp16:64:causal,residual,lse`` prints a line of JSON per
``dtype:head_dim:options``. Run it outside Triton's interpreter.
"""

from __future__ import annotations

import json
import sys

import triton
from ahead_of_time import dump, resource_usage
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from draftattn.kernels.hopper import attention_forward_kernel, choose_stages

POINTERS = {"p_lse": "fp32", "p_map": "u8"}


def compile_kernel(dtype: str, head_dim: int, options: tuple[str, ...] = ()) -> dict[str, object]:
    """Stack bytes (spills), shared memory, and the instructions that decide whether softmax overlaps with P·V.

    ``overlapped`` is the least number of exponentials that a consumer's loop over tiles takes while the product of
    probabilities and values runs, ``spilled`` the most words it then moves from or to the stack.
    """
    constants = dict(
        STAGES=choose_stages(head_dim),
        CAUSAL="causal" in options,
        RESIDUAL="residual" in options,
        RETURN_LSE="lse" in options,
        FLIP="flip" in options,
    )
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    names = attention_forward_kernel.arg_names
    signature, attributes = {}, {}
    for index, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("d_"):
            signature[name] = f"tensordesc<{dtype}[1,1,{64 if name == 'd_q' else 128},{head_dim}],{layout!r}>"
        elif name.startswith("p_"):
            signature[name] = "*" + (dtype if name == "p_out" else POINTERS.get(name, "i32"))
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if "scale" in name else "i32"
    constants_by_index = {(names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(attention_forward_kernel, signature, constants_by_index, attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4))
    cubin = kernel.asm["cubin"]
    assembly = dump(cubin, "-sass")
    return dict(
        dtype=dtype,
        head_dim=head_dim,
        options=options,
        stack_bytes=resource_usage(cubin)[1],
        shared_kb=kernel.metadata.shared / 1024,
        overlapped=min(_count_between_waits("MUFU.EX2", assembly), default=0),
        spilled=max(_count_between_waits("STL", assembly) + _count_between_waits("LDL", assembly), default=0),
    )


def _count_between_waits(instruction: str, assembly: str) -> list[int]:
    """Instructions between a wait that leaves one product in flight and the next for all, in the loops over tiles.

    Each of the two consumers has two such places: where a row begins, then the loop. The loops count.
    """
    between: list[int] = []
    open_wait = False
    for line in assembly.splitlines():
        if "DEPBAR.LE gsb0, 0x1" in line and not open_wait:
            between.append(0)
            open_wait = True
        elif "DEPBAR.LE gsb0, 0x0" in line:
            open_wait = False
        elif open_wait and instruction in line:
            between[-1] += 1
    return between[1::2]


if __name__ == "__main__":
    for job in sys.argv[1:]:
        dtype, head_dim, *options = job.split(":")
        names = tuple(options[0].split(",")) if options else ()
        print(json.dumps(compile_kernel(dtype, int(head_dim), names)), flush=True)
