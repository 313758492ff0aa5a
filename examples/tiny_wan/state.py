"""The state of a training run on disk: written whole, read without pickle, continued exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from draftattn.errors import InputError
from draftattn.files import written_whole


@dataclass
class TrainingState:
    """All that changes while a network is trained.

    Args:
        modules: networks by name.
        optimizers: by name.
        generators: sources of random numbers by name.
        step: iterations done.
        elapsed: seconds spent on them, over all runs.
        curve: ``(step, elapsed seconds, loss)`` of each line on the console.
    """

    modules: Mapping[str, nn.Module]
    optimizers: Mapping[str, torch.optim.Optimizer]
    generators: Mapping[str, torch.Generator]
    step: int = 0
    elapsed: float = 0.0
    curve: list[tuple[int, float, float]] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Writes everything to one safetensors file, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            tensors |= {f"module/{name}/{key}": value for key, value in module.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            for index, slots in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{name}/{index}/{key}": torch.as_tensor(slots[key]) for key in slots}
        tensors |= {f"generator/{name}": generator.get_state() for name, generator in self.generators.items()}
        progress = {"step": self.step, "elapsed": self.elapsed, "curve": self.curve}
        with written_whole(path) as temporary:
            save_file(
                {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()},
                temporary,
                {"progress": json.dumps(progress)},
            )

    def load(self, path: Path) -> bool:
        """Takes up the state that was saved; False if there is none.

        Raises:
            InputError: if the file belongs to another recipe or is damaged.
        """
        if not path.exists():
            return False
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                progress = json.loads(file.metadata()["progress"])
            for name, module in self.modules.items():
                module.load_state_dict(_under(tensors, f"module/{name}/"))
            for name, optimizer in self.optimizers.items():
                slots: dict[int, dict[str, Any]] = {}
                for key, tensor in _under(tensors, f"optimizer/{name}/").items():
                    index, slot = key.split("/")
                    slots.setdefault(int(index), {})[slot] = tensor
                groups = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict({"state": slots, "param_groups": groups})
                _follow_layouts(optimizer)
            for name, generator in self.generators.items():
                generator.set_state(tensors[f"generator/{name}"])
        except (OSError, RuntimeError, KeyError, ValueError, SafetensorError) as error:
            raise InputError(
                f"state {str(path)!r} does not fit this recipe; take another run folder or delete it "
                f"({type(error).__name__}: {str(error)[:200]})"
            ) from error
        self.step, self.elapsed = progress["step"], progress["elapsed"]
        self.curve = [tuple(point) for point in progress["curve"]]
        return True


def _follow_layouts(optimizer: torch.optim.Optimizer) -> None:
    # the file is contiguous; optimizers are fast only if their state lies in memory as the weights do
    for weight, slots in optimizer.state.items():
        for name, value in slots.items():
            if value.shape == weight.shape:
                slots[name] = torch.empty_like(weight, requires_grad=False).copy_(value)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
