"""What one style of Style Reference costs: CPU seconds of 4 steps without guidance on a random Flux.

    python benchmarks/reference_cost.py [--side 64] [--hidden 768] [--repeats 2] [--table FILE]

The least of some repeats counts. "two samples" is plain sampling of a batch of two, what one more row costs by itself.
"""

import argparse
import time
from dataclasses import replace

import setup_host  # noqa: F401  (before torch and comfy)
import comfy.sample
import comfy.samplers
import torch
from pastiche.nodes.host.references.install import style_reference
from pastiche.nodes.host.references.settings import PRESETS
from report import add_outputs, publish
from support import families
from support.sampling import schedule

STEPS = 4
BASE = dict(gamma=0.0, gamma_end=0.0, schedule="constant", temperature=1.0, strength=1.0, layers="auto", start_percent=0.0, end_percent=1.0)
VARIANTS = {
    "replace": dict(share="replace"), "join": dict(share="join"), "join, balanced": dict(share="join", cures=PRESETS["balanced"]),
    "join, half of the schedule": dict(share="join", end_percent=0.5),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=64, help="cells of the latent; 64 is 512 px on Flux")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=2)
    add_outputs(parser)
    options = parser.parse_args()
    flux, size = families._TABLE["flux"], (options.side, options.side)
    wide = flux.unet | dict(hidden_size=options.hidden, num_heads=options.hidden // 64, axes_dim=[16, 24, 24], mlp_ratio=4.0)
    families._TABLE["wide"] = replace(flux, unet=wide)
    model, cond = families.tiny_model("wide"), families.family_cond("flux")
    noise, style = families.family_latent("flux", seed=1, size=size), {"samples": families.family_latent("flux", seed=2, size=size)}
    sigmas, sampler = schedule(model, STEPS, "simple"), comfy.samplers.sampler_object("euler")
    counted = []
    model.model.diffusion_model.register_forward_pre_hook(lambda network, args: counted.append(args[0].shape[0] * args[0].shape[-2:].numel()))

    def spent(patched, noise):
        counted.clear()
        started = time.process_time()
        comfy.sample.sample_custom(patched, noise, 1.0, sampler, sigmas, cond, cond, torch.zeros_like(noise), disable_pbar=True, seed=0)
        return time.process_time() - started, sum(counted) / noise[0, 0].numel()

    runs = {"plain": (model, noise), "two samples": (model, torch.cat([noise, noise.flip(-1)]))}
    runs |= {name: (style_reference(model, style, None, None, **BASE | settings), noise) for name, settings in VARIANTS.items()}
    found = {name: [] for name in runs}
    for _ in range(options.repeats):
        for name, run in runs.items():
            found[name].append(spent(*run))
            print(name, found[name][-1], flush=True)
    tokens = options.side**2 // 4
    least = {name: min(values) for name, values in found.items()}
    text = [
        f"# What one style costs: random Flux, {options.hidden} features, {wide['depth']} + {wide['depth_single_blocks']} blocks, {tokens} picture tokens",
        "",
        f"{STEPS} steps, cfg 1, euler; rows: pictures of full size that went through the network. {setup_host.hardware()}.",
        "",
        "| | rows | CPU, s | times plain |",
        "|---|---|---|---|",
        *(f"| {name} | {rows:.2f} | {seconds:.2f} | {seconds / least['plain'][0]:.2f} |" for name, (seconds, rows) in least.items()),
    ]
    publish(text, options.table)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
