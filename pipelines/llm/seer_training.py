"""Self-distillation of SeerAttention's gates: the model stays as it is, and its own attention is what they learn."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from draftattn.errors import InputError
from draftattn.files import written_whole
from draftattn.pipelines.llm.apply import apply, attention_layers
from draftattn.pipelines.llm.seer_gate import GateForm, GateShape, SeerGate, gate_frequencies
from draftattn.pipelines.llm.seer_targets import AllSampled, GateSample, GateTargets, gate_loss
from draftattn.pipelines.llm.seer_weights import GateSet, save_gates

Progress = Callable[[str], None]


def distill(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    *,
    output: str | Path,
    layers: Sequence[int] | None = None,
    epochs: int = 1,
    learning_rate: float = 1e-3,
    block_size: int = 64,
    gate_dim: int = 128,
    form: GateForm = "prefill",
    seed: int = 0,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains gates for ``apply(model, "seer", gates=output)``. Source: SeerAttention, arXiv 2410.13276.

    The model runs densely over the texts, its weights untouched; each layer's gate learns the largest probability of
    every pair of blocks by AdamW with a learning rate that falls to 0 along a cosine. With one epoch nothing is kept
    between texts. With more, every layer's pooled queries, keys and targets of all texts stay in main memory (of a
    text of N tokens and n = N / block_size blocks about ``4 n (n H + D (H + 3 H_kv))`` bytes a layer), so that the
    model runs over each text once.

    After every epoch the state is saved; called again with the same settings, a run that was stopped goes on, and one
    that had finished returns at once.

    Args:
        model: the model, on the device to train on. What was applied to it is removed first.
        batches: token ids ``[B, N]`` without padding, each of at least four blocks.
        output: folder that gets ``<form>.safetensors`` and ``<form>.json``. It may hold the gates of the other form.
        layers: layers to train gates for; negative numbers count from the end. None for all.
        epochs: how often to go through the texts.
        learning_rate: at the beginning.
        block_size: tokens of a block, at most 128.
        gate_dim: channels in which a gate compares queries and keys.
        form: ``"prefill"``, or ``"decode"`` for single queries (SeerAttention-R, arXiv 2506.08889).
        seed: of the gates' first weights, the order of texts and the choice of single queries.
        on_progress: called with a line after every epoch.

    Returns:
        What ``<form>.json`` holds as ``training``: layers, epochs, and the mean loss of every epoch.

    Raises:
        InputError: if a setting is out of range, the model cannot be hooked, or ``output`` holds another run.

    >>> import tempfile
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    ... )
    >>> model, text = LlamaForCausalLM(config), torch.randint(1, 32, (1, 70))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     training = distill(model, [text], output=folder, layers=[1], block_size=16, gate_dim=8)
    ...     with apply(model, "seer", gates=folder, ratio=0.5):
    ...         logits = model(text).logits
    >>> len(training["loss"]), logits.shape
    (1, torch.Size([1, 70, 32]))
    """
    settings, shape = _settings(
        model, batches, layers, epochs, learning_rate, GateShape(form, *_heads(model), block_size, gate_dim), seed
    )
    folder = Path(output)
    finished = folder / f"{form}.json"
    if finished.exists():
        training = json.loads(finished.read_text(encoding="utf-8"))["training"]
        if training.get("settings") != settings:
            raise InputError(f"output {str(folder)!r} holds {form} gates of other settings; give another folder")
        return training
    run = _Run(model, shape, tuple(settings["layers"]), settings, folder / f"{form}.unfinished.safetensors")
    run.resume()
    kept: dict[int, list[tuple[int, GateSample]]] = {}
    while run.epoch < epochs:
        order = list(range(len(batches)))
        random.Random(f"{seed} {run.epoch}").shuffle(order)
        losses = [
            loss
            for index in order
            for loss in run.train(_samples(run, batches, index, kept, keep=epochs > 1), len(batches) * epochs)
        ]
        run.end_epoch(sum(losses) / len(losses))
        if on_progress is not None:
            on_progress(f"epoch {run.epoch} of {epochs}: loss {run.losses[-1]:.4f}")
    training = {"settings": settings, "loss": run.losses}
    save_gates(GateSet(shape, run.gates, run.inv_freq, training), folder)
    run.state_file.unlink(missing_ok=True)
    return training


class _Run:
    """Gates, optimizer and where the training stands."""

    def __init__(
        self, model: PreTrainedModel, shape: GateShape, layers: tuple[int, ...], settings: dict[str, Any], state: Path
    ) -> None:
        self.model, self.shape, self.settings, self.state_file = model, shape, settings, state
        parameters: Any = model.config.get_text_config(decoder=True).rope_parameters
        rotary = next(x for name, x in model.named_buffers() if name.rpartition(".")[2] == "inv_freq")
        self.inv_freq = gate_frequencies(rotary, shape.gate_dim, float(parameters["rope_theta"]))
        generator = torch.Generator().manual_seed(settings["seed"])
        self.gates = {layer: SeerGate(shape, self.inv_freq, generator) for layer in layers}
        for gate in self.gates.values():
            gate.to(model.device)
        self.optimizers = {
            layer: torch.optim.AdamW(gate.parameters(), lr=settings["learning_rate"])
            for layer, gate in self.gates.items()
        }
        self.epoch, self.step = 0, 0
        self.losses: list[float] = []

    def samples(self, batch: Tensor, index: int) -> list[tuple[int, GateSample]]:
        """Every layer's sample of a batch, from one run of the model."""
        found: list[tuple[int, GateSample]] = []
        seed = self.settings["seed"] * 1_000_003 + index
        system = GateTargets(self.shape, tuple(self.gates), lambda layer, x: found.append((layer, x)), seed, stop=True)
        was_training = self.model.training
        self.model.eval()
        with apply(self.model, system), torch.no_grad(), contextlib.suppress(AllSampled):
            self.model.base_model(batch.to(self.model.device), use_cache=False)
        self.model.train(was_training)
        return found

    def train(self, samples: Iterator[tuple[int, GateSample]], total_steps: int) -> list[float]:
        """One step of every layer's gate."""
        rate = self.settings["learning_rate"] * 0.5 * (1 + math.cos(math.pi * self.step / total_steps))
        losses = []
        for layer, sample in samples:
            optimizer = self.optimizers[layer]
            optimizer.param_groups[0]["lr"] = rate
            with torch.enable_grad():
                loss = gate_loss(self.gates[layer], sample.to(self.model.device))
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            losses.append(loss.item())
        self.step += 1
        return losses

    def end_epoch(self, loss: float) -> None:
        """Saves weights, moments and progress in one file, whole or not at all."""
        self.epoch += 1
        self.losses.append(loss)
        tensors = {}
        for layer, gate in self.gates.items():
            moments = self.optimizers[layer].state_dict()["state"]
            for index, (name, weight) in enumerate(gate.named_parameters()):
                tensors[f"{layer}.{name}"] = weight.detach().cpu().contiguous()
                for moment, x in moments[index].items():
                    tensors[f"{layer}.{name}.{moment}"] = x.detach().cpu().contiguous()
        progress = {"settings": self.settings, "epoch": self.epoch, "step": self.step, "loss": self.losses}
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(self.state_file) as path:
            save_file(tensors, path, metadata={"progress": json.dumps(progress)})

    def resume(self) -> None:
        """Goes on where a run of the same settings stopped, if there is one."""
        if not self.state_file.exists():
            return
        with safe_open(self.state_file, framework="pt") as file:
            progress = json.loads(file.metadata()["progress"])
            if progress["settings"] != self.settings:
                raise InputError(
                    f"{str(self.state_file)!r} is an unfinished run of other settings; remove it or give another folder"
                )
            self.epoch, self.step, self.losses = progress["epoch"], progress["step"], progress["loss"]
            names = set(file.keys())
            for layer, gate in self.gates.items():
                optimizer, state = self.optimizers[layer], {}
                for index, (name, weight) in enumerate(gate.named_parameters()):
                    prefix = f"{layer}.{name}"
                    weight.data.copy_(file.get_tensor(prefix))
                    moments = [x.rpartition(".")[2] for x in names if x.startswith(f"{prefix}.")]
                    state[index] = {moment: file.get_tensor(f"{prefix}.{moment}") for moment in moments}
                optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _samples(
    run: _Run, batches: Sequence[Tensor], index: int, kept: dict[int, list[tuple[int, GateSample]]], keep: bool
) -> Iterator[tuple[int, GateSample]]:
    if index in kept:
        yield from kept[index]
        return
    made = []
    for layer, sample in run.samples(batches[index], index):
        if keep:
            made.append((layer, sample.to("cpu")))
        yield layer, sample
    if keep:
        kept[index] = made


def _heads(model: PreTrainedModel) -> tuple[int, int, int]:
    text: Any = model.config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    return heads, text.num_key_value_heads, getattr(text, "head_dim", None) or text.hidden_size // heads


def _settings(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    layers: Sequence[int] | None,
    epochs: int,
    learning_rate: float,
    shape: GateShape,
    seed: int,
) -> tuple[dict[str, Any], GateShape]:
    """Checked settings as they are written, by which a stopped run is known again."""
    count = len(attention_layers(model))
    chosen = range(count) if layers is None else layers
    if wrong := [layer for layer in chosen if not -count <= layer < count]:
        raise InputError(f"layers names layer {wrong[0]}; the model has layers 0 to {count - 1}")
    if epochs < 1 or not learning_rate > 0:
        raise InputError(f"epochs is {epochs} and learning_rate {learning_rate}; allowed are 1 or more and more than 0")
    if not batches or not chosen:
        raise InputError("there are no texts or no layers to train on; at least one of each is needed")
    digest = hashlib.sha256()
    for batch in batches:
        if batch.ndim != 2 or batch.shape[1] < 4 * shape.block_size:
            raise InputError(
                f"a batch of token ids is {list(batch.shape)}; it must be [batch, tokens] of at least "
                f"{4 * shape.block_size} tokens, four blocks"
            )
        digest.update(str(list(batch.shape)).encode() + batch.cpu().long().numpy().tobytes())
    settings = {
        "model": model.config.name_or_path or type(model).__name__,
        "layers": sorted({layer % count for layer in chosen}),
        "epochs": epochs,
        "learning_rate": learning_rate,
        "block_size": shape.block_size,
        "gate_dim": shape.gate_dim,
        "form": shape.form,
        "seed": seed,
        "texts": digest.hexdigest(),
    }
    return settings, shape
