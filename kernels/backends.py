"""Which implementation serves a call, and why another cannot."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
from typing import Literal, get_args

import torch
from torch import Tensor

from draftattn.kernels.block_mask import BlockMask

BackendName = Literal["auto", "reference", "cpu", "triton", "hopper", "flex", "fa4"]

TRITON_HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def choose_backend(
    backend: BackendName,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    residual: tuple[Tensor, ...] | None = None,
    block_mask: BlockMask | None = None,
) -> BackendName:
    """The backend that will serve a call: the one asked for, or with ``"auto"`` the fastest that can.

    Without ``block_mask`` the answer is for a plain one.

    Raises:
        ValueError: if the name is unknown, or the backend asked for cannot serve, with all the reasons.
    """
    if backend not in get_args(BackendName):
        raise ValueError(f"backend is {backend!r}; choose from {', '.join(get_args(BackendName))}")
    if backend == "auto":
        candidates: tuple[BackendName, ...] = ("hopper", "triton") if query.device.type == "cuda" else ("cpu",)
        if "triton" in candidates and block_mask is not None and _has_few_queries(query, key, block_mask):
            candidates = ("triton", "hopper")
        reasons: list[str] = []
        for candidate in candidates:
            refused = reasons_against(candidate, query, key, value, residual, block_mask)
            if not refused:
                return candidate
            reasons += [f"{candidate}: {reason}" for reason in refused]
        _warn_slow("; ".join(reasons))
        return "reference"
    if reasons := reasons_against(backend, query, key, value, residual, block_mask):
        raise ValueError(f"backend {backend!r} cannot serve this call: {'; '.join(reasons)}")
    return backend


def _has_few_queries(query: Tensor, key: Tensor, block_mask: BlockMask) -> bool:
    """Whether Triton's kernel for few queries, which splits the keys, is the fastest."""
    if triton_version() is None:
        return False
    from draftattn.kernels import triton_decode

    return triton_decode.serves(query, key, block_mask)


def reasons_against(
    backend: BackendName,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    residual: tuple[Tensor, ...] | None = None,
    block_mask: BlockMask | None = None,
) -> list[str]:
    """Every reason why a backend cannot serve these tensors; empty if it can."""
    reasons: list[str] = []
    if backend == "triton":
        reasons += reasons_against_platform("triton")
        if query.device.type != "cuda" and not triton_interpreted():
            reasons.append(f"tensors are on {query.device.type}, it needs a CUDA or ROCm device")
        if query.dtype not in TRITON_DTYPES:
            reasons.append(f"dtype {query.dtype} is not fp16, bf16 or fp32")
        if _interpreter_is_wrong(query.dtype):
            reasons.append("Triton's interpreter gets bf16 products wrong")
        if query.shape[-1] not in TRITON_HEAD_DIMS:
            reasons.append(f"head_dim {query.shape[-1]} is not one of {TRITON_HEAD_DIMS}")
        reasons += _reasons_of_gpu_kernels(query, key, value)
    if backend == "hopper":
        reasons += reasons_against_hopper(query, key, value, residual)
        if block_mask is not None and block_mask.window is not None:
            reasons.append("it knows no sliding window")
    if backend == "flex":
        from draftattn.kernels.flex import reasons_against_flex

        reasons += reasons_against_flex(query, key, value, residual)
    if backend == "fa4":
        from draftattn.kernels.fa4 import reasons_against_fa4

        reasons += reasons_against_fa4(query, key, value, residual, block_mask)
    if backend == "cpu" and query.device.type != "cpu":
        reasons.append(f"tensors are on {query.device.type}, it needs the CPU")
    return reasons


def reasons_against_hopper(
    query: Tensor, key: Tensor, value: Tensor, residual: tuple[Tensor, ...] | None = None
) -> list[str]:
    """Every reason why the Hopper kernel cannot serve these tensors: it reads them through TMA, without copies."""
    reasons = reasons_against_platform("hopper")
    if query.device.type != "cuda":
        reasons.append(f"tensors are on {query.device.type}, it needs a Hopper GPU")
    elif torch.version.hip or torch.cuda.get_device_capability(query.device)[0] != 9:
        reasons.append(f"{torch.cuda.get_device_name(query.device)} is not a Hopper GPU (compute capability 9.0)")
    if query.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"dtype {query.dtype} is not fp16 or bf16")
    if query.shape[-1] not in (64, 128):
        reasons.append(f"head_dim {query.shape[-1]} is not 64 or 128")
    means = (("residual.key", residual[0]), ("residual.value", residual[1])) if residual is not None else ()
    for name, tensor in (("query", query), ("key", key), ("value", value), *means):
        steps = [stride for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if size > 1]
        if tensor.data_ptr() % 16 or any(step % 8 for step in steps):
            reasons.append(f"{name} is not aligned to 16 bytes in every dimension")
        if 0 in steps:
            reasons.append(f"{name} is expanded (a stride is 0)")
    return reasons + _reasons_of_gpu_kernels(query, key, value)


def _reasons_of_gpu_kernels(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    return [
        f"the last dimension of {name} is not contiguous"
        for name, tensor in (("query", query), ("key", key), ("value", value))
        if tensor.stride(-1) != 1
    ]


def reasons_against_platform(backend: BackendName) -> list[str]:
    """Why a backend can serve no call at all on this machine; empty if it can."""
    if backend == "fa4":
        from draftattn.kernels import fa4

        return fa4.reasons_against_platform()
    if backend not in ("triton", "hopper"):
        return []
    reasons = []
    installed = triton_version()
    if installed is None:
        reasons.append(f"the package triton is not installed (on {platform.system()})")
    elif backend == "hopper" and installed < (3, 6):
        reasons.append(f"Triton {installed[0]}.{installed[1]} is older than 3.6")
    if backend == "hopper" and triton_interpreted():
        reasons.append("Triton's interpreter does not run Gluon")
    if not torch.cuda.is_available() and not triton_interpreted():
        reasons.append("torch sees no CUDA or ROCm device")
    return reasons


@functools.cache
def triton_version() -> tuple[int, int] | None:
    """Major and minor version of the installed Triton; looked up once, for every call asks."""
    if importlib.util.find_spec("triton") is None:
        return None
    import triton  # its distribution has other names on ROCm and in nightly builds

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def triton_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter (``TRITON_INTERPRET=1``), which works without a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def _interpreter_is_wrong(dtype: torch.dtype) -> bool:
    # it multiplies the bits of bf16 as integers, in Triton 3.9
    return dtype == torch.bfloat16 and triton_interpreted()


_warned: set[str] = set()


def _warn_slow(reasons: str) -> None:
    if reasons not in _warned:
        _warned.add(reasons)
        import warnings

        warnings.warn(f"block-sparse attention runs on its slow reference backend ({reasons})", stacklevel=3)
