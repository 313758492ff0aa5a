"""``draftattn llm`` on a tiny model, and what it is made of."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from draftattn.cli.app import app
from draftattn.cli.spoken_warnings import spoken_warnings
from draftattn.errors import InputError
from draftattn.eval import bench_llm
from draftattn.eval.dense_yardstick import dense_yardstick
from draftattn.eval.language_models import load_model, load_tokenizer
from draftattn.eval.llm_gate import check_system, small_call
from draftattn.eval.llm_specs import SystemSpec, density_sweep, parse_spec, parse_specs
from draftattn.eval.perplexity import measure_perplexity, token_losses
from draftattn.pipelines.llm.apply import make_system

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DRAFT = "draft:density=0.4,block_size=16,dense_len=0"


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["llm", *arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama over letters, in transformers' layout."""
    path = tmp_path_factory.mktemp("tiny-llama")
    letters = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz .\n?")}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(letters),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("it was a dark and stormy night. the rain fell in torrents.\n" * 5)
    return path


def test_losses_are_those_of_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_model(str(folder), dtype=torch.float32, device=DEVICE), load_tokenizer(str(folder))
    ids = tokenizer("the rain fell in torrents", return_tensors="pt").input_ids.to(DEVICE)
    monkeypatch.setattr("draftattn.eval.perplexity._CHUNK_TOKENS", 7)
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.item()
    assert token_losses(model, ids[0]).mean().item() == pytest.approx(expected, rel=1e-5)


def test_perplexity_is_that_of_the_applied_system_and_the_model_is_left_as_it_was(folder: Path) -> None:
    model = load_model(str(folder), dtype=torch.float32, device=DEVICE)
    tokens = torch.randint(0, 29, (100,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    before = token_losses(model, tokens)
    everything = parse_spec("draft:density=1.0,block_size=16,dense_len=0")
    rows = measure_perplexity(model, tokens, [everything, parse_spec(DRAFT)], [64, 100])
    assert [(row["system"], row["length"]) for row in rows] == [
        (name, length) for length in (64, 100) for name in ("dense", "draft", "draft")
    ]
    dense, kept, sparse = rows[3:]
    assert dense["perplexity"] == pytest.approx(before.mean().exp().item(), rel=1e-6)
    assert dense["last_quarter"] == pytest.approx(before[-25:].mean().exp().item(), rel=1e-6)
    assert kept["against_dense"] == pytest.approx(1, rel=1e-5)
    assert kept["density"] == 1
    assert sparse["density"] < 0.6
    assert abs(math.log(sparse["against_dense"])) > 1e-4
    assert torch.equal(token_losses(model, tokens), before)
    with pytest.raises(InputError, match="length is 101; the text has 100 tokens"):
        measure_perplexity(model, tokens, [], [101])


def test_specs_are_read_and_refused() -> None:
    spec = parse_spec("moba:chunk_size=64,top_k=2,force_first=true,dense_layers=[0,-1]")
    assert dict(spec.options) == {"chunk_size": 64, "top_k": 2, "force_first": True, "dense_layers": (0, -1)}
    assert parse_spec(spec.text) == spec
    assert parse_specs([spec.text, "dense", spec.text]) == [spec, SystemSpec("dense")]
    for wrong, message in (
        ("moba:64", "options are written name=value"),
        ("mob", "system is 'mob'; choose from"),
        ("moba:chunk_size=0", "chunk_size is 0"),
        ("dense:density=1", "dense has none"),
    ):
        with pytest.raises(InputError, match=message):
            parse_spec(wrong)


def test_perplexity_command(folder: Path, text: Path, tmp_path: Path) -> None:
    output, plot = tmp_path / "figures.json", tmp_path / "figures.svg"
    arguments = ["--model", str(folder), "--text", str(text), "--lengths", "64,128", "--dtype", "float32"]
    result = run("perplexity", *arguments, "--system", DRAFT, "--output", str(output), "--plot", str(plot))
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text())
    assert [row["system"] for row in found["rows"]] == ["dense", "draft"] * 2
    assert found["rows"][1]["options"] == {"density": 0.4, "block_size": 16, "dense_len": 0}
    assert "× dense" in result.output
    assert plot.read_text().startswith("<?xml")


def test_a_sweep_holds_every_system_at_falling_densities(folder: Path, text: Path, tmp_path: Path) -> None:
    wanted = {"draft", "xattention", "minference", "flexprefill", "moba", "infllm", "streaming"}
    for length in (2048, 4096, 8192):
        specs = density_sweep(length)
        assert {spec.name for spec in specs} == wanted
        assert len(set(specs)) == len(specs) == 27
    with pytest.raises(InputError, match="length is 2000; a sweep of densities needs 2048"):
        density_sweep(2000)
    letters = tmp_path / "letters.txt"
    letters.write_text(text.read_text() * 7)
    output, plot = tmp_path / "sweep.json", tmp_path / "sweep.svg"
    common = ["--model", str(folder), "--text", str(letters), "--lengths", "2048", "--dtype", "float32", "--sweep"]
    result = run("perplexity", *common, "--output", str(output), "--plot", str(plot))
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text())
    assert found["model"] == folder.name
    by_system: dict[str, list[float]] = {}
    for row in found["rows"]:
        kind = row["options"].get("force_first", row["options"].get("budget"))
        by_system.setdefault(f"{row['system']} {kind}", []).append(row["density"])
    for system, densities in by_system.items():
        assert densities == sorted(densities, reverse=True), system
        assert system == "dense None" or 0 < densities[-1] < 1, system
    drawn = plot.read_text()
    assert "<!-- moba (force_first) -->" in drawn
    assert "<!-- moba -->" in drawn
    assert "<!-- draft (budget row) -->" in drawn


def test_generate_command(folder: Path, text: Path) -> None:
    common = ["--model", str(folder), "--prompt-file", str(text), "--max-new-tokens", "3", "--dtype", "float32"]
    dense, sparse = run("generate", *common), run("generate", *common, "--system", DRAFT)
    assert dense.exit_code == sparse.exit_code == 0, sparse.output
    assert "295 tokens of prompt, 3 new" in dense.output
    assert "density 0." in sparse.output
    assert run("generate", "--model", str(folder)).exit_code != 0


def test_bench_command_times_attention(tmp_path: Path) -> None:
    output, plot = tmp_path / "bench.json", tmp_path / "bench.svg"
    systems = [DRAFT, "moba:chunk_size=32,top_k=2", "infllm:block_size=16,top_k=3,local_tokens=16,window=8,stride=4"]
    given = [part for system in systems for part in ("--system", system)]
    sizes = ["--lengths", "130", "--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--seconds", "0.001"]
    result = run("bench", *sizes, *given, "--dtype", "float32", "--output", str(output), "--plot", str(plot))
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text())
    assert [row["system"] for row in found["rows"]] == ["dense", "draft", "moba", "infllm"]
    assert all(gate["green"] for gate in found["gate"])
    assert found["rows"][1]["selection_seconds"] > 0
    assert found["rows"][2]["selection_seconds"] is None
    assert all(0 < row["density"] <= 1 for row in found["rows"])
    assert plot.exists()


@pytest.mark.parametrize("name", ["draft", "moba"])
def test_the_gate_sees_a_wrong_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"density": 0.4, "block_size": 16} if name == "draft" else {"chunk_size": 16, "top_k": 3}
    system = make_system(name, **options)
    shape = bench_llm.AttentionShape(4, 2, 16)
    call = bench_llm.random_call(shape, 150, torch.float32, DEVICE)
    verdict = check_system(system, call)
    assert verdict is not None
    assert verdict["green"]
    attend = system.attend
    monkeypatch.setattr(system, "attend", lambda call: attend(call) * 1.0001)
    assert not check_system(system, call)["green"]  # type: ignore[index]
    spec = SystemSpec(name, tuple(options.items()))
    monkeypatch.setattr(bench_llm, "_system", lambda spec: system)
    result = bench_llm.bench_attention(shape, [150], [spec], dtype=torch.float32, device=DEVICE, seconds=0.001)
    assert result["red"] == [spec.text]
    assert [row["system"] for row in result["rows"]] == ["dense"]


def test_moba_is_checked_where_it_leaves_chunks_out(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = bench_llm.AttentionShape(4, 2, 16)
    call = bench_llm.random_call(shape, 700, torch.float32, DEVICE)
    assert small_call(make_system("draft"), call, 100).query.shape == (1, 100, 2, 16)
    moba = make_system("moba", chunk_size=64, top_k=3)
    small = small_call(moba, call, 100)
    assert small.num_keys == 5 * 64
    monkeypatch.setattr("draftattn.eval.llm_gate.MOST_ROWS", 50)
    assert check_system(moba, small)["green"]  # type: ignore[index]
    other = make_system("moba", chunk_size=64, top_k=4)
    monkeypatch.setattr(moba, "attend", other.attend)
    assert not check_system(moba, small)["green"]  # type: ignore[index]


def test_the_yardstick_serves_grouped_heads_where_a_kernel_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    call = bench_llm.random_call(bench_llm.AttentionShape(6, 2, 16), 40, torch.float32, DEVICE)
    expected = dense_yardstick(call.query, call.key, call.value)()
    stock = torch.nn.functional.scaled_dot_product_attention

    def no_groups(*arguments: Any, enable_gqa: bool = False, **options: Any) -> Any:
        if enable_gqa:
            raise RuntimeError("No available kernel")
        return stock(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", no_groups)
    torch.testing.assert_close(dense_yardstick(call.query, call.key, call.value)(), expected)


def prefill_density(options: dict[str, Any]) -> float:
    """Of 48 tokens, without the dense steps of decoding after them."""
    call = bench_llm.random_call(bench_llm.AttentionShape(4, 2, 16), 48, torch.float32, DEVICE)
    density = bench_llm._density(make_system("draft", **options), call)
    assert density is not None
    return density


def test_bench_command_times_a_model(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    common = ["bench", "--lengths", "48", "--new-tokens", "2", "--system", DRAFT, "--dtype", "float32"]
    for model in (str(folder), "tiny"):
        result = run(*common, "--model", model, "--output", str(output))
        assert result.exit_code == 0, result.output
        dense, sparse = json.loads(output.read_text())["rows"]
        assert dense["prefill_speedup"] == 1
        assert sparse["density"] == pytest.approx(prefill_density(sparse["options"]))


def test_distilled_gates_serve(folder: Path, text: Path, tmp_path: Path) -> None:
    gates = tmp_path / "gates"
    common = ["--model", str(folder), "--text", str(text), "--dtype", "float32"]
    trained = run(
        "distill",
        *common,
        "--length",
        "64",
        "--block-size",
        "16",
        "--gate-dim",
        "8",
        "--layers",
        "0",
        "--max-sequences",
        "1",
        "--output",
        str(gates),
    )
    assert trained.exit_code == 0, trained.output
    measured = run("perplexity", *common, "--lengths", "128", "--system", f"seer:gates={gates},ratio=0.5")
    assert measured.exit_code == 0, measured.output
    assert "seer" in measured.output


def refusal(*arguments: str) -> str:
    """The one sentence that a command ends with."""
    result = run(*arguments)
    assert isinstance(result.exception, InputError), result.output
    return str(result.exception)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model's weights is a failure."""
    from transformers import AutoModelForCausalLM

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


def test_a_sweep_has_lengths_of_its_own(folder: Path, text: Path, no_weights: None) -> None:
    common = ["perplexity", "--model", str(folder), "--text", str(text)]
    assert refusal(*common, "--sweep") == "length is 4096; the text has 295 tokens, and 8 are the least"
    assert refusal(*common).startswith("length is 1024;")
    assert "2048 tokens or more" in refusal(*common, "--sweep", "--lengths", "1024")
    shown = " ".join(run("perplexity", "--help").output.replace("│", " ").split())
    assert "--lengths 4096 --sweep" in shown
    assert "2,048 tokens or more" in shown


def test_a_model_that_is_none_is_answered_with_those_there_are(tmp_path: Path) -> None:
    said = refusal("bench", "--model", str(tmp_path))
    assert said.endswith("is no folder with a config.json; or choose llama-1b, llama-8b, tiny for random weights")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "1"], "layers is 1; it applies with --model only"),
        (["--new-tokens", "32"], "new-tokens is 32; it applies with --model only"),
        (["--model", "tiny", "--heads", "32"], "heads is 32; it applies without --model only"),
        (["--model", "tiny", "--kv-heads", "2"], "kv-heads is 2; it applies without --model only"),
        (["--model", "tiny", "--head-dim", "8"], "head-dim is 8; it applies without --model only"),
        (["--model", "tiny", "--batch", "2"], "batch is 2; it applies without --model only"),
        (["--model", "tiny", "--seconds", "1"], "seconds is 1.0; it applies without --model only"),
        (["--model", "tiny", "--layers", "3"], "layers is 3; tiny has 2, allowed is 1 to 2"),
        (["--model", "tiny", "--layers", "0"], "layers is 0; tiny has 2, allowed is 1 to 2"),
        (["--model", "x", "--layers", "1"], "layers is 1; it applies to random weights only"),
        (["--model", "tiny", "--new-tokens", "0"], "new-tokens is 0; it must be at least 1"),
        (["--seconds", "0"], "seconds is 0.0; it must be above 0"),
        (["--heads", "0"], "heads is 0; it must be at least 1"),
    ],
)
def test_bench_ignores_no_option(arguments: list[str], message: str) -> None:
    assert refusal("bench", *arguments).startswith(message)


def test_an_empty_prompt_is_refused_before_the_weights_are_loaded(
    folder: Path, tmp_path: Path, no_weights: None
) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert refusal("generate", "--model", "nowhere", "--prompt", "") == "the prompt is empty"
    assert refusal("generate", "--model", "nowhere", "--prompt-file", str(empty)) == "the prompt is empty"
    stripping = tmp_path / "stripping"
    shutil.copytree(folder, stripping)
    described = json.loads((stripping / "tokenizer.json").read_text())
    described["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    (stripping / "tokenizer.json").write_text(json.dumps(described))
    assert refusal("generate", "--model", str(stripping), "--prompt", " ").startswith("the prompt is empty: ")


def test_generate_names_only_the_wrong_option() -> None:
    common = ["generate", "--model", "nowhere", "--prompt", "a"]
    assert refusal(*common, "--max-new-tokens", "0") == "max-new-tokens is 0; it must be at least 1"
    assert refusal(*common, "--temperature", "-1") == "temperature is -1.0; it must be at least 0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--form", "both"], "form is 'both'; choose from prefill, decode"),
        (["--block-size", "0"], "block_size is 0;"),
        (["--gate-dim", "3"], "gate_dim is 3;"),
        (["--epochs", "0"], "epochs is 0; it must be at least 1"),
        (["--max-sequences", "0"], "max-sequences is 0; it must be at least 1"),
        (["--learning-rate", "0"], "learning-rate is 0.0; it must be above 0"),
        (["--length", "255"], "length is 255; it must be at least 256, four blocks of 64"),
        (["--layers", "99"], "layers names layer 99; the model has layers 0 to 1"),
        (["--layers", "-3"], "layers names layer -3; the model has layers 0 to 1"),
        (["--length", "296"], "the text has 295 tokens; a sequence needs 296"),
    ],
)
def test_distill_refuses_before_the_weights_are_loaded(
    arguments: list[str], message: str, folder: Path, text: Path, tmp_path: Path, no_weights: None
) -> None:
    common = ["distill", "--model", str(folder), "--text", str(text), "--output", str(tmp_path / "gates")]
    assert refusal(*common, *arguments).startswith(message)
    assert not (tmp_path / "gates").exists()
    (tmp_path / "gates").touch()
    assert "cannot be written" in refusal(*common, "--length", "256")


def test_warnings_of_a_system_are_sentences(folder: Path, text: Path) -> None:
    systems = [part for size in (16, 32) for part in ("--system", f"draft:density=0.4,block_size={size}")]
    common = ["--model", str(folder), "--text", str(text), "--lengths", "64", "--dtype", "float32"]
    result = run("perplexity", *common, *systems)
    assert result.exit_code == 0, result.output
    said = [line for line in result.stderr.splitlines() if "stay dense" in line]
    assert len(said) == 1
    assert said[0].startswith("draftattn: draft: sequences of up to ")
    assert "UserWarning" not in result.stderr


def test_warnings_of_others_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        with spoken_warnings():
            for _ in range(2):
                make_system("draft").say_once("ours")
                warnings.warn("of another module", stacklevel=1)
        warnings.warn("afterwards", stacklevel=1)
    assert [str(each.message) for each in record] == ["of another module", "of another module", "afterwards"]
    assert capsys.readouterr().err == "draftattn: ours\n"


def test_a_density_above_one_is_explained(folder: Path, text: Path) -> None:
    nsa = "nsa:compression_block=8,compression_stride=4,block_size=16,num_selected=20,window=300,dense_len=0"
    common = ["--model", str(folder), "--dtype", "float32"]
    made = ["generate", *common, "--prompt-file", str(text), "--max-new-tokens", "2"]
    read = ["perplexity", *common, "--text", str(text), "--lengths", "64"]
    for command in (made, read):
        explained, plain = run(*command, "--system", nsa), run(*command, "--system", DRAFT)
        assert explained.exit_code == plain.exit_code == 0, explained.output
        assert "a density above 1 adds up branches" in explained.output
        assert "above 1" not in plain.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["perplexity", "--model", "x.gguf", "--text", "missing.txt"], "text 'missing.txt' cannot be read"),
        (["bench", "--lengths", "1,x"], "lengths is '1,x'; give whole numbers"),
        (["bench", "--heads", "3", "--kv-heads", "2"], "heads is 3; kv_heads 2 must divide it"),
        (["bench", "--system", "selective"], "selective works inside a model only"),
        (["bench", "--model", "nothing-here.gguf"], "model 'nothing-here.gguf' is no file"),
    ],
)
def test_wrong_input_is_one_sentence(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["llm", *arguments])
    assert result.exit_code != 0
    assert isinstance(result.exception, InputError | SystemExit)
    shown = str(result.exception) if isinstance(result.exception, InputError) else result.output
    assert message in shown.replace("\n", " ")
