"""``draftattn doctor``: what works on this machine, and why the rest does not."""

from __future__ import annotations

from typing import get_args

import torch
from rich.console import Console
from rich.table import Table

from draftattn.kernels.backends import BackendName, choose_backend, reasons_against, reasons_against_platform


def doctor() -> None:
    """Show versions, GPUs, and which attention kernels can serve here."""
    from draftattn.eval.environment import package_versions

    console = Console()
    versions = Table("package", "version", title="Versions", title_justify="left")
    for package, found in package_versions().items():
        versions.add_row(package, found or "[red]not installed[/red]")
    versions.add_row("ffmpeg", _ffmpeg_version())
    console.print(versions)

    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        console.print(f"\n[bold]{_describe(device)}[/bold]")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        example = torch.empty(1, 128, 1, 128, dtype=dtype, device=device)
        chosen = choose_backend("auto", example, example, example)
        kernels = Table("kernel", "", "why")
        for name in get_args(BackendName):
            if name == "auto":
                continue
            reasons = reasons_against_platform(name) or reasons_against(name, example, example, example)
            if name == chosen:
                verdict, why = "[green]chosen[/green]", "the fastest that can serve here"
            elif reasons:
                verdict, why = "[red]cannot[/red]", "; ".join(reasons)
            else:
                verdict, why = "can", "plain torch, slow: for checking" if name == "reference" else ""
            kernels.add_row(name, verdict, why)
        console.print(kernels)


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
