"""What every command that runs a pipeline is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from draftattn.cli import options
from draftattn.cli.grid import PROMPT_PANEL
from draftattn.errors import InputError

Model = Annotated[str, typer.Option(help="Folder in diffusers' layout, or Hugging Face repository id.")]
NegativePrompt = Annotated[str | None, typer.Option(help="What the videos should not show.")]
Image = Annotated[Path | None, typer.Option(help="First frame, for image-to-video models.")]
Height = Annotated[int | None, typer.Option(help="Pixels. Default: the pipeline's.")]
Width = Annotated[int | None, typer.Option(help="Pixels. Default: the pipeline's.")]
Frames = Annotated[int | None, typer.Option(help="Number of frames. Default: the pipeline's.")]
Steps = Annotated[int, typer.Option(help="Denoising steps.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale. Default: the pipeline's.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
Seeds = Annotated[str, typer.Option(help="Seeds of the noise, such as 0,1.", rich_help_panel=PROMPT_PANEL)]
Fps = Annotated[int, typer.Option(help="Frames per second of the files.")]
DtypeOption = Annotated[options.Dtype, typer.Option(help="auto: bfloat16 on a GPU, float32 on a CPU.")]
OffloadOption = Annotated[
    options.Offload, typer.Option(help="Keep weights on the CPU: by whole models, or by layers (slower, least memory).")
]
VaeTiling = Annotated[bool, typer.Option("--vae-tiling", help="Decode in tiles, for less memory.")]
CompileBlocks = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile the transformer's blocks, for dense attention too: norms, rotary embedding and modulation become "
        "few kernels, which saves a sixth to a third of a sparse step of a large model. The first step takes a "
        "minute or so longer. Not with --offload sequential.",
    ),
]


def check_compile(compile_blocks: bool, offload: options.Offload) -> None:
    """Checks that blocks can be compiled where weights wait as asked for.

    Raises:
        InputError: if they cannot.
    """
    if compile_blocks and offload is options.Offload.sequential:
        raise InputError(
            "offload is 'sequential' with --compile; it moves weights in the middle of the blocks, which a compiled "
            "block cannot do, so use --offload model"
        )
