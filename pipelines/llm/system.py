"""What a sparse attention system is to the rest: settings, and the attention of one call."""

from __future__ import annotations

import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from draftattn.errors import DraftAttentionWarning, InputError
from draftattn.kernels.block_mask import BlockMask
from draftattn.pipelines.llm.density import DensityRecorder
from draftattn.pipelines.llm.options import checked_options
from draftattn.pipelines.llm.ranges import TokenRanges


@dataclass(frozen=True)
class SystemConfig:
    """Settings that every system has.

    Args:
        dense_len: sequences of at most this many keys are computed densely, for sparsity does not pay there. Said once.
        dense_layers: layers that stay dense; negative numbers count from the end.
    """

    dense_len: int = 0
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # of every subclass, too; a list is what a command line or a JSON file gives
        for name, value in checked_options(self).items():
            object.__setattr__(self, name, value)
        if self.dense_len < 0:
            raise InputError(f"dense_len is {self.dense_len}; it must not be negative")


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Attention of one layer over sequences of one length, without padding. Query ``i`` sees keys up to its own.

    Args:
        query: ``[B, N, H, D]``, after rotary embedding; any strides with a contiguous last dimension.
        key: ``[B, K, H_kv, D]``, cached keys included: the last query stands at the last key.
        value: ``[B, K, H_kv, D]``.
        scale: factor of the scores.
        layer: number of the layer.
        module: the model's attention module.
        items: batch indices of these sequences in the model's batch; None where they are all of it.
        first_query: position of the first query in the model's (padded) queries.
        cache: the cache that the layer was called with, or None.
        recorder: takes the mask's density where the user asked for it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    layer: int
    module: nn.Module
    items: tuple[int, ...] | None = None
    first_query: int = 0
    cache: Any = None
    recorder: DensityRecorder | None = None

    @property
    def num_queries(self) -> int:
        """N."""
        return self.query.shape[1]

    @property
    def num_keys(self) -> int:
        """K, cached keys included."""
        return self.key.shape[1]

    @property
    def query_offset(self) -> int:
        """Key position of the first query."""
        return self.num_keys - self.num_queries

    def take(self, x: Tensor) -> Tensor:
        """The part of a tensor ``[B_model, N_model, ...]`` that belongs to the queries of this call."""
        if self.items is not None:
            x = x[list(self.items)]
        return x[:, self.first_query : self.first_query + self.num_queries]

    def record(self, mask: BlockMask) -> None:
        """Notes the causal density of a mask; costs nothing unless the user asked for it."""
        if self.recorder is not None:
            self.recorder.record(self.layer, mask, self.num_queries, self.num_keys, self.query.shape[0])


class AttentionSystem(ABC):
    """One way to compute the attention of a language model. A subclass says in ``attend`` how.

    The rest has answers for most systems: `attach` and `detach` install what a system needs beyond the attention
    function, `serves` says which calls stay dense, and `mask` and `forward` may be replaced by a system whose keys do
    not stand at their positions, such as one with a cache that evicts.

    Args:
        config: the settings, of the class ``config_class``.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[SystemConfig]] = SystemConfig
    sparse_decode: ClassVar[bool] = False  # whether calls with a single query are served, or stay dense

    def __init__(self, config: Any) -> None:
        self.config = config
        self.recorder: DensityRecorder | None = None
        self.caches: dict[int, Callable[[], Any]] = {}  # the cache that each layer was called with last, weakly
        self._said: set[str] = set()

    def attach(self, model: nn.Module, layers: dict[int, nn.Module]) -> None:  # noqa: B027
        """Installs hooks or parameters on a model's attention modules, by layer. Checks what it needs first."""

    def detach(self) -> None:  # noqa: B027
        """Undoes `attach` without a trace."""

    @abstractmethod
    def attend(self, call: AttentionCall) -> Tensor:
        """The output ``[B, N, H, D]`` of a call that `serves` accepted."""

    def mask_of(self, call: AttentionCall) -> BlockMask | None:
        """The blocks that a call attends to; None where a system is more than a block mask."""
        return None

    def serves(self, call: AttentionCall) -> bool:
        """Whether `attend` computes a call; if not, it is computed densely."""
        if call.num_queries == 1 and not self.sparse_decode:
            return False
        if call.num_keys <= self.config.dense_len:
            self.say_once(
                f"{self.name}: sequences of up to {self.config.dense_len} tokens stay dense, where sparsity does not "
                "pay; dense_len=0 makes them sparse"
            )
            return False
        return True

    def say_once(self, message: str) -> None:
        """Warns, the first time only."""
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, DraftAttentionWarning, stacklevel=_level_of_caller())

    def mask(self, request: dict[str, Any]) -> Any:
        """What the layers get as ``attention_mask``, from the keyword arguments of transformers' mask functions."""
        from draftattn.pipelines.llm.attention import token_ranges

        return token_ranges(**request)

    def forward(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: TokenRanges | Tensor | None,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        """The attention function: ``[B, H, N, D]`` inputs as transformers gives them, output ``[B, N, H, D]``."""
        from draftattn.pipelines.llm.attention import attend_in_groups

        return attend_in_groups(self, module, query, key, value, mask, scale, sliding_window)


def _level_of_caller() -> int:
    """The ``stacklevel``, for the function that asks, of the line that called the model."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in ("draftattn", "transformers", "torch"):
        frame, level = frame.f_back, level + 1
    return level
