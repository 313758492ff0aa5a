"""Random video models of a few thousand parameters, and what tests look at in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    LlamaTokenizerFast,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from draftattn import DraftConfig
from draftattn.kernels import api
from draftattn.layout import TokenGrid
from draftattn.pipelines.video import dispatch

CHANNELS = 4
TEXT_DIM = 16
BLOCK_SIZE = 16
# Grids that 16-token tiles do not divide, with one that they do.
GRIDS = [TokenGrid(3, 5, 7), TokenGrid(2, 4, 8), TokenGrid(3, 1, 5)]
CHARACTERS = "abcdefghijklmnopqrstuvwxyz"


def config(**settings: Any) -> DraftConfig:
    """Sparse from the first step on, in blocks small enough for tiny grids."""
    return DraftConfig(**{"sparsity": 0.6, "warmup": 0, "block_size": BLOCK_SIZE, **settings})


def wan_transformer(seed: int = 0, **changes: Any) -> WanTransformer3DModel:
    """Three layers of two heads."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_dim": TEXT_DIM,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 3,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }
    return WanTransformer3DModel(**{**settings, **changes}).eval()


def wan_i2v_transformer(seed: int = 0) -> WanTransformer3DModel:
    """Image-to-video as in Wan2.1: 36 channels in, image tokens in cross-attention."""
    return wan_transformer(seed, in_channels=36, out_channels=16, image_dim=8, added_kv_proj_dim=32)


def hunyuan_transformer(seed: int = 0, **changes: Any) -> HunyuanVideoTransformer3DModel:
    """Two dual-stream and two single-stream layers of two heads."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "text_embed_dim": TEXT_DIM,
        "pooled_projection_dim": TEXT_DIM,
        "rope_axes_dim": (4, 6, 6),
    }
    return HunyuanVideoTransformer3DModel(**{**settings, **changes}).eval()


def hunyuan_15_transformer(seed: int = 0, **changes: Any) -> HunyuanVideo15Transformer3DModel:
    """Three layers of two heads, patches of one."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 3,
        "num_refiner_layers": 1,
        "text_embed_dim": TEXT_DIM,
        "text_embed_2_dim": 8,
        "image_embed_dim": 8,
        "rope_axes_dim": (4, 6, 6),
    }
    return HunyuanVideo15Transformer3DModel(**{**settings, **changes}).eval()


def wan_inputs(grid: TokenGrid, batch: int = 1, per_token_timesteps: bool = False) -> dict[str, Any]:
    """Arguments of a Wan forward."""
    generator = torch.Generator().manual_seed(1)
    timestep = torch.full((batch,), 500)
    if per_token_timesteps:  # the first frame is given, as in Wan2.2-5B image-to-video
        frame_of_token = torch.arange(grid.frames).repeat_interleave(grid.height * grid.width)
        timestep = torch.where(frame_of_token == 0, 0, 500).expand(batch, -1)
    return {
        "hidden_states": _latents(grid, batch, CHANNELS, generator),
        "timestep": timestep,
        "encoder_hidden_states": torch.randn(batch, 6, TEXT_DIM, generator=generator),
        "return_dict": False,
    }


def wan_i2v_inputs(grid: TokenGrid, batch: int = 1) -> dict[str, Any]:
    """Arguments of a Wan2.1 image-to-video forward; it always takes 512 text tokens."""
    generator = torch.Generator().manual_seed(1)
    return {
        **wan_inputs(grid, batch),
        "hidden_states": _latents(grid, batch, 36, generator),
        "encoder_hidden_states": torch.randn(batch, 512, TEXT_DIM, generator=generator),
        "encoder_hidden_states_image": torch.randn(batch, 5, 8, generator=generator),
    }


def hunyuan_inputs(grid: TokenGrid, lengths: tuple[int, ...] = (9,), num_text_tokens: int = 20) -> dict[str, Any]:
    """Arguments of a HunyuanVideo forward whose prompts fill ``lengths`` of the text tokens."""
    generator = torch.Generator().manual_seed(1)
    batch = len(lengths)
    return {
        "hidden_states": _latents(grid, batch, CHANNELS, generator),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, num_text_tokens, TEXT_DIM, generator=generator),
        "encoder_attention_mask": (torch.arange(num_text_tokens) < torch.tensor(lengths)[:, None]).float(),
        "pooled_projections": torch.randn(batch, TEXT_DIM, generator=generator),
        "guidance": torch.full((batch,), 6000.0),
        "return_dict": False,
    }


def hunyuan_15_inputs(
    grid: TokenGrid,
    lengths: tuple[int, ...] = (5,),
    glyphs: tuple[int, ...] | None = None,
    *,
    has_image: bool = False,
    num_text_tokens: int = 12,
    padding_side: str = "right",
) -> dict[str, Any]:
    """Arguments of a HunyuanVideo-1.5 forward; ``glyphs`` are the lengths of the second text, none by default."""
    generator = torch.Generator().manual_seed(1)
    batch, num_image_tokens = len(lengths), 7

    def mask(filled: tuple[int, ...], size: int) -> Tensor:
        found = (torch.arange(size) < torch.tensor(filled)[:, None]).long()
        return found if padding_side == "right" else found.flip(1)

    image = torch.randn(batch, num_image_tokens, 8, generator=generator)
    return {
        "hidden_states": _latents(grid, batch, CHANNELS, generator, patch=1),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, num_text_tokens, TEXT_DIM, generator=generator),
        "encoder_attention_mask": mask(lengths, num_text_tokens),
        "encoder_hidden_states_2": torch.randn(batch, 6, 8, generator=generator),
        "encoder_attention_mask_2": mask((0,) * batch if glyphs is None else glyphs, 6),
        "image_embeds": image if has_image else torch.zeros_like(image),
        "return_dict": False,
    }


def _latents(grid: TokenGrid, batch: int, channels: int, generator: torch.Generator, patch: int = 2) -> Tensor:
    return torch.randn(batch, channels, grid.frames, patch * grid.height, patch * grid.width, generator=generator)


@torch.no_grad()
def run(transformer: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """One forward."""
    return transformer(**inputs)[0]


def _text_encoder() -> tuple[T5TokenizerFast, UMT5EncoderModel]:
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in CHARACTERS)]
    tokenizer = T5TokenizerFast(vocab=vocabulary, extra_ids=0)
    size = {"d_model": TEXT_DIM, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return tokenizer, UMT5EncoderModel(UMT5Config(vocab_size=len(vocabulary), **size)).eval()


def _wan_vae(z_dim: int = CHANNELS) -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=z_dim,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * z_dim,
        latents_std=[1.0] * z_dim,
    ).eval()


def wan_pipeline(*transformers: nn.Module, **settings: Any) -> WanPipeline:
    """A whole pipeline around one transformer, or around two as in Wan2.2-A14B."""
    torch.manual_seed(0)
    transformers = transformers or (wan_transformer(),)
    tokenizer, text_encoder = _text_encoder()
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=_wan_vae(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=transformers[0],
        transformer_2=transformers[1] if len(transformers) > 1 else None,
        **settings,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan_i2v_pipeline() -> WanImageToVideoPipeline:
    """Image-to-video with an image encoder of 5 tokens."""
    torch.manual_seed(0)
    vision = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer, text_encoder = _text_encoder()
    pipe = WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=_wan_vae(16),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=wan_i2v_transformer(),
        image_encoder=CLIPVisionModel(CLIPVisionConfig(image_size=16, patch_size=8, **vision)).eval(),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16, do_rescale=False),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def hunyuan_pipeline() -> HunyuanVideoPipeline:
    """A whole pipeline; its prompts need `HUNYUAN_TEMPLATE`."""
    torch.manual_seed(0)
    pieces = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *CHARACTERS]
    llama_tokenizer = LlamaTokenizerFast(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], pad_token="<pad>", padding_side="right"
    )
    pieces = ["<|startoftext|>", "<|endoftext|>", *CHARACTERS, *(f"{c}</w>" for c in CHARACTERS)]
    clip_tokenizer = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77)
    size = {"hidden_size": TEXT_DIM, "intermediate_size": 16, "num_attention_heads": 2}
    llama = LlamaModel(LlamaConfig(vocab_size=300, num_hidden_layers=3, pad_token_id=3, **size)).eval()
    clip = CLIPTextModel(CLIPTextConfig(vocab_size=len(pieces), num_hidden_layers=1, eos_token_id=1, **size)).eval()
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=CHANNELS, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=4
    ).eval()
    pipe = HunyuanVideoPipeline(
        text_encoder=llama,
        tokenizer=llama_tokenizer,
        transformer=hunyuan_transformer(),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip,
        tokenizer_2=clip_tokenizer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


# 5×7 tokens a frame, 3 frames of latents.
SIZE = {"height": 80, "width": 112, "num_frames": 9}
HUNYUAN_TEMPLATE = {"template": "{}", "crop_start": 0}


def generate(pipe: Any, prompt: str | list[str] | None = "a red cup", **arguments: Any) -> Tensor:
    """Latents of a short run with a fixed seed."""
    defaults: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "max_sequence_length": 12, **SIZE}
    if isinstance(pipe, HunyuanVideoPipeline):
        defaults |= {"prompt_template": HUNYUAN_TEMPLATE}
    if isinstance(pipe, WanImageToVideoPipeline):
        image = torch.rand(1, 3, SIZE["height"], SIZE["width"], generator=torch.Generator().manual_seed(2))
        # given as embeddings: diffusers cleans prompts for this pipeline with ftfy, which need not be installed
        embeds = torch.randn(2, 1, 512, TEXT_DIM, generator=torch.Generator().manual_seed(4)).unbind()
        defaults |= {"image": image, "prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
        prompt = None
    generator = torch.Generator().manual_seed(3)
    return pipe(prompt=prompt, generator=generator, **{**defaults, **arguments}).frames


@contextmanager
def spy_on_kernel() -> Iterator[list[Any]]:
    """Notes the block mask of every block-sparse kernel call."""
    masks: list[Any] = []
    original = api.block_sparse_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, block_mask: Any, **options: Any) -> Any:
        masks.append(block_mask)
        return original(query, key, value, block_mask, **options)

    with patch("draftattn.attention.block_sparse_attention", spy):
        yield masks


@contextmanager
def spy_on_dense() -> Iterator[list[tuple[tuple[int, ...], Tensor | None]]]:
    """Notes key shape and attention mask of every dense call that draft attention makes."""
    calls: list[tuple[tuple[int, ...], Tensor | None]] = []
    original = dispatch.dense_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *rest: Any) -> Tensor:
        calls.append((tuple(key.shape), attn_mask))
        return original(query, key, value, attn_mask, *rest)

    with patch.object(dispatch, "dense_attention", spy):
        yield calls


def footprint(model: nn.Module) -> dict[str, Any]:
    """What must be the same before `enable` and after `disable`: hooks, instance attributes, processors, backends."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks: list[Callable] = [
            *module._forward_hooks.values(),
            *module._forward_pre_hooks.values(),
            *module._backward_hooks.values(),
        ]
        found[name] = (
            id(module),
            [id(hook) for hook in hooks],
            sorted(vars(module)),
            dict(module._forward_hooks_always_called),
        )
        processor = getattr(module, "processor", None)
        if processor is not None:
            found[f"{name}.processor"] = (
                id(processor),
                getattr(processor, "_attention_backend", None),
                sorted(vars(processor)),
            )
    return found
