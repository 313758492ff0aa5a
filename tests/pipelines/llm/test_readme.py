"""The README's examples run, on a tiny model in place of the one they name."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

README = Path(__file__).parents[3] / "pipelines" / "llm" / "README.md"


class Letters:
    """A tokenizer of single letters."""

    def __call__(self, text: str, return_tensors: str) -> SimpleNamespace:
        assert return_tensors == "pt"
        return SimpleNamespace(input_ids=torch.tensor([[ord(letter) % 64 for letter in text]]))

    def decode(self, tokens: Any) -> str:
        return "".join(chr(64 + int(token)) for token in tokens)


def test_the_examples_run_in_their_order(
    lm: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tiny_model(name: str, **options: Any) -> Any:
        assert name.startswith("HuggingFaceTB/")
        return lm.model().cpu()

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", tiny_model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: Letters())
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # its interpreter is slow, and tested elsewhere
    monkeypatch.chdir(tmp_path)
    (tmp_path / "essays.txt").write_text("it was a dark and stormy night, and the rain fell in torrents. " * 70)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) > 5
    names: dict[str, Any] = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    shown = capsys.readouterr().out
    for system in ("draft", "xattention", "minference", "flexprefill", "moba", "infllm", "streaming", "seer", "nsa"):
        assert f"\n{system}, density 0." in f"\n{shown}", system
    assert shown.count("loss") == 6
