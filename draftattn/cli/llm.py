"""``draftattn llm``: sparse attention for language models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from draftattn.cli import llm_tables, options, tables
from draftattn.cli.spoken_warnings import spoken_warnings
from draftattn.errors import InputError
from draftattn.files import check_writable, written_whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from draftattn.eval.llm_specs import SystemSpec

llm_app = typer.Typer(
    help="Language models: perplexity, generation, speed and gates of sparse attention systems.", no_args_is_help=True
)

Model = Annotated[str, typer.Option(help="Hugging Face repository id, folder in transformers' layout, or .gguf file.")]
Systems = Annotated[
    list[str] | None,
    typer.Option(
        "--system",
        help="A system and its options, such as draft:density=0.25,block_size=64; may be given several times. Systems: "
        "draft, xattention, minference, flexprefill, moba, infllm, streaming, seer, nsa, selective.",
    ),
]
Dtype = Annotated[options.Dtype, typer.Option(help="auto: bfloat16 on a GPU, float32 on a CPU.")]
Output = Annotated[Path | None, typer.Option(help="Also write all figures to this JSON file.")]
Plot = Annotated[Path | None, typer.Option(help="Also draw the figures (.svg, .png, .pdf; needs matplotlib).")]
Text = Annotated[Path, typer.Option(help="Text file.")]


@llm_app.callback()
def _llm() -> None:
    pass


@llm_app.command(
    epilog="Example: draftattn llm perplexity --model SmolLM2-135M-Instruct.Q4_1.gguf --text essays.txt "
    "--lengths 4096 --sweep --output perplexity.json --plot perplexity.svg"
)
@options.interruptible
@spoken_warnings()
def perplexity(
    model: Model,
    text: Text,
    lengths: Annotated[
        str | None,
        typer.Option(help="Leading tokens of the text to read, by commas. Default: 1024,4096, with --sweep 4096."),
    ] = None,
    system: Systems = None,
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep",
            help="Also every system that needs no training, at three densities each; lengths of 2,048 tokens or more.",
        ),
    ] = False,
    dtype: Dtype = options.Dtype.auto,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Measure perplexity on a text, dense and with sparse attention systems, beside the density they realised."""
    from draftattn.eval.llm_specs import density_sweep
    from draftattn.eval.perplexity import check_lengths, measure_perplexity, perplexity_report

    if lengths is None:
        lengths = "4096" if sweep else "1024,4096"
    given, sizes = _specs(system), _lengths(lengths)
    systems = {size: list(dict.fromkeys([*given, *(density_sweep(size) if sweep else [])])) for size in sizes}
    _check_outputs(output, plot)
    tokens = _tokens(model, _read_text(text))
    check_lengths(sizes, len(tokens))
    loaded, device = _load(model, dtype)
    tokens = tokens.to(device)
    console = tables.wide_console()
    with console.status("measuring") as status:
        rows = [
            row
            for size, specs in systems.items()
            for row in measure_perplexity(loaded, tokens, specs, [size], status.update)
        ]
    console.print(llm_tables.perplexity_table(rows))
    _finish(console, perplexity_report(_shown(model), text.name, rows, loaded, device), output, plot)


@llm_app.command(
    epilog="Example: draftattn llm generate --model SmolLM2-135M-Instruct.Q4_1.gguf --prompt-file long.txt "
    "--system infllm --max-new-tokens 100"
)
@options.interruptible
@spoken_warnings()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="What to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Text file with it.")] = None,
    system: Annotated[
        str | None, typer.Option(help="A system and its options, such as moba:chunk_size=512. Default: dense.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 100,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    dtype: Dtype = options.Dtype.auto,
) -> None:
    """Continue a text, with a sparse attention system or without."""
    import torch

    from draftattn.eval.llm_specs import DENSE, SystemSpec
    from draftattn.eval.perplexity import applied

    if (prompt is None) == (prompt_file is None):
        raise InputError("give either --prompt or --prompt-file")
    _check_least(1, max_new_tokens=max_new_tokens)
    _check_least(0, temperature=temperature)
    spec = _specs([system])[0] if system else SystemSpec(DENSE)
    content = prompt if prompt_file is None else _read_text(prompt_file)
    if not content:
        raise InputError("the prompt is empty")
    tokenizer = _tokenizer(model)
    if chat:
        messages = [{"role": "user", "content": content}]
        content = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(content, return_tensors="pt")
    if not inputs["input_ids"].numel():
        raise InputError("the prompt is empty: the model's tokenizer makes no token of it")
    loaded, device = _load(model, dtype)
    inputs = inputs.to(device)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with applied(loaded, spec) as recorder:
        made = loaded.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
        density = None if recorder is None else recorder.density()
    length = inputs["input_ids"].shape[1]
    typer.echo(tokenizer.decode(made[0, length:], skip_special_tokens=True))
    shown = "" if density is None else f", density {density:.3f}"
    typer.echo(f"{spec.text}: {length} tokens of prompt, {made.shape[1] - length} new{shown}", err=True)
    if note := llm_tables.density_note([density]):
        typer.echo(note, err=True)


@llm_app.command(
    epilog="Example: draftattn llm bench --lengths 32768,131072 --system draft:density=0.1 --system "
    "infllm:query_block=32 --output llm.json --plot llm.svg"
)
@options.interruptible
@spoken_warnings()
def bench(
    lengths: Annotated[
        str | None, typer.Option(help="Tokens, by commas. Default: 8192,32768,131072 on a GPU, 2048 on a CPU.")
    ] = None,
    system: Systems = None,
    heads: Annotated[int | None, typer.Option(help="Without --model: query heads. Default 32.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Without --model: key heads. Default 8.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Without --model: channels of a head. Default 128.")] = None,
    batch: Annotated[int | None, typer.Option(help="Without --model: sequences. Default 1.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Time prefill and decoding of a whole model instead: repository id, folder or .gguf file, or random "
            "weights in the sizes of llama-1b, llama-8b or tiny."
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="With random weights: only so many layers.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="With --model: tokens to decode. Default 32.")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Without --model: how long each call is timed. Default 0.3.")
    ] = None,
    dtype: Dtype = options.Dtype.auto,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Time sparse attention against dense: one layer's prefill, or with --model a whole model's prefill and decoding.

    Without a model every system is first checked against float64; one that errs more than twice as much as torch's own
    attention is not timed, and the command ends with code 1.
    """
    from draftattn.eval import bench_llm

    device = options.default_device()
    sizes = _lengths(lengths or ("8192,32768,131072" if device.type == "cuda" else "2048"))
    specs = _specs(system or list(bench_llm.DEFAULT_SYSTEMS))
    of_layer = _given(heads=heads, kv_heads=kv_heads, head_dim=head_dim, batch=batch)
    of_timing, of_model = _given(seconds=seconds), _given(new_tokens=new_tokens)
    if model is None:
        _refuse({**of_model, **_given(layers=layers)}, "it applies with --model only")
    else:
        _refuse({**of_layer, **of_timing}, "it applies without --model only")
        if model not in bench_llm.ARCHITECTURES:
            names = ", ".join(bench_llm.ARCHITECTURES)
            _refuse(_given(layers=layers), f"it applies to random weights only: --model {names}")
    _check_least(1, **of_model)
    if seconds is not None and not seconds > 0:
        raise InputError(f"seconds is {seconds}; it must be above 0")
    _check_outputs(output, plot)
    weights = options.resolve_dtype(dtype, device)
    console = tables.wide_console()
    if model is not None:
        loaded = _load_or_random(model, layers, dtype)
        with console.status("measuring") as status:
            result = bench_llm.bench_generation(
                loaded, _shown(model), sizes, specs, **of_model, on_progress=status.update
            )
        console.print(llm_tables.generation_table(result))
    else:
        shape = bench_llm.AttentionShape(**of_layer)
        with console.status("measuring") as status:
            result = bench_llm.bench_attention(
                shape, sizes, specs, dtype=weights, device=device, **of_timing, on_progress=status.update
            )
        console.print(llm_tables.attention_table(result))
    _finish(console, result, output, plot)
    if result.get("red"):
        typer.echo(f"draftattn: wrong results, not timed: {', '.join(result['red'])}", err=True)
        raise typer.Exit(1)


@llm_app.command(
    epilog="Example: draftattn llm distill --model SmolLM2-135M-Instruct.Q4_1.gguf --text essays.txt --length 2048 "
    "--epochs 20 --output gates"
)
@options.interruptible
@spoken_warnings()
def distill(
    model: Model,
    text: Text,
    output: Annotated[Path, typer.Option(help="Folder for the gates; an unfinished run in it is taken up again.")],
    length: Annotated[int, typer.Option(help="Tokens of a training sequence.")] = 2048,
    max_sequences: Annotated[int | None, typer.Option(help="Only the first sequences of the text.")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers, such as 0,5,-1. Default: all.")] = None,
    epochs: Annotated[int, typer.Option(help="Times that the text is read.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-3,
    block_size: Annotated[int, typer.Option(help="Tokens of a block.")] = 64,
    gate_dim: Annotated[int, typer.Option(help="Channels of a gate.")] = 128,
    form: Annotated[str, typer.Option(help="prefill, or decode (one gate per key head).")] = "prefill",
    seed: Annotated[int, typer.Option(help="Of the gates' first weights.")] = 0,
    dtype: Dtype = options.Dtype.auto,
) -> None:
    """Train SeerAttention's gates on a frozen model by self-distillation, and save only them."""
    from draftattn.eval.language_models import num_layers
    from draftattn.pipelines.llm.seer_gate import GateShape
    from draftattn.pipelines.llm.seer_training import distill as train

    # all that can be refused before the weights are loaded
    GateShape(form, 1, 1, 1, block_size, gate_dim)  # type: ignore[arg-type]
    _check_least(1, epochs=epochs, **_given(max_sequences=max_sequences))
    if not learning_rate > 0:
        raise InputError(f"learning-rate is {learning_rate}; it must be above 0")
    if length < 4 * block_size:
        raise InputError(f"length is {length}; it must be at least {4 * block_size}, four blocks of {block_size}")
    chosen = _numbers("layers", layers) if layers else None
    content = _read_text(text)
    if chosen is not None:
        count = num_layers(model)
        if wrong := [layer for layer in chosen if not -count <= layer < count]:
            raise InputError(f"layers names layer {wrong[0]}; the model has layers 0 to {count - 1}")
    tokens = _tokens(model, content)
    sequences = [part[None] for part in tokens.split(length) if len(part) == length][:max_sequences]
    if not sequences:
        raise InputError(f"the text has {len(tokens)} tokens; a sequence needs {length}")
    check_writable(output / f"{form}.json")
    loaded, device = _load(model, dtype)
    batches = [sequence.to(device) for sequence in sequences]
    console = tables.wide_console()
    with console.status("training") as status:
        result = train(
            loaded,
            batches,
            output=output,
            layers=chosen,
            epochs=epochs,
            learning_rate=learning_rate,
            block_size=block_size,
            gate_dim=gate_dim,
            form=form,  # type: ignore[arg-type]
            seed=seed,
            on_progress=status.update,
        )
    console.print_json(json.dumps(result))
    console.print(f"Wrote {output}")


def _specs(texts: list[str] | None) -> list[SystemSpec]:
    from draftattn.eval.llm_specs import parse_specs

    return parse_specs(texts or [])


def _lengths(text: str) -> list[int]:
    found = _numbers("lengths", text)
    if min(found) < 1:
        raise InputError(f"lengths are {text!r}; all must be at least 1")
    return found


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{name} is {text!r}; give whole numbers, separated by commas") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"text {str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"text {str(path)!r} is not UTF-8: {error.reason}") from error


def _given(**values: Any) -> dict[str, Any]:
    """The options that the user gave; what takes them has the defaults of the others."""
    return {name: value for name, value in values.items() if value is not None}


def _refuse(given: dict[str, Any], reason: str) -> None:
    for name, value in given.items():
        raise InputError(f"{name.replace('_', '-')} is {value}; {reason}")


def _check_least(least: int, **values: float) -> None:
    for name, value in values.items():
        if not value >= least:
            raise InputError(f"{name.replace('_', '-')} is {value}; it must be at least {least}")


def _tokenizer(model: str) -> Any:
    from draftattn.eval.language_models import load_tokenizer

    return load_tokenizer(model)


def _tokens(model: str, content: str) -> Tensor:
    """Ids ``[N]`` of a text, for which a model's weights are not needed."""
    return _tokenizer(model)(content, return_tensors="pt").input_ids[0]


def _load(model: str, dtype: options.Dtype) -> tuple[Any, torch.device]:
    from draftattn.eval.language_models import load_model

    device = options.default_device()
    return load_model(model, dtype=options.resolve_dtype(dtype, device), device=device), device


def _load_or_random(model: str, layers: int | None, dtype: options.Dtype) -> Any:
    from draftattn.eval.bench_llm import ARCHITECTURES, random_model

    if model in ARCHITECTURES:
        device = options.default_device()
        return random_model(model, layers, options.resolve_dtype(dtype, device), device)
    try:
        return _load(model, dtype)[0]
    except InputError as error:
        raise InputError(f"{error}; or choose {', '.join(ARCHITECTURES)} for random weights") from error


def _shown(model: str) -> str:
    """A model's name; of a file or folder without where it lies."""
    path = Path(model)
    return path.name if path.exists() else model


def _check_outputs(output: Path | None, plot: Path | None) -> None:
    for path in (output, plot):
        if path is not None:
            check_writable(path)
    if plot is not None:
        from draftattn.eval.plot_kernels import check_plot_path

        check_plot_path(plot)


def _finish(console: Console, result: dict[str, Any], output: Path | None, plot: Path | None) -> None:
    if output is not None:
        with written_whole(output) as temporary:
            temporary.write_text(json.dumps(result, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
        console.print(f"Wrote {output}")
    if plot is not None:
        from draftattn.eval.plot_llm import plot_llm

        plot_llm(result, plot)
        console.print(f"Wrote {plot}")
