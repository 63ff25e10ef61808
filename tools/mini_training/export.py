"""Writes the checkpoints as the one file that the pack ships."""
import json

import torch
from host.files import atomic_write
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .autoencoder import LATENT_SCALE
from .data import KINDS
from .transformer import CONFIG as TRANSFORMER_CONFIG
from .unet import CONFIG

FORMAT = "pastiche-mini-1"
LIMIT = 32_000_000  # bytes
NETWORKS = ("refine", "finish", "correction")  # parts of the autoencoder that do well in fp16
TRANSFORMER_FORMAT = "pastiche-mini-transformer-1"
TRANSFORMER_LIMIT = 24_000_000


def export(parts, checkpoint, output):
    """parts: (autoencoder, mean, std, rgb, rgb_bias); checkpoint: the U-Net's, its EMA is taken.

    Scaled latents are (z - latent.mean) / latent.std. Keys: unet.*, autoencoder.*, latent.{mean,std,rgb,rgb_bias}, context.<kind> (1, tokens, dim).
    fp16 but for what the encoder and the latent scale need in full.
    """
    autoencoder, mean, std, rgb, rgb_bias = parts
    saved = torch.load(checkpoint, weights_only=True)
    tensors = {"latent.mean": mean, "latent.std": std / LATENT_SCALE, "latent.rgb": rgb / LATENT_SCALE, "latent.rgb_bias": rgb_bias}
    for name, value in autoencoder.state_dict().items():
        tensors[f"autoencoder.{name}"] = value.half() if name.startswith(NETWORKS) else value
    for name, value in saved["average"].items():
        if name == "context":
            for kind, tokens in zip(KINDS, value):
                tensors[f"context.{kind}"] = tokens[None].clone()
        else:
            tensors[f"unet.{name.removeprefix('unet.')}"] = value.half()
    metadata = {"format": FORMAT, "unet": json.dumps(CONFIG), "steps": str(saved["step"]),
                "images": str(saved["images"]), "minutes": f"{saved['minutes']:.1f}"}
    write(tensors, metadata, output, LIMIT)


def write(tensors, metadata, output, limit):
    """One safetensors file of at most `limit` bytes, under a temporary name first."""
    with atomic_write(output) as partial:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata)
        size = partial.stat().st_size
        if size > limit:
            raise ValueError(f"The file would have {size} bytes, the limit is {limit}: make the network smaller.")
        partial.chmod(0o644)  # safetensors makes it private
    print(f"{output}: {size / 1e6:.1f} MB, {metadata}")


def shipped_autoencoder(path):
    """(MiniAutoencoder, mean, std, rgb, rgb_bias) of a file that `export` wrote; fp16 parts widened."""
    from mini_autoencoder import MiniAutoencoder

    tensors = load_file(path)
    prefix = "autoencoder."
    model = MiniAutoencoder.from_state({k.removeprefix(prefix): v.float() for k, v in tensors.items() if k.startswith(prefix)})
    return (model.eval(), tensors["latent.mean"], tensors["latent.std"] * LATENT_SCALE,
            tensors["latent.rgb"] * LATENT_SCALE, tensors["latent.rgb_bias"])


def export_decoder(shipped, average, output):
    """The file `shipped` with the autoencoder's decoder replaced by that of the state dict `average`."""
    with safe_open(shipped, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    kept = ("analysis", "correction", "latent_std")  # the latents of every network trained so far
    for name, value in average.items():
        if not name.startswith(kept):
            tensors[f"autoencoder.{name}"] = value.half() if name.startswith(NETWORKS) else value
    write(tensors, metadata, output, LIMIT)


def export_transformer(parts, saved, output, config=TRANSFORMER_CONFIG):
    """parts as of `export`; saved: the transformer's checkpoint, its EMA is taken.

    Keys: transformer.* (fp16), latent.{mean,std,rgb,rgb_bias} as in the U-Net's file but at deviation 1,
    context.<kind> (1, tokens, dim) and pooled.<kind> (1, dim).
    """
    _, mean, std, rgb, rgb_bias = parts
    average = saved["average"]
    tensors = {"latent.mean": mean, "latent.std": std, "latent.rgb": rgb, "latent.rgb_bias": rgb_bias}
    pooled = torch.cat([torch.zeros_like(average["named_pooled"][:1]), average["named_pooled"]])
    for i, kind in enumerate(KINDS):
        tensors[f"context.{kind}"], tensors[f"pooled.{kind}"] = average["context"][i][None].clone(), pooled[i][None].clone()
    for name, value in average.items():
        if name.startswith("flux."):
            tensors[f"transformer.{name.removeprefix('flux.')}"] = value.half()
    metadata = {"format": TRANSFORMER_FORMAT, "transformer": json.dumps(config), "steps": str(saved["step"]),
                "images": str(saved["images"]), "minutes": f"{saved['minutes']:.1f}"}
    write(tensors, metadata, output, TRANSFORMER_LIMIT)


def shipped_transformer(path):
    """(state dict of a FlowTransformer, images seen) of a file that `export_transformer` wrote."""
    with safe_open(path, framework="pt") as file:
        images = int(file.metadata()["images"])
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}
    prefix = "transformer."
    state = {f"flux.{k.removeprefix(prefix)}": v for k, v in tensors.items() if k.startswith(prefix)}
    state["context"] = torch.cat([tensors[f"context.{kind}"] for kind in KINDS])
    state["named_pooled"] = torch.cat([tensors[f"pooled.{kind}"] for kind in KINDS[1:]])
    return state, images


def shipped_unet(path):
    """(state dict of a Denoiser, images seen) of a file that `export` wrote."""
    with safe_open(path, framework="pt") as file:
        images = int(file.metadata()["images"])
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}
    state = {k: v for k, v in tensors.items() if k.startswith("unet.")}
    state["context"] = torch.cat([tensors[f"context.{kind}"] for kind in KINDS])
    return state, images
