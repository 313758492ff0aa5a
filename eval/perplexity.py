"""Perplexity of a language model on a text, dense and with sparse attention systems."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from draftattn.errors import InputError
from draftattn.eval.environment import device_name, package_versions
from draftattn.eval.llm_specs import DENSE, SystemSpec

SCHEMA = 1
_CHUNK_TOKENS = 2048  # whose logits are alive at once


@torch.no_grad()
def token_losses(model: Any, tokens: Tensor) -> Tensor:
    """Negative log-likelihood of every token after the first, in nats, from one forward pass: float32 ``[N - 1]``.

    Args:
        model: a causal language model of transformers.
        tokens: ids ``[N]``.
    """
    outputs: list[Any] = []
    hook = model.get_decoder().register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        # through the whole model, for systems may hook into it
        model(tokens[None], use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    hidden, head = outputs[0].last_hidden_state[0, :-1], model.get_output_embeddings()
    # logits of a long text would be larger than everything else
    losses = [
        torch.nn.functional.cross_entropy(head(part).float(), target, reduction="none")
        for part, target in zip(hidden.split(_CHUNK_TOKENS), tokens[1:].split(_CHUNK_TOKENS), strict=True)
    ]
    return torch.cat(losses)


def measure_perplexity(
    model: Any,
    tokens: Tensor,
    systems: Sequence[SystemSpec],
    lengths: Sequence[int],
    on_progress: Callable[[str], None] = lambda message: None,
) -> list[dict[str, Any]]:
    """Perplexity of the first tokens of a text, for every system and length.

    Args:
        model: a causal language model of transformers, on its device.
        tokens: ids ``[n]`` of the text.
        systems: what to measure; dense is always measured, and first.
        lengths: how many leading tokens, each in one forward pass.
        on_progress: told what is being done.

    Returns:
        Rows with ``system``, ``options``, ``length``, ``perplexity``, that of the ``last_quarter``, ``against_dense``
        (ratio of perplexities), realised ``density`` (share of causal pairs; None where a system does not say) and
        ``seconds`` of the forward pass.

    Raises:
        InputError: if the text is too short, or the model's head does more than a product.
    """
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            raise InputError(f"the model's configuration has {name}; perplexity is measured without such a head")
    check_lengths(lengths, len(tokens))
    specs = [SystemSpec(DENSE), *(spec for spec in systems if spec.name != DENSE)]
    rows: list[dict[str, Any]] = []
    for length in lengths:
        dense = math.nan
        for spec in specs:
            on_progress(f"{spec.text}, {length} tokens")
            with applied(model, spec) as recorder:
                losses, seconds = _timed(lambda length=length: token_losses(model, tokens[:length]), tokens.device)  # type: ignore[misc]
                density = 1.0 if recorder is None else recorder.density()
            perplexity, last = (math.exp(float(part.mean())) for part in (losses, losses[-(length // 4) :]))
            dense = perplexity if spec.name == DENSE else dense
            rows.append(
                {
                    **spec.to_json(),
                    "length": length,
                    "perplexity": perplexity,
                    "last_quarter": last,
                    "against_dense": perplexity / dense,
                    "density": density,
                    "seconds": seconds,
                }
            )
    return rows


def check_lengths(lengths: Sequence[int], num_tokens: int) -> None:
    """Raises `InputError` where a text of so many tokens is too short, or 8 tokens are not asked for."""
    for length in lengths:
        if not 8 <= length <= num_tokens:
            raise InputError(f"length is {length}; the text has {num_tokens} tokens, and 8 are the least")


@contextlib.contextmanager
def applied(model: Any, spec: SystemSpec) -> Iterator[Any]:
    """A model with a system applied; gives what records its density, or None for dense."""
    if spec.name == DENSE:
        yield None
        return
    from draftattn.pipelines.llm import apply

    with apply(model, spec.name, **dict(spec.options)) as handle:
        yield handle.record_density()


def perplexity_report(
    source: str, text_name: str, rows: list[dict[str, Any]], model: Any, device: torch.device
) -> dict[str, Any]:
    """The figures with what is needed to repeat them."""
    return {
        "schema": SCHEMA,
        "model": source,
        "text": text_name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(device),
        "versions": package_versions(),
        "notes": {
            "perplexity": "exp of the mean negative log-likelihood of the first tokens, one forward pass",
            "density": "share of the causal pairs of a query and a key that was computed, over all layers and heads; "
            "nsa sums three branches",
        },
        "rows": rows,
    }


def _timed(call: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start
