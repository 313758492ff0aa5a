"""Models with seeded random weights, built where they will run, and the inputs of their transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from draftattn.errors import InputError
from draftattn.eval.architectures import ARCHITECTURES, Part, TextEncoder, read_architecture
from draftattn.layout import TokenGrid

# Random queries and keys give nearly uniform attention, in which a wrong rotary table or mask hardly shows.
QUERY_GAIN = 8
# A typical prompt fills a part of the positions it is padded to.
PROMPT_TOKENS = 64
IMAGE_TOKENS_15 = 729


@contextmanager
def _building(dtype: torch.dtype, device: torch.device, seed: int) -> Iterator[None]:
    """New parameters get this dtype and device; random ones come from the seed."""
    torch.manual_seed(seed)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(previous)


def build_transformer(model: str, dtype: torch.dtype, device: torch.device, seed: int = 0, **changes: Any) -> nn.Module:
    """A transformer of a published architecture with seeded random weights, or the one of a pipeline.

    Args:
        model: see `draftattn.eval.architectures.read_architecture`.
        dtype: precision of the weights; parts that diffusers loads in float32 have float32.
        device: where they live.
        seed: seed of random weights.
        **changes: of the config, such as fewer layers; only for published architectures.
    """
    import diffusers

    class_name, config, _ = read_architecture(model)
    if model not in ARCHITECTURES:
        loaded: nn.Module = getattr(diffusers, class_name).from_pretrained(
            model, subfolder="transformer", dtype=dtype, use_safetensors=True
        )
        return loaded.to(device).eval()
    with _building(dtype, device, seed):
        transformer: nn.Module = getattr(diffusers, class_name)(**{**config, **changes}).eval()
    kept = getattr(transformer, "_keep_in_fp32_modules", None) or ()
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.endswith("norm_q.weight"):
                parameter.mul_(QUERY_GAIN)
            if any(part in name.split(".") for part in kept):
                parameter.data = parameter.data.float()
    return transformer.requires_grad_(False)


def build_vae(part: Part, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Any:
    """A video autoencoder with seeded random weights."""
    import diffusers

    with _building(dtype, device, seed):
        vae: nn.Module = getattr(diffusers, part.class_name)(**part.config).eval()
    return vae.requires_grad_(False)


def build_text_encoder(part: TextEncoder, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Any:
    """A text encoder with seeded random weights."""
    import transformers

    config = getattr(transformers, part.config_class)(**part.config)
    with _building(dtype, device, seed):
        encoder: nn.Module = getattr(transformers, part.class_name)(config).eval()
    return encoder.requires_grad_(False)


def latent_shape(model: str, height: int, width: int, num_frames: int) -> tuple[int, int, int, int, int]:
    """Shape of the transformer's input of a video.

    Raises:
        InputError: if the model does not take the size.
    """
    from draftattn.pipelines.video.adapter import adapter_for
    from draftattn.pipelines.video.checks import check_size

    class_name, config, vae = read_architecture(model)
    multiples = adapter_for(class_name).size_multiples(vae, config)
    check_size(multiples, height, width, num_frames)
    patch = config["patch_size"]
    space = multiples[0] // (patch if isinstance(patch, int) else patch[1])
    return 1, config["in_channels"], (num_frames - 1) // multiples[1] + 1, height // space, width // space


def example_inputs(
    transformer: Any,
    latents: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    *,
    timestep_per_token: bool = False,
) -> dict[str, Any]:
    """Random arguments of one forward pass, guidance batch of 1, text of the usual length.

    Raises:
        InputError: if there are none for this class.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    def prompt_mask(size: int, filled: int) -> Tensor:
        return (torch.arange(size, device=device) < filled)[None]

    config = transformer.config
    arguments: dict[str, Any] = {
        "hidden_states": noise(*latents),
        "timestep": torch.tensor([500], device=device),
        "return_dict": False,
    }
    match type(transformer).__name__:
        case "WanTransformer3DModel":
            arguments["encoder_hidden_states"] = noise(1, 512, config.text_dim)
            if config.image_dim is not None:
                arguments["encoder_hidden_states_image"] = noise(1, 257, config.image_dim)
            if timestep_per_token:
                tokens = token_grid(transformer, arguments).num_tokens
                arguments["timestep"] = torch.full((1, tokens), 500, device=device)
        case "HunyuanVideoTransformer3DModel":
            arguments["encoder_hidden_states"] = noise(1, 256, config.text_embed_dim)
            arguments["encoder_attention_mask"] = prompt_mask(256, PROMPT_TOKENS)
            arguments["pooled_projections"] = noise(1, config.pooled_projection_dim)
            if config.guidance_embeds:
                arguments["guidance"] = torch.tensor([6000.0], device=device, dtype=dtype)
        case "HunyuanVideo15Transformer3DModel":
            # text-to-video without quoted words: no glyphs, no image
            arguments["timestep"] = arguments["timestep"].to(dtype)
            arguments["encoder_hidden_states"] = noise(1, 1000, config.text_embed_dim)
            arguments["encoder_attention_mask"] = prompt_mask(1000, PROMPT_TOKENS).long()
            arguments["encoder_hidden_states_2"] = noise(1, 256, config.text_embed_2_dim)
            arguments["encoder_attention_mask_2"] = prompt_mask(256, 0).long()
            arguments["image_embeds"] = torch.zeros(1, IMAGE_TOKENS_15, config.image_embed_dim, device=device).to(dtype)
        case other:
            raise InputError(f"no example inputs are known for {other}")
    return arguments


def token_grid(transformer: Any, arguments: dict[str, Any]) -> TokenGrid:
    """Token grid of a forward call."""
    from draftattn.pipelines.video.adapter import adapter_for

    return adapter_for(type(transformer).__name__).token_grid(transformer, arguments)
