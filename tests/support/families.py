"""Tiny random models of many families, through ComfyUI's own config and model classes.

    FAMILIES, UNREACHED               the names: whose attention asks for an override, and whose does not; `spans` of each: what Style Reference must find in it
    tiny_model("flux")                MODEL on the CPU, random weights, a forward of a few milliseconds
    family_cond("flux", tokens=7)     a CONDITIONING that fits it
    family_latent("flux")             a LATENT's samples, 8x12 (24 image tokens at patch size 2)

Weights are `randomize`d, so nothing is zero-initialised: every block reaches the output.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable

import comfy.model_patcher
import comfy.supported_models
import torch

from .models import randomize, tiny_cond, tiny_unet

TEXT = 7  # tokens of the prompt
SIZE = (8, 12)


@dataclass(frozen=True)
class Family:
    """config: name in comfy.supported_models; unet: its unet_config; spans: {sequence length: (first, end)} of image tokens.

    text: width of the context; channels: of the latent; video: latents have a time axis; extras: further conditioning.
    """

    config: str
    unet: dict[str, Any]
    text: int
    channels: int
    spans: dict[int, tuple[int, int]]
    video: bool = False
    rope: bool = True
    extras: Callable[[torch.Generator], dict] = field(default=lambda generator: {})


def _pooled(width: int) -> Callable[[torch.Generator], dict]:
    return lambda generator: {"pooled_output": torch.randn(1, width, generator=generator)}


def _token_mask(generator: torch.Generator) -> dict:
    return {"attention_mask": torch.ones(1, TEXT, dtype=torch.long)}


def _hidream(generator: torch.Generator) -> dict:
    return {"pooled_output": torch.randn(1, 16, generator=generator), "conditioning_llama3": torch.randn(1, 2, 5, 16, generator=generator)}


_FLUX = dict(
    image_model="flux", in_channels=16, out_channels=16, vec_in_dim=16, context_in_dim=16, hidden_size=32, mlp_ratio=2.0, num_heads=2,
    depth=2, depth_single_blocks=2, axes_dim=[4, 6, 6], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True, txt_ids_dims=[],
)
_JOINT, _ALL = {31: (7, 31)}, {24: (0, 24)}

_TABLE = {
    "flux": Family("Flux", _FLUX, 16, 16, _JOINT, extras=_pooled(16)),
    "flux2": Family(
        "Flux2",
        _FLUX | dict(
            image_model="flux2", in_channels=128, out_channels=128, vec_in_dim=None, axes_dim=[4, 4, 4, 4], theta=2000, patch_size=1,
            qkv_bias=False, guidance_embed=True, txt_ids_dims=[3], global_modulation=True, mlp_silu_act=True, ops_bias=False,
        ),
        16, 128, {608: (512, 608)},  # core pads the prompt to 512 tokens
    ),
    "chroma": Family(
        "Chroma",
        dict(
            image_model="chroma", in_channels=64, out_channels=64, context_in_dim=16, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2,
            depth_single_blocks=2, axes_dim=[4, 6, 6], theta=10000, patch_size=2, qkv_bias=True, in_dim=64, out_dim=32, hidden_dim=32,
            n_layers=2, txt_ids_dims=[], vec_in_dim=16,
        ),
        16, 16, _JOINT,
    ),
    "sd3": Family(
        "SD3",
        dict(in_channels=16, patch_size=2, depth=2, input_size=None, adm_in_channels=16, context_size=16, num_patches=1024, pos_embed_max_size=32,
             pos_embed_scaling_factor=None, qk_norm="rms", context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 16, "out_features": 128}}),
        16, 16, _JOINT, rope=False, extras=_pooled(16),
    ),
    "sd35_medium": Family(
        "SD3",
        dict(in_channels=16, patch_size=2, depth=3, input_size=None, adm_in_channels=16, context_size=16, num_patches=1024, pos_embed_max_size=32,
             pos_embed_scaling_factor=None, qk_norm="rms", x_block_self_attn_layers=[0, 1],
             context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 16, "out_features": 192}}),
        16, 16, _JOINT | _ALL, rope=False, extras=_pooled(16),
    ),
    "qwen_image": Family(
        "QwenImage",
        dict(image_model="qwen_image", in_channels=64, out_channels=16, num_layers=3, attention_head_dim=16, num_attention_heads=2,
             joint_attention_dim=16, axes_dims_rope=(4, 6, 6)),
        16, 16, _JOINT, video=True,
    ),
    "lumina2": Family(
        "Lumina2",
        dict(image_model="lumina2", in_channels=16, dim=32, n_layers=3, n_refiner_layers=2, n_heads=2, n_kv_heads=1, axes_dims=[4, 6, 6],
             axes_lens=[300, 64, 64], rope_theta=10000, ffn_dim_multiplier=2.0, multiple_of=16, cap_feat_dim=16, qk_norm=True),
        16, 16, _JOINT | _ALL,
    ),
    "z_image": Family(
        "ZImage",
        dict(image_model="lumina2", in_channels=16, dim=256, n_layers=2, n_refiner_layers=1, n_heads=16, n_kv_heads=16, axes_dims=[4, 6, 6],
             axes_lens=[1536, 64, 64], rope_theta=256.0, ffn_dim_multiplier=2.0, multiple_of=16, cap_feat_dim=16, qk_norm=True,
             z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32),
        16, 16, {32: (0, 24), 64: (32, 56)},
    ),
    "hidream": Family(
        "HiDream",
        dict(image_model="hidream", patch_size=2, in_channels=16, out_channels=16, num_layers=2, num_single_layers=1, attention_head_dim=16,
             num_attention_heads=2, caption_channels=[16, 16], text_emb_dim=16, num_routed_experts=2, num_activated_experts=1,
             axes_dims_rope=(4, 6, 6), max_resolution=(32, 32), llama_layers=[0, 1, 1]),
        16, 16, {41: (0, 24)}, extras=_hidream,
    ),
    "wan": Family(
        "WAN21_T2V",
        dict(image_model="wan2.1", model_type="t2v", dim=32, ffn_dim=64, freq_dim=16, text_dim=16, text_len=TEXT, num_heads=2, num_layers=3, in_dim=16, out_dim=16),
        16, 16, _ALL, video=True,
    ),
    "hunyuan_video": Family(
        "HunyuanVideo",
        dict(image_model="hunyuan_video", in_channels=16, out_channels=16, vec_in_dim=16, context_in_dim=16, hidden_size=32, mlp_ratio=2.0,
             num_heads=2, depth=2, depth_single_blocks=2, axes_dim=[4, 6, 6], theta=256, patch_size=[1, 2, 2], qkv_bias=True, guidance_embed=True,
             byt5=False, meanflow=False, use_cond_type_embedding=False, vision_in_dim=None, meanflow_sum=False),
        16, 16, _JOINT, video=True, extras=_pooled(16),
    ),
    "ltxv": Family(
        "LTXV",
        dict(image_model="ltxv", in_channels=128, cross_attention_dim=32, attention_head_dim=16, num_attention_heads=2, caption_channels=16, num_layers=3),
        16, 128, {96: (0, 96)}, video=True, extras=_token_mask,
    ),
    "cosmos_predict2": Family(
        "CosmosT2IPredict2",
        dict(image_model="cosmos_predict2", max_img_h=32, max_img_w=32, max_frames=8, in_channels=16, out_channels=16, patch_spatial=2, patch_temporal=1,
             model_channels=32, num_blocks=3, num_heads=2, mlp_ratio=2.0, crossattn_emb_channels=16, pos_emb_cls="rope3d", use_adaln_lora=True,
             adaln_lora_dim=8),
        16, 16, _ALL, video=True,
    ),
    "kandinsky5": Family(
        "Kandinsky5",
        dict(image_model="kandinsky5", in_visual_dim=16, out_visual_dim=16, in_text_dim=16, in_text_dim2=16, time_dim=16, model_dim=32, ff_dim=64,
             visual_embed_dim=132, num_text_blocks=1, num_visual_blocks=3, axes_dims=(4, 6, 6)),
        16, 16, _ALL, video=True, extras=_pooled(16),
    ),
    "aura_flow": Family(
        "AuraFlow",
        dict(cond_seq_dim=2048, in_channels=4, patch_size=2, dim=32, n_layers=3, n_double_layers=1, n_heads=2, global_conddim=32, max_seq=256),
        2048, 4, {39: (15, 39)}, rope=False,
    ),
    "omnigen2": Family(
        "Omnigen2",
        dict(image_model="omnigen2", in_channels=16, hidden_size=32, num_layers=2, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1,
             multiple_of=16, axes_dim_rope=(4, 6, 6), axes_lens=(64, 64, 64), text_feat_dim=16),
        16, 16, _JOINT | _ALL, extras=_token_mask,
    ),
    "boogu": Family(
        "Boogu",
        dict(image_model="boogu", in_channels=16, hidden_size=32, num_layers=3, num_double_stream_layers=1, num_refiner_layers=1, num_attention_heads=2,
             num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 6, 6), axes_lens=(64, 64, 64), instruction_feat_dim=16),
        16, 16, _JOINT | _ALL, extras=_token_mask,
    ),
    "krea2": Family(
        "Krea2",
        dict(image_model="krea2", features=32, tdim=16, txtdim=16, heads=2, kvheads=1, multiplier=2, layers=3, patch=2, channels=16, txtlayers=2, txtheads=2, txtkvheads=2),
        32, 16, _JOINT, video=True,
    ),
    "lens": Family(
        "Lens",
        dict(image_model="lens", patch_size=2, in_channels=128, out_channels=32, num_layers=3, attention_head_dim=16, num_attention_heads=2, enc_hidden_dim=16,
             axes_dims_rope=(4, 6, 6), selected_layer_index=(0,), multi_layer_encoder_feature=False),
        16, 128, {103: (0, 96)},
    ),
    "mage_flow": Family(
        "MageFlow",
        dict(image_model="mage_flow", in_channels=128, out_channels=128, num_layers=3, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
             axes_dims_rope=(4, 6, 6)),
        16, 128, {103: (7, 103)},
    ),
}
_UNREACHED = {
    "ernie": Family(
        "ErnieImage",
        dict(image_model="ernie", hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=64, in_channels=128, out_channels=128,
             patch_size=1, text_in_dim=16, rope_axes_dim=(4, 6, 6)),
        16, 128, {},
    ),
    "pixart": Family(
        "PixArtSigma",
        dict(image_model="pixart_sigma", input_size=1024, pe_interpolation=1.0, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=2,
             caption_channels=16, micro_condition=False, model_max_length=TEXT),
        16, 4, {},
    ),
    "hunyuan_dit": Family(
        "HunyuanDiT",
        dict(image_model="hydit", input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=2, text_states_dim=16,
             text_states_dim_t5=16, text_len=TEXT, text_len_t5=TEXT, mlp_ratio=2.0),
        16, 4, {}, extras=lambda generator: {
            "conditioning_mt5xl": torch.randn(1, TEXT, 16, generator=generator), "attention_mask": torch.ones(1, TEXT),
            "attention_mask_mt5xl": torch.ones(1, TEXT),
        },
    ),
}
FAMILIES, UNREACHED = tuple(_TABLE), tuple(_UNREACHED)
_TABLE |= _UNREACHED


def family(name: str) -> Family:
    return _TABLE[name]


def tiny_model(name: str, seed: int = 0) -> comfy.model_patcher.ModelPatcher:
    """A MODEL of the family with random weights, float32, on the CPU. "sd15" and "sdxl" are U-Nets."""
    if name not in _TABLE:
        return tiny_unet(name, seed=seed)
    entry, device = _TABLE[name], torch.device("cpu")
    config = getattr(comfy.supported_models, entry.config)(entry.unet)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device=device)
    randomize(model.diffusion_model, seed)
    positions = getattr(model.diffusion_model, "pos_embed", None)
    if isinstance(positions, torch.Tensor):  # SD3's comes with its weights and is not initialised
        positions.copy_(torch.randn(positions.shape, generator=torch.Generator().manual_seed(seed)))
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def family_cond(name: str, tokens: int = TEXT, seed: int = 0, model: Any = None) -> list:
    """A random CONDITIONING of `tokens` tokens."""
    if name not in _TABLE:
        return tiny_cond(model or tiny_model(name), tokens, seed)
    entry, generator = _TABLE[name], torch.Generator().manual_seed(1000 + seed)
    return [[torch.randn(1, tokens, entry.text, generator=generator), entry.extras(generator)]]


def family_latent(name: str, seed: int = 0, batch: int = 1, size: tuple[int, int] = SIZE, frames: int = 1) -> torch.Tensor:
    """(batch, channels, [frames,] height, width)."""
    channels, video = (_TABLE[name].channels, _TABLE[name].video) if name in _TABLE else (4, False)
    shape = (batch, channels, *([frames] if video else []), *size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
