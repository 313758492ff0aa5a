"""The table of memory against perplexity, on models too small to say anything."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from draftattn.errors import InputError
from draftattn.eval import selective_memory
from draftattn.eval.selective_memory import StudyConfig, memory_table, run_study
from draftattn.pipelines.llm import apply

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(DEVICE).eval()


def test_rows_say_memory_and_perplexity(model: Any) -> None:
    texts = torch.randint(0, 64, (3, 40), device=DEVICE)
    rows = memory_table(model, texts, [None, 100, 10])
    assert [row["memory_share"] for row in rows] == [1.0, 1.0, 0.25]
    # 2 layers of 2 heads of 16 channels, keys and values, 4 bytes each
    assert rows[0]["memory"] == 40 * 2 * 2 * 2 * 16 * 4 / 2**20
    assert rows[0]["perplexity"] == pytest.approx(rows[1]["perplexity"])
    for row, budget in zip(rows, (None, None, 10), strict=True):
        with apply(model, "selective", budget=budget), torch.no_grad():
            loss = sum(model(text[None], labels=text[None]).loss.item() for text in texts) / 3
        assert row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert rows[2]["perplexity"] != pytest.approx(rows[0]["perplexity"], rel=1e-3)


def test_first_and_last_keys_are_the_yardstick(model: Any) -> None:
    texts = torch.randint(0, 64, (1, 30), device=DEVICE)
    whole, part = memory_table(model, texts, [None, 10], system="streaming")
    with torch.no_grad():
        assert whole["perplexity"] == pytest.approx(math.exp(model(texts, labels=texts).loss.item()), rel=1e-4)
    assert part["perplexity"] != pytest.approx(whole["perplexity"], rel=1e-3)
    with pytest.raises(InputError, match="choose selective or streaming"):
        memory_table(model, texts, [None], system="moba")


def test_a_study_runs_from_text_to_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, output = tmp_path / "text", tmp_path / "out.json"
    text.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 300)
    options = dict(layers=1, hidden=32, tokens=32, batch=2, steps=3)
    arguments = [f"--{name}={value}" for name, value in options.items()]
    monkeypatch.setattr(run_study, "__kwdefaults__", {**run_study.__kwdefaults__, "texts": 4})
    selective_memory.main([f"--text={text}", "--budgets=8", *arguments, f"--output={output}"])
    result = json.loads(output.read_text())
    assert result["config"]["steps"] == 3
    for name in ("selective", "dense"):
        assert [row["budget"] for row in result["tables"][name]] == [None, 8]
    with pytest.raises(InputError, match="are needed"):
        run_study(b"short", StudyConfig(**options), [8], device=DEVICE)
