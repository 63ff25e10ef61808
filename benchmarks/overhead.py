"""What Style Injection adds to a sampling step at SD1.5's size: a U-Net of 860 M random parameters, CPU seconds.

    python benchmarks/overhead.py [--size 256] [--rounds 5] [--dtypes float32,bfloat16] [--table FILE]

One step of each kind after the other, several rounds; the least of each, as other work on the machine only adds. The
features are kept in RAM in half precision, as `ram` has them.
"""

import argparse
import time

import setup_host
import torch
from comfy.model_management import unload_all_models
from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.injections.style import inject_style
from pastiche.nodes.host.networks.fingerprint import fingerprint
from pastiche.nodes.sockets import Trajectory
from report import add_outputs, publish
from support.models import tiny_cond, tiny_unet
from support.sampling import random_latent, sample

LAYERS = "6-11"


def measure(dtype: torch.dtype, side: int, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of one step, by kind."""
    model = tiny_unet("sd15", channels=320, channel_mult=(1, 2, 4, 4), context_dim=768, heads=8, dtype=dtype)
    sigmas, positive = torch.tensor([7.0, 0.0]), tiny_cond(model, tokens=77)
    banks = []
    for seed in (1, 2):
        latents = torch.stack([random_latent(side, side, seed=seed + 2), 7 * random_latent(side, side, seed=seed) / 3])
        trajectory = Trajectory(sigmas.flip(0), latents, positive, "next", fingerprint(model))
        banks.append(capture(model, trajectory, "self_attention", LAYERS, "ram"))
    content, style = banks
    mask = torch.linspace(0, 1, 64).expand(1, 64, 64)

    def injected(strength=1.0, mask=None):
        return inject_style(model, style, content, 0.75, 1.5, strength, LAYERS, 0.0, 1.0, mask)

    kinds = {"plain": model, "injected": injected(), "strength 0.5": injected(0.5), "mask": injected(mask=mask)}
    noise = model.model.process_latent_out(content.trajectory.latents[-1])
    seconds = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        for kind, patched in kinds.items():
            started = time.process_time()
            sample(patched, noise, sigmas, positive)
            if number:  # the first round warms up
                seconds[kind].append(time.process_time() - started)
        print(dtype, {kind: [round(value, 2) for value in values] for kind, values in seconds.items()}, flush=True)
    unload_all_models()
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    add_outputs(parser)
    options = parser.parse_args()
    text = [
        f"# Style Injection's own cost, a U-Net of SD1.5's size, {options.size} px",
        "",
        f"CPU seconds of one sampling step (sampling's own start included), the least of {options.rounds} interleaved rounds; layers {LAYERS}, "
        f"features in RAM, random weights. {setup_host.hardware()}.",
        "",
        "| precision | step | CPU, s | more than plain |",
        "|---|---|---|---|",
    ]
    for name in options.dtypes.split(","):
        seconds = measure(getattr(torch, name), options.size // 8, options.rounds)
        plain = min(seconds["plain"])
        for kind, values in seconds.items():
            more = "" if kind == "plain" else f"{100 * (min(values) / plain - 1):.1f} %"
            text.append(f"| {name} | {kind} | {min(values):.2f} | {more} |")
    publish(text, options.table)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
