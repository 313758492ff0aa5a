"""Perplexity against memory: selective attention whose cache is cut to a budget.

``python -m draftattn.eval.selective_memory`` trains two small models of bytes, one with dense and one with selective
attention, and prints the perplexity of held-out text for a number of budgets.
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftattn.errors import InputError
from draftattn.eval.environment import device_name, package_versions
from draftattn.eval.perplexity import token_losses
from draftattn.files import check_writable, written_whole
from draftattn.pipelines.llm.apply import apply


@dataclass(frozen=True)
class StudyConfig:
    """Sizes of the two models and of their training.

    Args:
        layers: of each model.
        hidden: channels; heads have 32.
        tokens: of a sequence, in training and in the table.
        batch: sequences of a step.
        steps: of training.
        learning_rate: of AdamW, which falls to zero along a cosine.
        seed: of weights and batches.
    """

    layers: int = 2
    hidden: int = 128
    tokens: int = 256
    batch: int = 8
    steps: int = 600
    learning_rate: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "tokens", "batch", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.hidden % 32:
            raise InputError(f"hidden is {self.hidden}; it must be a multiple of 32")


@torch.no_grad()
def memory_table(
    model: Any, texts: Tensor, budgets: Sequence[int | None], *, system: str = "selective"
) -> list[dict[str, Any]]:
    """Perplexity of a model whose layers keep at most so many keys.

    Args:
        model: a causal language model of transformers.
        texts: token ids ``[texts, N]``, each a text of its own.
        budgets: most keys of a layer; None for all.
        system: ``"selective"`` prunes what is masked most. ``"streaming"`` keeps the first key and the last ones, with
            as many keys in sight.

    Returns:
        Rows of ``budget``, ``memory`` (keys and values of one text, in MiB), ``memory_share`` of what all keys take,
        and ``perplexity``.

    Raises:
        InputError: if a budget is too small or the system another one.
    """
    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_key = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize
    num_keys = texts.shape[1]
    rows = []
    for budget in budgets:
        kept = num_keys if budget is None else min(budget, num_keys)
        if system == "selective":
            options: dict[str, Any] = {"budget": budget}
        elif system == "streaming":
            # a token also sees itself
            options = {"sink": 1, "window": max(1, kept - 2)}
        else:
            raise InputError(f"system is {system!r}; choose selective or streaming")
        with apply(model, system, **options):
            losses = torch.cat([token_losses(model, text) for text in texts])
        rows.append(
            {
                "budget": budget,
                "memory": kept * per_key / 2**20,
                "memory_share": kept / num_keys,
                "perplexity": math.exp(float(losses.double().mean())),
            }
        )
    return rows


def train(
    data: Tensor,
    config: StudyConfig,
    device: torch.device,
    *,
    selective: bool,
    on_progress: Callable[[str], None] = lambda message: None,
) -> Any:
    """A small Llama over bytes, trained on random pieces of ``data``, ids ``[n]``; selective attention is taken off."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    heads = config.hidden // 32
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=config.hidden,
            intermediate_size=3 * config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=32,
            max_position_embeddings=config.tokens,
        )
    )
    model = model.to(device)
    handle = apply(model, "selective") if selective else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    generator = torch.Generator().manual_seed(config.seed)
    start = time.perf_counter()
    for step in range(config.steps):
        first = torch.randint(0, len(data) - config.tokens, (config.batch, 1), generator=generator)
        batch = data[first + torch.arange(config.tokens)].to(device)
        loss = model(batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == config.steps - 1:
            on_progress(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s")
    if handle is not None:
        handle.remove()
    return model.eval()


def run_study(
    data: bytes,
    config: StudyConfig,
    budgets: Sequence[int],
    *,
    device: torch.device,
    texts: int = 32,
    on_progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Trains both models and makes their tables; the last tenth of the text is held out.

    Raises:
        InputError: if the text is too short.
    """
    ids = torch.tensor(list(data))
    held_out = ids[-(len(ids) // 10) :]
    if len(held_out) < texts * config.tokens:
        raise InputError(f"the text has {len(ids)} bytes; {10 * texts * config.tokens} are needed")
    spaced = torch.arange(texts) * ((len(held_out) - config.tokens) // max(1, texts - 1))
    pieces = held_out[spaced[:, None] + torch.arange(config.tokens)].to(device)
    tables = {}
    for name, system in (("selective", "selective"), ("dense", "streaming")):
        on_progress(f"training the {name} model")
        model = train(ids[: -len(held_out)], config, device, selective=name == "selective", on_progress=on_progress)
        tables[name] = memory_table(model, pieces, [None, *budgets], system=system)
    return {
        "schema": 1,
        "kind": "selective-memory",
        "config": asdict(config),
        "text_bytes": len(ids),
        "held_out_texts": texts,
        "device": device_name(device),
        "versions": package_versions(),
        "notes": {
            "selective": "trained and run with selective attention, pruned to the budget",
            "dense": "trained with dense attention; with a budget, the first key and the last ones are seen",
        },
        "tables": tables,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs from a command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, help="a text file; Python's documentation if left out")
    parser.add_argument("--budgets", default="128,64,32,16,8")
    for name, default in asdict(StudyConfig()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = vars(parser.parse_args(arguments))
    text, budgets, output = options.pop("text"), options.pop("budgets"), options.pop("output")
    if output is not None:
        check_writable(output)
    topics = pydoc_data.topics.topics
    data = text.read_bytes() if text else "\n\n".join(topics[name] for name in sorted(topics)).encode()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    budgets = [int(budget) for budget in budgets.split(",")]
    result = run_study(data, StudyConfig(**options), budgets, device=device, on_progress=print)
    print(f"{'budget':>8} {'memory':>8} {'selective':>10} {'dense, first and last keys':>28}")
    for ours, dense in zip(*(result["tables"][name] for name in ("selective", "dense")), strict=True):
        budget = "all" if ours["budget"] is None else ours["budget"]
        print(f"{budget:>8} {ours['memory_share']:>7.1%} {ours['perplexity']:>10.3f} {dense['perplexity']:>28.3f}")
    if output is not None:
        with written_whole(output) as path:
            path.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
