"""The numbers that define Native Sparse Attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from draftattn.errors import InputError
from draftattn.pipelines.llm.system import SystemConfig


@dataclass(frozen=True)
class NSAConfig(SystemConfig):
    """Native Sparse Attention: three gated branches over compressed, selected and recent keys (arXiv 2502.11089).

    *Compression*: every ``compression_stride`` tokens a block of ``compression_block`` of them becomes one key and one
    value; a query sees the blocks that lie wholly in its past. *Selection*: the probabilities of that branch, added up
    over the query heads that share a key head, score blocks of ``block_size`` tokens, and a query attends to the
    ``num_selected`` best of them, token by token. *Window*: it also attends to the last ``window`` tokens. The output
    is the sum of the three, each times a gate, ``sigmoid`` of a linear map of the layer's input.

    The defaults are the paper's. `NSAConfig.mean_pooled` is the form of flash-linear-attention.

    Args:
        compression: ``"linear"`` maps the keys of a block, as they are before the rotary embedding, and its values to
            one of each, with weights per position and key head and an offset per position for the keys; the compressed
            key is rotated to the first token of its block. ``"mean"`` averages rotated keys and values, and learns
            nothing.
        compression_block: tokens of a compressed block, a multiple of ``compression_stride``.
        compression_stride: tokens from one compressed block to the next.
        block_size: tokens of a selected block, a multiple of ``compression_stride``, at most 128.
        num_selected: blocks that a query attends to, those that are always chosen among them.
        initial_blocks: leading blocks that are always chosen.
        local_blocks: blocks that are always chosen up to the query's own, which is one of them.
        window: tokens of the window, the query's own among them; 0 leaves that branch out.
        gate_init: what the gates of compression, selection and window begin at, before the sigmoid. By default nearly
            all weight lies on the selection, which comes closest to full attention while the rest is untrained.
        weights: file of trained gates and compressions that `NSA.save` wrote; None begins untrained.
        dense_len, dense_layers: see `SystemConfig`.

    Raises:
        InputError: if a number is out of range.

    >>> NSAConfig().num_selected * NSAConfig().block_size  # tokens that a query selects
    1024
    """

    compression: Literal["linear", "mean"] = "linear"
    compression_block: int = 32
    compression_stride: int = 16
    block_size: int = 64
    num_selected: int = 16
    initial_blocks: int = 1
    local_blocks: int = 2
    window: int = 512
    gate_init: tuple[float, float, float] = (-4.0, 4.0, -4.0)
    weights: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compression_stride < 1:
            raise InputError(f"compression_stride is {self.compression_stride}; it must be at least 1")
        for name in ("compression_block", "block_size"):
            size = getattr(self, name)
            if size < 1 or size % self.compression_stride:
                raise InputError(f"{name} is {size}; it must be a multiple of compression_stride")
        if self.block_size > 128:
            raise InputError(f"block_size is {self.block_size}; a block holds at most 128 tokens")
        if self.initial_blocks < 0 or self.local_blocks < 1:
            raise InputError(
                f"initial_blocks is {self.initial_blocks} and local_blocks {self.local_blocks}; allowed are "
                "initial_blocks >= 0 and local_blocks >= 1"
            )
        if self.num_selected < self.initial_blocks + self.local_blocks:
            raise InputError(
                f"num_selected is {self.num_selected}; it counts the {self.initial_blocks + self.local_blocks} blocks "
                "that are always chosen"
            )
        if self.window < 0:
            raise InputError(f"window is {self.window}; it must not be negative")
        if len(self.gate_init) != 3:
            raise InputError(f"gate_init has {len(self.gate_init)} numbers; compression, selection and window need 3")
        object.__setattr__(self, "gate_init", tuple(float(x) for x in self.gate_init))

    @classmethod
    def mean_pooled(cls, block_size: int = 64, num_selected: int = 16, window: int = 512) -> NSAConfig:
        """The form of flash-linear-attention: mean pooling over the very blocks that are selected from.

        >>> NSAConfig.mean_pooled().compression_block
        64
        """
        return cls(
            compression="mean",
            compression_block=block_size,
            compression_stride=block_size,
            block_size=block_size,
            num_selected=num_selected,
            window=window,
        )
