"""Round trips of held-out photos with the mini model: reconstruction against the VAE's own decode.

    python benchmarks/inversion.py ASSETS [--photos 4] [--size 256] [--table FILE]
"""

import argparse
import time
from pathlib import Path

import setup_host
import torch
from pastiche.nodes.algorithms.metrics import psnr
from pastiche.nodes.host.trajectories.inversion import invert, reconstruct
from pastiche.nodes.host.networks.mini import load_mini
from report import CONTENTS, add_outputs, pictures, publish
from support.sampling import schedule

RUNS = (("current", 50, 0), ("next", 20, 0), ("next", 50, 0), ("fixed_point", 20, 1), ("fixed_point", 20, 3), ("fixed_point", 20, 5))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("assets", type=Path)
    parser.add_argument("--photos", type=int, default=4)
    parser.add_argument("--size", type=int, default=256)
    add_outputs(parser)
    options = parser.parse_args()
    model, vae, kinds = load_mini()
    heads = [f"{scheme} {steps}" + (f" x{iterations}" if iterations else "") for scheme, steps, iterations in RUNS]
    lines, totals, seconds = [], [0.0] * len(RUNS), [0.0] * len(RUNS)
    images, _ = pictures(options.assets, options.size, options.photos)
    for name, image in zip(CONTENTS, images.movedim(1, -1)):  # BCHW -> BHWC
        latent = vae.encode(image[None])
        target = vae.decode(latent).cpu()
        values = []
        for i, (scheme, steps, iterations) in enumerate(RUNS):
            started = time.perf_counter()
            _, trajectory = invert(model, {"samples": latent}, schedule(model, steps), kinds["empty"], scheme, iterations)
            seconds[i] += time.perf_counter() - started
            values.append(psnr(vae.decode(reconstruct(model, trajectory)).cpu(), target, 1.0))
            totals[i] += values[-1]
        lines.append(f"| {name.split('.')[0]} | " + " | ".join(f"{value:.1f}" for value in values) + " |")
        print(lines[-1], flush=True)
    text = [
        f"# Inversion round trip, mini model, {options.size} px",
        "",
        f"PSNR in dB against the VAE's decode; scheme, steps, x fixed-point iterations. {setup_host.hardware()}.",
        "",
        "| photo | " + " | ".join(heads) + " |",
        "|---|" + "---|" * len(RUNS),
        *lines,
        "| **mean** | " + " | ".join(f"**{total / options.photos:.1f}**" for total in totals) + " |",
        "| inversion, s | " + " | ".join(f"{value / options.photos:.1f}" for value in seconds) + " |",
    ]
    publish(text, options.table)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
