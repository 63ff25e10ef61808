"""Round trips of held-out photos with the mini model: reconstruction against the VAE's own decode.

    python benchmarks/inversion.py ASSETS [--architecture unet] [--photos 4] [--size 256] [--schemes current,next] [--table FILE]
"""

import argparse
import time
from pathlib import Path
from statistics import mean

import setup_host
import torch
from pastiche.nodes.algorithms.metrics import psnr
from pastiche.nodes.host.trajectories.inversion import invert, reconstruct
from pastiche.nodes.host.networks.mini import load_mini
from report import CONTENTS, add_outputs, pictures, publish
from support.sampling import schedule

# scheme, steps, scheduler, tolerance of fixed_point
RUNS = (("current", 50, "normal", None), ("next", 20, "normal", None), ("next", 50, "normal", None), ("midpoint", 20, "normal", None),
        ("predicted", 10, "normal", None), ("predicted", 10, "simple", None), ("predicted", 10, "ddim_uniform", None),
        ("predicted", 20, "normal", None), ("fixed_point", 10, "normal", 1e-3), ("fixed_point", 20, "normal", 1e-3),
        ("fixed_point", 20, "normal", 1e-4))
RUNS_OF_TRANSFORMERS = tuple((scheme, 20, "normal", None) for scheme in ("next", "predicted")) + (("fixed_point", 20, "normal", 1e-4),)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("assets", type=Path)
    parser.add_argument("--architecture", default="unet", choices=("unet", "transformer"))
    parser.add_argument("--photos", type=int, default=4)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--schemes", default="", help="comma-separated, to run a part of the table")
    add_outputs(parser)
    options = parser.parse_args()
    model, vae, kinds = load_mini(architecture=options.architecture)
    runs = RUNS if options.architecture == "unet" else RUNS_OF_TRANSFORMERS
    runs = [run for run in runs if not options.schemes or run[0] in options.schemes.split(",")]
    counted = 0

    def count(apply_model, args):
        nonlocal counted
        counted += args["input"].shape[0]
        return apply_model(args["input"], args["timestep"], **args["c"])

    model = model.clone()
    model.set_model_unet_function_wrapper(count)
    images, _ = pictures(options.assets, options.size, options.photos)
    quality, evaluations, seconds = ([[] for _ in runs] for _ in range(3))
    for image in images.movedim(1, -1):  # BCHW -> BHWC
        latent = vae.encode(image[None])
        target = vae.decode(latent).cpu()
        for i, (scheme, steps, scheduler, tolerance) in enumerate(runs):
            settings = {} if tolerance is None else {"tolerance": tolerance}
            counted, started = 0, time.process_time()
            _, trajectory = invert(model, {"samples": latent}, schedule(model, steps, scheduler), kinds["empty"], scheme, **settings)
            seconds[i].append(time.process_time() - started)
            evaluations[i].append(counted)
            quality[i].append(psnr(vae.decode(reconstruct(model, trajectory)).cpu(), target, 1.0))
            print(scheme, steps, scheduler, tolerance, evaluations[i][-1], f"{quality[i][-1]:.1f} dB", flush=True)
    text = [
        f"# Inversion round trip, mini {'model' if options.architecture == 'unet' else options.architecture}, {options.size} px",
        "",
        "PSNR in dB of what core's euler sampler makes of the NOISE, against the VAE's decode; the inversion's network evaluations "
        f"and CPU seconds are means. {setup_host.hardware()}.",
        "",
        "| scheme | steps | scheduler | evaluations | CPU, s | " + " | ".join(name.split(".")[0] for name in CONTENTS[: options.photos]) + " | **mean** |",
        "|---|---|---|---|---|" + "---|" * (options.photos + 1),
    ]
    for (scheme, steps, scheduler, tolerance), dB, counts, spent in zip(runs, quality, evaluations, seconds):
        name = scheme if tolerance is None else f"{scheme}, tolerance {tolerance:.0e}"
        text.append(
            f"| {name} | {steps} | {scheduler} | {mean(counts):.0f} | {mean(spent):.1f} | " + " | ".join(f"{value:.1f}" for value in dB)
            + f" | **{mean(dB):.1f}** |"
        )
    publish(text, options.table)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
