"""Published transformers at full size with random weights, and inputs for any transformer we support."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from draftattn.errors import InputError
from draftattn.layout import TokenGrid

_WAN = {
    "patch_size": (1, 2, 2),
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}

# Random queries and keys give nearly uniform attention, in which a wrong rotary table or mask hardly shows.
_QUERY_GAIN = 8

# Sizes as in the models' published configs.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "wan2.1-1.3b": (
        "WanTransformer3DModel",
        {**_WAN, "num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    ),
    "wan2.1-14b": (
        "WanTransformer3DModel",
        {**_WAN, "num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
    ),
    "hunyuanvideo": (
        "HunyuanVideoTransformer3DModel",
        {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 20, "num_single_layers": 40},
    ),
}


def read_architecture(model: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Transformer class, transformer config and VAE config of a model, before any weight exists.

    Args:
        model: a name of `ARCHITECTURES`, a folder, or a Hugging Face repository id.

    Raises:
        InputError: if the model is none of these.
    """
    from draftattn.pipelines.video.checks import component_config
    from draftattn.pipelines.video.pipeline import check_model

    if model in ARCHITECTURES:
        class_name, config = ARCHITECTURES[model]
        return class_name, config, {}  # their VAEs have the usual compression
    if not Path(model).exists() and "/" not in model:
        raise InputError(f"model is {model!r}; give a folder, a repository id, or {', '.join(ARCHITECTURES)}")
    class_name = check_model(model)["transformer"][1]
    return class_name, component_config(model, "transformer"), component_config(model, "vae")


def build_transformer(model: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> nn.Module:
    """A transformer of a published architecture with seeded random weights, or the one of a pipeline.

    Args:
        model: see `read_architecture`.
        dtype: precision of the weights.
        device: where they live.
        seed: seed of random weights.
    """
    import diffusers

    class_name, config, _ = read_architecture(model)
    if model not in ARCHITECTURES:
        loaded: nn.Module = getattr(diffusers, class_name).from_pretrained(
            model, subfolder="transformer", dtype=dtype, use_safetensors=True
        )
        return loaded.to(device).eval()
    torch.manual_seed(seed)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            transformer: nn.Module = getattr(diffusers, class_name)(**config).eval()
    finally:
        torch.set_default_dtype(previous)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.endswith("norm_q.weight"):
                parameter.mul_(_QUERY_GAIN)
    return transformer


def latent_shape(model: str, height: int, width: int, num_frames: int) -> tuple[int, int, int, int, int]:
    """Shape of the latents of a video.

    Raises:
        InputError: if the model does not take the size.
    """
    from draftattn.pipelines.video.adapter import adapter_for
    from draftattn.pipelines.video.checks import check_size

    class_name, config, vae = read_architecture(model)
    multiples = adapter_for(class_name).size_multiples(vae, config)
    check_size(multiples, height, width, num_frames)
    patch = config.get("patch_size", 2)
    space = multiples[0] // (patch if isinstance(patch, int) else patch[1])
    return 1, config.get("in_channels", 16), (num_frames - 1) // multiples[1] + 1, height // space, width // space


def example_inputs(
    transformer: Any, latents: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0
) -> dict[str, Any]:
    """Random arguments of one forward pass, guidance batch of 1, text of the usual length.

    Raises:
        InputError: if there are none for this class.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

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
        case "HunyuanVideoTransformer3DModel":
            arguments["encoder_hidden_states"] = noise(1, 256, config.text_embed_dim)
            # A typical prompt fills a quarter of the text positions.
            arguments["encoder_attention_mask"] = (torch.arange(256, device=device) < 64)[None]
            arguments["pooled_projections"] = noise(1, config.pooled_projection_dim)
            if config.guidance_embeds:
                arguments["guidance"] = torch.tensor([6000.0], device=device, dtype=dtype)
        case other:
            raise InputError(f"no example inputs are known for {other}")
    return arguments


def token_grid(transformer: Any, arguments: dict[str, Any]) -> TokenGrid:
    """Token grid of a forward call."""
    from draftattn.pipelines.video.adapter import adapter_for

    return adapter_for(type(transformer).__name__).token_grid(transformer, arguments)
