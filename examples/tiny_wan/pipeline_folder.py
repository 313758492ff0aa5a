"""The finished pipeline as a folder that stock diffusers loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline

from .text import build_text_encoder, build_tokenizer

# Hosts of repositories dislike large files; parts below this pass everywhere.
MAX_SHARD_SIZE = "15MB"


def assemble(vae: Any | None, transformer: Any | None, flow_shift: float = 3.0) -> Any:
    """A text-to-video pipeline of these networks, with the text side and the scheduler."""
    tokenizer = build_tokenizer()
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)
    return WanPipeline(tokenizer, build_text_encoder(len(tokenizer)), vae, scheduler, transformer)


def save_pipeline(pipe: Any, folder: Path) -> None:
    """Writes the pipeline in bfloat16 and safetensors; an older folder is replaced only by a whole one."""
    temporary = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    pipe.to(torch.bfloat16).save_pretrained(temporary, max_shard_size=MAX_SHARD_SIZE)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
