"""Dense causal attention that sparse systems of language models are timed against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def uses_cudnn(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether cuDNN's attention is the yardstick: on a CUDA GPU in 16 bits, where it is the fastest in torch."""
    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)


def yardstick_name(dtype: torch.dtype, device: torch.device) -> str:
    """What the yardstick is called in a report.

    >>> yardstick_name(torch.float32, torch.device("cpu"))
    "torch's causal attention"
    """
    return "cuDNN causal attention" if uses_cudnn(dtype, device) else "torch's causal attention"


def dense_yardstick(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Callable[[], Tensor]:
    """Dense causal attention, to be called.

    Args:
        query: ``[B, N, H, D]``.
        key: ``[B, N, H_kv, D]``.
        value: ``[B, N, H_kv, D]``.
        scale: factor of the scores, ``D ** -0.5`` if None.

    Returns:
        A function that gives the output as ``[B, H, N, D]``.

    >>> query, key, value = torch.randn(3, 1, 5, 2, 16).unbind()
    >>> dense_yardstick(query, key, value)().shape
    torch.Size([1, 2, 5, 16])
    """
    if uses_cudnn(query.dtype, query.device):
        backends = [SDPBackend.CUDNN_ATTENTION]
    else:
        # never the one that writes all scores where another serves
        other = SDPBackend.EFFICIENT_ATTENTION if query.is_cuda else SDPBackend.MATH
        backends = [SDPBackend.FLASH_ATTENTION, other]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    shared = query.shape[1] != key.shape[1]

    @torch.no_grad()
    def run() -> Tensor:
        with sdpa_kernel(backends):
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=shared
            )

    if shared:
        try:
            run()
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:
            # one that knows no grouped heads gets copies, made outside the time
            group = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
            shared = False
    return run
