"""Native Sparse Attention on a real model that was trained with full attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from draftattn.eval.llm_specs import SystemSpec
from draftattn.eval.perplexity import measure_perplexity


def test_an_untrained_beginning_is_close_to_full_attention(smollm: tuple[Any, Any], topics_tokens: Tensor) -> None:
    sparse = SystemSpec("nsa", (("num_selected", 4),))
    # nearly all weight on the window of 64 instead, as a yardstick
    window = SystemSpec("nsa", (("num_selected", 3), ("window", 64), ("gate_init", (-9, -9, 9))))
    rows = measure_perplexity(smollm[0], topics_tokens, [sparse, window], [512])
    dense, near, far = (row["perplexity"] for row in rows)
    assert near < 1.03 * dense
    assert far > 1.5 * dense
