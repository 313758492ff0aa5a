"""Training-free sparse prefill: mask policies that serve prompts, while decoding stays dense."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from draftattn.kernels.api import BlockMeans, block_sparse_attention
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.pooling import PoolRequest, pool_together
from draftattn.pipelines.llm.draft_prefill import DraftPrefillConfig, DraftRows
from draftattn.pipelines.llm.flexprefill import FlexPrefillConfig, FlexPrefillPolicy
from draftattn.pipelines.llm.inputs import CausalInputs, CausalPolicy
from draftattn.pipelines.llm.system import AttentionCall, AttentionSystem
from draftattn.pipelines.llm.vertical_slash import VerticalSlashConfig, VerticalSlashPolicy
from draftattn.pipelines.llm.xattention import XAttentionConfig, XAttentionPolicy
from draftattn.policy import CallContext


class PrefillSystem(AttentionSystem):
    """Attention over the blocks that a mask policy chooses. A subclass names the policy and its configuration."""

    policy_class: ClassVar[Any]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.policy: CausalPolicy = self.policy_class(config)

    def mask_of(self, call: AttentionCall) -> BlockMask:
        """See `AttentionSystem.mask_of`."""
        inputs = CausalInputs(call.query.detach(), call.key.detach(), call.value.detach(), self.config.block_size)
        return self.policy(inputs, CallContext(layer=call.layer), call.scale)

    def attend(self, call: AttentionCall) -> Tensor:
        """See `AttentionSystem.attend`."""
        mask = self.mask_of(call)
        call.record(mask)
        return block_sparse_attention(
            call.query,
            call.key,
            call.value,
            mask,
            scale=call.scale,
            causal=True,
            residual=self.residual_of(call, mask),
        )

    def residual_of(self, call: AttentionCall, mask: BlockMask) -> BlockMeans | None:
        """What skipped blocks contribute through; None where they are dropped."""
        return None


class DraftPrefill(PrefillSystem):
    """See `DraftPrefillConfig`."""

    name, config_class, policy_class = "draft", DraftPrefillConfig, DraftRows

    def residual_of(self, call: AttentionCall, mask: BlockMask) -> BlockMeans | None:
        """See `PrefillSystem.residual_of`."""
        if not self.config.residual:
            return None
        requests = [PoolRequest(x, mask.key_offsets, rounded=True) for x in (call.key, call.value)]
        key, value = (pooled.rounded for pooled in pool_together(requests, mask.block_size))
        assert key is not None
        assert value is not None
        return BlockMeans(key, value)


class XAttention(PrefillSystem):
    """See `XAttentionConfig`."""

    name, config_class, policy_class = "xattention", XAttentionConfig, XAttentionPolicy


class MInference(PrefillSystem):
    """See `VerticalSlashConfig`."""

    name, config_class, policy_class = "minference", VerticalSlashConfig, VerticalSlashPolicy


class FlexPrefill(PrefillSystem):
    """See `FlexPrefillConfig`."""

    name, config_class, policy_class = "flexprefill", FlexPrefillConfig, FlexPrefillPolicy
