"""What the ``compile_*.py`` scripts share. Compiling needs no GPU; Triton's wheel carries the tool that reads it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


def dump(cubin: bytes, what: str) -> str:
    """What ``cuobjdump`` says of a compiled kernel, such as ``-sass`` or ``--dump-resource-usage``."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and stack bytes (spills)."""
    text = dump(cubin, "--dump-resource-usage")
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert match, text
    return int(match[1]), int(match[2])
