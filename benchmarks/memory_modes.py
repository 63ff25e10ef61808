"""What each place for features costs: seconds and bytes, in one interleaved run with the mini model.

    python benchmarks/memory_modes.py [--size 256] [--steps 10] [--rounds 3] [--table FILE]
"""

import argparse
import statistics
import time

import setup_host
import torch
from pastiche.nodes.host.features.capture import MEMORY, capture
from pastiche.nodes.host.trajectories.inversion import invert
from pastiche.nodes.host.networks.mini import load_mini
from pastiche.nodes.host.features.stores import readable_size
from pastiche.nodes.host.injections.style import inject_style
from report import add_outputs, publish
from support.sampling import sample, schedule


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    add_outputs(parser)
    options = parser.parse_args()
    model, vae, kinds = load_mini()
    sigmas, generator = schedule(model, options.steps), torch.Generator().manual_seed(0)
    images = torch.rand(2, options.size // 16, options.size // 16, 3, generator=generator).repeat_interleave(16, 1).repeat_interleave(16, 2)
    inversions = [invert(model, {"samples": vae.encode(image[None])}, sigmas, kinds["empty"], "next") for image in images]
    seconds = {mode: {"capture": [], "sampling": []} for mode in (*MEMORY, "no injection", "strength 0.5")}
    sizes = {}

    def timed(mode, phase, work):
        started = time.perf_counter()
        result = work()
        seconds[mode][phase].append(time.perf_counter() - started)
        return result

    def draw(patched):
        return sample(patched, inversions[0][0]["samples"], sigmas, kinds["empty"])

    for _ in range(options.rounds):
        timed("no injection", "sampling", lambda: draw(model))
        for mode in MEMORY:
            content, style = timed(mode, "capture", lambda: [capture(model, t, "self_attention", "6-11", mode) for _, t in inversions])
            sizes[mode] = sum(bank.store.nbytes if bank.store else bank.trajectory.latents.nbytes for bank in (content, style))
            patched = inject_style(model, style, content, 0.75, 1.5, 1.0, "6-11", 0.0, 1.0, None)
            timed(mode, "sampling", lambda: draw(patched))
            if mode == "ram":
                half = inject_style(model, style, content, 0.75, 1.5, 0.5, "6-11", 0.0, 1.0, None)
                timed("strength 0.5", "sampling", lambda: draw(half))
    text = [
        f"# Feature memory modes, mini model, {options.size} px, {options.steps} steps, style and content",
        "",
        f"Median of {options.rounds} interleaved rounds. {setup_host.hardware()}.",
        "",
        "| mode | kept | capture, s | sampling, s |",
        "|---|---|---|---|",
    ]
    for mode, phases in seconds.items():
        captured = f"{statistics.median(phases['capture']):.2f}" if phases["capture"] else ""
        kept = readable_size(sizes[mode]) if mode in sizes else ""
        note = " (ram)" if mode == "strength 0.5" else ""
        text.append(f"| {mode}{note} | {kept} | {captured} | {statistics.median(phases['sampling']):.2f} |")
    publish(text, options.table)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
