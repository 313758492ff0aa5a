"""Tiny language models with random weights, and batches padded on either side."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCABULARY = 64
# latent attention: values narrower than keys
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "deepseek": (DeepseekV3Config, DeepseekV3ForCausalLM, LATENT),
}


def make_tiny_model(family: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of two layers, 4 query heads and 2 key heads of 16 (Qwen3: 32) channels, in float32."""
    config_class, model_class, own = FAMILIES[family]
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,  # so large that attention is far from uniform
        **own,
        **overrides,
    }
    torch.manual_seed(seed)
    return model_class(config_class(**settings)).to(DEVICE).eval()


def random_ids(length: int, seed: int = 0) -> Tensor:
    """Token ids ``[1, length]``."""
    return torch.randint(0, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def pad_batch(sequences: list[Tensor], side: str) -> dict[str, Tensor]:
    """Sequences ``[1, n]`` as one batch padded on a side: ``input_ids``, ``attention_mask`` and ``position_ids``."""
    longest = max(sequence.shape[1] for sequence in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.long, device=DEVICE)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        length = sequence.shape[1]
        part = slice(longest - length, longest) if side == "left" else slice(0, length)
        ids[row, part], mask[row, part] = sequence[0], 1
    # as generate makes them: positions count from the first real token
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def real_rows(batch: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """Of ``[B, N, ...]`` the real tokens of every item, ``[1, n, ...]`` each."""
    return [x[row : row + 1, batch["attention_mask"][row].bool()] for row in range(len(x))]


@pytest.fixture(scope="session")
def lm() -> SimpleNamespace:
    """The functions of this file: tests in importlib mode cannot import it."""
    return SimpleNamespace(model=make_tiny_model, ids=random_ids, pad=pad_batch, real_rows=real_rows, device=DEVICE)
