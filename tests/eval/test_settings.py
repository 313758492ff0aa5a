import json
from itertools import combinations
from pathlib import Path

import pytest

from draftattn import DraftConfig
from draftattn.errors import InputError
from draftattn.eval.prompts import read_prompts, vbench_prompts
from draftattn.eval.settings import setting_name, setting_to_json, settings_grid
from draftattn.eval.summary import summarise
from draftattn.policies.sliding_tile import SlidingTileConfig
from draftattn.policies.xattention import XAttentionConfig
from draftattn.presets import PRESETS


def test_different_settings_have_different_names() -> None:
    configs = [
        *PRESETS.values(),
        DraftConfig(warmup=1),
        DraftConfig(warmup=1.0),
        DraftConfig(sparsity=0.7501),
        DraftConfig(tile=(1, 8, 16)),
        DraftConfig(block_size=64),
        DraftConfig(backend="reference"),
        DraftConfig(dense_layers=(0, -1)),
        DraftConfig(residual=False),
        DraftConfig(selection="head"),
        DraftConfig(policy="svg"),
        DraftConfig(policy="sliding_tile"),
        DraftConfig(policy=SlidingTileConfig(window=(3, 1, 1))),
        DraftConfig(policy=XAttentionConfig(mass=0.95)),
        DraftConfig(policy=XAttentionConfig(mass=0.95, stride=16)),
    ]
    for one, other in combinations(configs, 2):
        if repr(one) != repr(other):
            assert setting_name(one) != setting_name(other)
    for config in configs:
        assert setting_name(config).replace("-", "").replace(".", "").isalnum()


def test_grid_makes_every_combination_once() -> None:
    grid = settings_grid(
        [DraftConfig(), DraftConfig(sparsity=0.9)],
        {"sparsity": [0.5, 0.9], "selection": ["row", "head"], "warmup": [0, 0.25]},
    )
    assert len(grid) == 8
    assert all(setting_name(config) == name for name, config in grid.items())
    with pytest.raises(InputError, match="no settings"):
        settings_grid([DraftConfig()], {"sparsity": []})
    with pytest.raises(InputError, match="sparsity is 2"):
        settings_grid([DraftConfig()], {"sparsity": [2]})


def test_setting_survives_json() -> None:
    content = setting_to_json("name", DraftConfig(tile=(1, 8, 16), dense_layers=(0,)))
    assert json.loads(json.dumps(content)) == content
    content = setting_to_json("name", DraftConfig(policy=SlidingTileConfig(window=(3, 1, 1))))
    assert json.loads(json.dumps(content)) == content
    assert content["policy"] == "sliding_tile:window=3x1x1"
    assert setting_to_json("name", DraftConfig(policy="svg"))["policy"] == "svg"


def test_a_policy_has_one_name_however_it_is_given() -> None:
    assert setting_name(DraftConfig(policy="xattention")) == setting_name(DraftConfig(policy=XAttentionConfig()))


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a dog\n\n  a cat \na dog\n", encoding="utf-8")
    assert read_prompts(file) == ["a dog", "a cat"]
    file.write_text(" \n\n")
    with pytest.raises(InputError, match=r"prompts\.txt.*holds no prompt"):
        read_prompts(file)
    with pytest.raises(InputError, match=r"none\.txt.*cannot be read"):
        read_prompts(tmp_path / "none.txt")
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(file)


def test_prompts_of_a_vbench_dimension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="pip install --no-deps vbench"):
        vbench_prompts("scene")
    package = tmp_path / "vbench"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('its dependencies are not here')")
    entries = [
        {"prompt_en": "a dog", "dimension": ["scene", "color"]},
        {"prompt_en": "a cat", "dimension": ["color"]},
        {"prompt_en": "a dog", "dimension": ["scene"]},
    ]
    (package / "VBench_full_info.json").write_text(json.dumps(entries))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert vbench_prompts("scene") == ["a dog"]
    assert vbench_prompts("color") == ["a dog", "a cat"]
    with pytest.raises(InputError, match="vbench is 'smell'; choose from color, scene"):
        vbench_prompts("smell")


def test_summary_knows_what_is_worse() -> None:
    row = {"density": 0.25, "step_seconds": 1.0, "dense_step_seconds": 2.0, "speedup": 2.0, "run_speedup": 1.5}
    scores = {"psnr_mean": 30.0, "psnr_worst": 25.0, "lpips_mean": 0.1, "lpips_worst": 0.2}
    better = {"psnr_mean": None, "psnr_worst": None, "lpips_mean": 0.0, "lpips_worst": 0.0}
    (entry,) = summarise([{"setting": "a", **row, **scores}, {"setting": "a", **row, **better}])
    assert entry["videos"] == 2
    assert entry["psnr"] == float("inf")
    assert entry["psnr_worst"] == 25.0
    assert (entry["lpips"], entry["lpips_worst"]) == (0.05, 0.2)
