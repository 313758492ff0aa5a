"""What sparse prefill costs SmolLM2-135M on real text, all 30 layers sparse."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from draftattn.eval.llm_specs import parse_spec
from draftattn.eval.perplexity import measure_perplexity

TOKENS = 4096


@pytest.fixture(scope="module")
def rows(smollm: tuple[Any, Any], topics_tokens: Tensor) -> dict[str, dict[str, Any]]:
    specs = [f"draft:density={density},block_size=64,dense_len=0" for density in (0.5, 0.25)]
    found = measure_perplexity(smollm[0], topics_tokens, [parse_spec(spec) for spec in specs], [TOKENS])
    return {str(row["options"].get("density", "dense")): row for row in found}


def test_the_model_reads_the_text(rows: dict[str, dict[str, Any]]) -> None:
    """Measured once, with transformers alone: 10.83; Python versions differ a little in the text."""
    assert 9 < rows["dense"]["perplexity"] < 13


@pytest.mark.parametrize(("density", "most"), [("0.5", 1.05), ("0.25", 1.12)])
def test_draft_prefill_keeps_perplexity(rows: dict[str, dict[str, Any]], density: str, most: float) -> None:
    row = rows[density]
    print(f"density {row['density']:.3f}: perplexity {row['perplexity']:.3f}, {row['against_dense']:.4f} of dense")
    assert row["density"] <= float(density)
    assert row["against_dense"] <= most
