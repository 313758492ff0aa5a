"""Gates on disk: a safetensors file and its description, for each form."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftattn.errors import InputError
from draftattn.files import written_whole
from draftattn.pipelines.llm.seer_gate import GateForm, GateShape, SeerGate


@dataclass(frozen=True, eq=False)
class GateSet:
    """The gates of one form.

    Args:
        shape: their sizes.
        gates: by layer.
        inv_freq: frequencies of their rotary embedding.
        training: how they were made.
    """

    shape: GateShape
    gates: dict[int, SeerGate]
    inv_freq: Tensor
    training: dict[str, Any] = field(default_factory=dict)


def save_gates(gate_set: GateSet, folder: Path) -> None:
    """Writes ``<form>.safetensors`` and then ``<form>.json``, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{layer}.{name}": x for layer, gate in gate_set.gates.items() for name, x in gate.state_dict().items()}
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    form = gate_set.shape.form
    with written_whole(folder / f"{form}.safetensors") as path:
        save_file({**tensors, "inv_freq": gate_set.inv_freq}, path)
    description = {"shape": dataclasses.asdict(gate_set.shape), "training": gate_set.training}
    with written_whole(folder / f"{form}.json") as path:
        path.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load_gates(folder: Path, form: GateForm) -> GateSet | None:
    """The gates of a form in a folder; None if it holds none.

    Raises:
        InputError: if the files do not fit together.
    """
    described, weights = folder / f"{form}.json", folder / f"{form}.safetensors"
    if not described.exists():
        return None
    try:
        description = json.loads(described.read_text(encoding="utf-8"))
        shape = GateShape(**description["shape"])
        tensors = load_file(weights)
        inv_freq = tensors.pop("inv_freq")
        layers = sorted({int(re.fullmatch(r"(\d+)\.\w+", name)[1]) for name in tensors})  # type: ignore[index]
        gates = {}
        for layer in layers:
            gates[layer] = SeerGate(shape, inv_freq)
            own = {name.partition(".")[2]: x for name, x in tensors.items() if name.partition(".")[0] == str(layer)}
            gates[layer].load_state_dict(own)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"gates in {str(folder)!r} cannot be read: {error}") from error
    return GateSet(shape, gates, inv_freq, description.get("training", {}))
