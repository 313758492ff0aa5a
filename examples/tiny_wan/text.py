"""The text side: a tokenizer of one token per character and a random, frozen text encoder.

Some twenty captions are all the model will know; the encoder need only tell them apart.
"""

from __future__ import annotations

import string
from typing import Any

import torch
from torch import Tensor
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

MAX_SEQUENCE_LENGTH = 512


def build_tokenizer() -> T5Tokenizer:
    """A tokenizer of printable ASCII.

    >>> build_tokenizer()("a b")["input_ids"]
    [3, 4, 3, 5, 1]
    """
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\N{LOWER ONE EIGHTH BLOCK}", -2.0)]
    characters = string.ascii_letters + string.digits + string.punctuation
    return T5Tokenizer(vocab=special + [(character, -3.0) for character in characters], extra_ids=0)


def build_text_encoder(vocab_size: int, seed: int = 0) -> UMT5EncoderModel:
    """A small random encoder; the same seed gives the same weights."""
    config = UMT5Config(
        vocab_size=vocab_size, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = UMT5EncoderModel(config)
    encoder.to(dtype=torch.bfloat16)  # type: ignore[call-arg]
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def embed_captions(pipe: Any, captions: list[str]) -> Tensor:
    """Embeddings as the pipeline makes them, float32 ``[captions, 512, 64]`` on the pipeline's device."""
    embeddings, _ = pipe.encode_prompt(
        captions, do_classifier_free_guidance=False, max_sequence_length=MAX_SEQUENCE_LENGTH
    )
    return embeddings.float()
