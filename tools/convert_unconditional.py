#!/usr/bin/env python3
"""Writes an unconditional model's file (.pt, .pth, .ckpt, .safetensors) as .safetensors for Load Unconditional DDPM.

    python tools/convert_unconditional.py afhqdog_p2.pt models/diffusers/afhqdog_p2.safetensors
    python tools/convert_unconditional.py mine.pt mine.safetensors --heads 2 --betas linear --timesteps 4000

Needs ComfyUI (COMFYUI_PATH, else .environment/ComfyUI). Of a pickle only tensors, numbers and texts are read; a moving
average is taken where the file has one. The layout is recognised and every name and shape checked first. Heads, betas and
timesteps, which weights do not tell, are noted in the file, so that the node's `auto` is right.
"""

import argparse
import sys
from pathlib import Path

from host.files import atomic_write
from verify_models import prepare


def main(arguments: list[str] | None = None) -> int:
    prepare("cpu")
    from pastiche.nodes.host.networks.unconditional_checkpoint import BETAS, Reading
    from pastiche.nodes.host.networks.unconditional_layouts import HEADS, ORDERS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, help="a .safetensors file")
    parser.add_argument("--heads", choices=list(HEADS), default="auto")
    parser.add_argument("--betas", choices=BETAS, default="auto")
    parser.add_argument("--timesteps", type=int, default=0)
    parser.add_argument("--attention-order", choices=ORDERS, default="auto")
    options = parser.parse_args(arguments)
    try:
        reading = Reading(options.heads, options.attention_order, options.betas, options.timesteps)
        print(convert(options.source, options.target, reading))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def convert(source: Path, target: Path, reading) -> str:
    """Writes `target` whole or not at all; returns a sentence on what was found. Raises ValueError, OSError."""
    from pastiche.nodes.host.networks.unconditional_checkpoint import read_weights
    from pastiche.nodes.host.networks.unconditional_files import build_network
    from safetensors.torch import save_file

    if target.suffix != ".safetensors":
        raise ValueError(f"{target.name} should end in .safetensors.")
    weights = read_weights(source)
    reading = reading.noted(weights.notes, source.name)
    layout = build_network(weights, reading, source.name).layout
    with atomic_write(target) as partial:
        state = {key: tensor.contiguous().clone() for key, tensor in weights.state.items()}
        save_file(state, str(partial), metadata=reading.notes() or None)
    count = sum(tensor.numel() for tensor in weights.state.values())
    average = ", the moving average" if weights.averaged else ""
    return f"{target}: {layout.family} layout, {len(weights.state)} tensors{average}, {count / 1e6:.1f} M parameters"


if __name__ == "__main__":
    sys.exit(main())
