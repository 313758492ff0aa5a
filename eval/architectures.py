"""Published video models at full size: their parts as configurations, without any weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftattn.errors import InputError


@dataclass(frozen=True)
class Part:
    """A model of diffusers or transformers.

    Args:
        class_name: its class.
        config: what differs from the class's defaults.
    """

    class_name: str
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TextEncoder(Part):
    """A text encoder and what a pipeline gives it.

    Args:
        config_class: the class of its config, of transformers.
        num_tokens: tokens of a padded prompt.
        has_negative: whether a pipeline with guidance encodes a negative prompt too.
    """

    config_class: str = ""
    num_tokens: int = 512
    has_negative: bool = True


@dataclass(frozen=True)
class Recipe:
    """How a model's authors and diffusers' documentation run it.

    Args:
        height: pixels.
        width: pixels.
        num_frames: frames.
        num_steps: denoising steps.
        guidance_passes: forward passes of a step with guidance: 2, or 1 where guidance is an input of the model.
        tiled_decode: whether the autoencoder decodes in overlapping tiles.
    """

    height: int
    width: int
    num_frames: int
    num_steps: int = 50
    guidance_passes: int = 2
    tiled_decode: bool = False


@dataclass(frozen=True)
class Architecture:
    """A video model.

    Args:
        transformer: the denoiser.
        vae: the video autoencoder.
        text_encoders: in the order they run.
        recipe: how it is run.
        num_transformers: transformers of this size that share the steps between them.
        timestep_per_token: whether the pipeline passes one timestep for every token.
    """

    transformer: Part
    vae: Part
    text_encoders: tuple[TextEncoder, ...]
    recipe: Recipe
    num_transformers: int = 1
    timestep_per_token: bool = False


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
_WAN_14B = Part("WanTransformer3DModel", {**_WAN, "num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824})
_WAN_VAE = Part("AutoencoderKLWan")
_WAN_22_VAE = Part(
    "AutoencoderKLWan",
    {
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": [0.0] * 48,
        "latents_std": [1.0] * 48,
    },
)
_UMT5_XXL = TextEncoder(
    "UMT5EncoderModel",
    {
        "vocab_size": 256384,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    },
    config_class="UMT5Config",
)
_LLAMA_3_8B = TextEncoder(
    "LlamaModel",
    {
        "vocab_size": 128320,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    config_class="LlamaConfig",
    num_tokens=256 + 95,  # the prompt and the template before it
    has_negative=False,
)
_CLIP_L = TextEncoder(
    "CLIPTextModel",
    {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768},
    config_class="CLIPTextConfig",
    num_tokens=77,
    has_negative=False,
)
_QWEN_25_VL_7B = TextEncoder(
    "Qwen2_5_VLTextModel",
    {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_window_layers": 28,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    config_class="Qwen2_5_VLTextConfig",
    num_tokens=1000 + 108,
)
_BYT5_SMALL = TextEncoder(
    "T5EncoderModel",
    {
        "vocab_size": 384,
        "d_model": 1472,
        "d_kv": 64,
        "d_ff": 3584,
        "num_layers": 12,
        "num_heads": 6,
        "feed_forward_proj": "gated-gelu",
    },
    config_class="T5Config",
    num_tokens=256,
    has_negative=False,  # glyphs are read from the prompt's quotation marks
)

# Sizes as in the models' published configs.
ARCHITECTURES: dict[str, Architecture] = {
    "wan2.1-1.3b": Architecture(
        Part("WanTransformer3DModel", {**_WAN, "num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}),
        _WAN_VAE,
        (_UMT5_XXL,),
        Recipe(480, 832, 81),
    ),
    "wan2.1-14b": Architecture(_WAN_14B, _WAN_VAE, (_UMT5_XXL,), Recipe(720, 1280, 81)),
    "wan2.2-a14b": Architecture(
        _WAN_14B, _WAN_VAE, (_UMT5_XXL,), Recipe(720, 1280, 81, num_steps=40), num_transformers=2
    ),
    "wan2.2-ti2v-5b": Architecture(
        Part(
            "WanTransformer3DModel",
            {
                **_WAN,
                "num_attention_heads": 24,
                "num_layers": 30,
                "ffn_dim": 14336,
                "in_channels": 48,
                "out_channels": 48,
            },
        ),
        _WAN_22_VAE,
        (_UMT5_XXL,),
        Recipe(704, 1280, 121),
        timestep_per_token=True,
    ),
    "hunyuanvideo": Architecture(
        Part(
            "HunyuanVideoTransformer3DModel",
            {
                "num_attention_heads": 24,
                "attention_head_dim": 128,
                "num_layers": 20,
                "num_single_layers": 40,
                "in_channels": 16,
                "patch_size": 2,
            },
        ),
        Part("AutoencoderKLHunyuanVideo"),
        (_LLAMA_3_8B, _CLIP_L),
        Recipe(720, 1280, 129, guidance_passes=1, tiled_decode=True),
    ),
    "hunyuanvideo-1.5": Architecture(
        Part(
            "HunyuanVideo15Transformer3DModel",
            {
                "num_attention_heads": 16,
                "attention_head_dim": 128,
                "num_layers": 54,
                "in_channels": 65,
                "patch_size": 1,
                "task_type": "t2v",
            },
        ),
        Part("AutoencoderKLHunyuanVideo15"),
        (_QWEN_25_VL_7B, _BYT5_SMALL),
        Recipe(480, 848, 121, tiled_decode=True),
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
        architecture = ARCHITECTURES[model]
        return architecture.transformer.class_name, dict(architecture.transformer.config), dict(architecture.vae.config)
    if not Path(model).exists() and "/" not in model:
        raise InputError(f"model is {model!r}; give a folder, a repository id, or {', '.join(ARCHITECTURES)}")
    class_name = check_model(model)["transformer"][1]
    return class_name, component_config(model, "transformer"), component_config(model, "vae")


def recipe_of(model: str) -> Recipe:
    """How a model is run: its own recipe, or for a folder or repository that of its family.

    Raises:
        InputError: if the model is none of these.
    """
    if model in ARCHITECTURES:
        return ARCHITECTURES[model].recipe
    class_name = read_architecture(model)[0]
    for architecture in ARCHITECTURES.values():
        if architecture.transformer.class_name == class_name:
            return architecture.recipe
    raise InputError(f"no recipe is known for {class_name}")
