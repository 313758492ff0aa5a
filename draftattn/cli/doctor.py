"""``draftattn doctor``: what works on this machine, and why the rest does not."""

from __future__ import annotations

import warnings
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from draftattn.kernels import fa4
from draftattn.kernels.backends import BackendName, choose_backend, reasons_against, reasons_against_platform
from draftattn.kernels.block_mask import BlockMask


def doctor() -> None:
    """Show versions, GPUs, and which attention kernels can serve here."""
    from draftattn.eval.environment import package_versions

    console = Console()
    versions = Table("package", "version", title="Versions", title_justify="left")
    for package, found in package_versions().items():
        versions.add_row(package, found or "[red]not installed[/red]")
    versions.add_row("flash-attn-4", fa4.installed_version() or "not installed (optional)")
    versions.add_row("ffmpeg", _ffmpeg_version())
    console.print(versions)

    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        console.print(f"\n[bold]{_describe(device)}[/bold]")
        console.print(_kernels(device))
        console.print("[green]chosen[/green] is what auto takes; the rest a backend's name takes, where it can.\n")
        for name, why in _refusals(device).items():
            console.print(f"[bold]{name}[/bold]: {why}", highlight=False)


CALLS: dict[str, dict[str, Any]] = {
    "bf16, D 128": {},
    "D 64": {"head_dim": 64},
    "fp32": {"dtype": torch.float32},
    "residual": {"residual": True},
    "gradient": {"gradient": True},
}


def _example(
    device: torch.device,
    *,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    residual: bool = False,
    gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None, BlockMask]:
    """What a kernel would be asked: one whole block, causal or not, for that decides nothing."""
    query = torch.zeros(1, 128, 1, head_dim, dtype=dtype, device=device, requires_grad=gradient)
    means = torch.zeros(1, 1, 1, head_dim, dtype=dtype, device=device)
    offsets = torch.tensor([0, 128], dtype=torch.int32, device=device)
    block_map = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    mask = BlockMask.from_block_map(block_map, offsets, offsets)
    return query, query, query, (means, means) if residual else None, mask


def _backends() -> list[BackendName]:
    return [name for name in get_args(BackendName) if name != "auto"]


def _reasons(name: BackendName, device: torch.device, call: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(reasons_against_platform(name) + reasons_against(name, *_example(device, **call))))


def _kernels(device: torch.device) -> Table:
    """Who serves typical calls, causal or not."""
    table = Table("kernel", *CALLS)
    chosen = {}
    for label, call in CALLS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that auto fell back to the reference is what the table says
            chosen[label] = choose_backend("auto", *_example(device, **call))
    for name in _backends():
        cells = []
        for label, call in CALLS.items():
            if chosen[label] == name:
                cells.append("[green]chosen[/green]")
            elif _reasons(name, device, call):
                cells.append("[red]no[/red]")
            else:
                cells.append("slow" if name == "reference" else "can")
        table.add_row(name, *cells)
    return table


def _refusals(device: torch.device) -> dict[str, str]:
    """Why kernels cannot serve: what stands against every call first, then what only some meet."""
    found: dict[str, str] = {}
    for name in _backends():
        by_call = {label: _reasons(name, device, call) for label, call in CALLS.items()}
        always = [reason for reason in next(iter(by_call.values())) if all(reason in x for x in by_call.values())]
        parts = ["; ".join(always)] if always else []
        for label, reasons in by_call.items():
            if rest := [reason for reason in reasons if reason not in always]:
                parts.append(f"{label}: {'; '.join(rest)}")
        if parts:
            found[name] = " | ".join(parts)
    return found


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return f"No GPU; CPU with {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    return (
        f"GPU {device.index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
        f"compute capability {properties.major}.{properties.minor}"
    )


def _ffmpeg_version() -> str:
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_version()
    except (ImportError, RuntimeError) as error:
        return f"[red]not found: {error}[/red]"
