"""Writes the checkpoints as the one file that the pack ships."""
import json
import os

import torch
from mini_autoencoder import MiniAutoencoder
from safetensors.torch import load_file, save_file

from .autoencoder import LATENT_SCALE
from .data import KINDS
from .unet import CONFIG

FORMAT = "pastiche-mini-1"
LIMIT = 32_000_000  # bytes


def export(parts, checkpoint, output):
    """parts: (autoencoder, mean, std, rgb, rgb_bias); checkpoint: the U-Net's, its EMA is taken.

    Scaled latents are (z - latent.mean) / latent.std. Keys: unet.*, autoencoder.*, latent.{mean,std,rgb,rgb_bias}, context.<kind> (1, tokens, dim).
    fp16 but for what the encoder and the latent scale need in full.
    """
    autoencoder, mean, std, rgb, rgb_bias = parts
    saved = torch.load(checkpoint, weights_only=True)
    tensors = {"latent.mean": mean, "latent.std": std / LATENT_SCALE, "latent.rgb": rgb / LATENT_SCALE, "latent.rgb_bias": rgb_bias}
    for name, value in autoencoder.state_dict().items():
        tensors[f"autoencoder.{name}"] = value.half() if name.startswith("refine") else value
    for name, value in saved["average"].items():
        if name == "context":
            for kind, tokens in zip(KINDS, value):
                tensors[f"context.{kind}"] = tokens[None].clone()
        else:
            tensors[f"unet.{name.removeprefix('unet.')}"] = value.half()
    metadata = {"format": FORMAT, "unet": json.dumps(CONFIG), "steps": str(saved["step"]),
                "images": str(saved["images"]), "minutes": f"{saved['minutes']:.1f}"}
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_suffix(".tmp")
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata)
    size = temporary.stat().st_size
    if size > LIMIT:
        temporary.unlink()
        raise ValueError(f"The file would have {size} bytes, the limit is {LIMIT}: make the network smaller.")
    temporary.chmod(0o644)  # safetensors makes it private
    os.replace(temporary, output)
    print(f"{output}: {size / 1e6:.1f} MB, {metadata}")


def shipped_autoencoder(path):
    """(MiniAutoencoder, mean, std, rgb, rgb_bias) of a file that `export` wrote; fp16 parts widened."""
    tensors = load_file(path)
    prefix = "autoencoder."
    model = MiniAutoencoder.from_state({k.removeprefix(prefix): v.float() for k, v in tensors.items() if k.startswith(prefix)})
    return (model.eval(), tensors["latent.mean"], tensors["latent.std"] * LATENT_SCALE,
            tensors["latent.rgb"] * LATENT_SCALE, tensors["latent.rgb_bias"])
