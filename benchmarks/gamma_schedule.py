"""Gamma schedules of Style Injection against constant gammas at equal LPIPS, on the mini U-Net.

    python benchmarks/gamma_schedule.py ASSETS [--steps 10] [--size 128] [--pairs 4] [--table FILE]

A schedule that ends at a smaller gamma gives more style and less content, as a smaller constant gamma does. So its Gram distance is
compared with what the curve of constant gammas has at its LPIPS, by straight lines between its points.
"""

import argparse
import time

import setup_host  # noqa: F401  (before torch and comfy)
import torch
from metrics import Metrics
from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.injections.style import inject_style
from pastiche.nodes.host.networks.mini import load_mini
from pastiche.nodes.host.trajectories.inversion import invert
from report import CONTENTS, add_outputs, add_pictures, pictures, publish
from support.sampling import sample, schedule

CONSTANT = (1.0, 0.9, 0.75, 0.6, 0.5, 0.375, 0.2, 0.0)
SCHEDULED = tuple((kind, start, end) for kind in ("linear", "cosine", "sqrt") for start, end in ((0.75, 0.375), (0.9, 0.2)))


def between(points, at):
    """Value at `at` on the straight lines through `points` (x, y); None outside."""
    points = sorted(points)
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 <= at <= x1:
            return y0 + (y1 - y0) * (at - x0) / max(x1 - x0, 1e-12)
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_pictures(parser, 10, 128, 4)
    add_outputs(parser)
    options = parser.parse_args()
    metrics, started = Metrics(options.assets / "metrics"), time.process_time()
    contents, styles = pictures(options.assets, options.size, options.pairs)
    settings = [("constant", gamma, gamma) for gamma in CONSTANT] + list(SCHEDULED)
    model, vae, kinds = load_mini()
    sigmas, found = schedule(model, options.steps), {setting: [] for setting in settings}

    def decode(latent):
        return vae.decode(latent).movedim(-1, 1).float().clamp(0, 1)  # BHWC -> BCHW

    for content, style in zip(contents.split(1), styles.split(1)):
        latents = [vae.encode(image.movedim(1, -1)) for image in (content, style)]  # BCHW -> BHWC
        inverted = [invert(model, {"samples": latent}, sigmas, kinds["empty"], "predicted") for latent in latents]
        banks = [capture(model, trajectory, "self_attention", "6-11", "ram") for _, trajectory in inverted]
        target = decode(latents[0])
        for kind, start, end in settings:
            patched = inject_style(model, banks[1], banks[0], start, 1.5, 1.0, "6-11", 0.0, 1.0, None, gamma_end=end, schedule=kind)
            image = decode(sample(patched, inverted[0][0]["samples"], sigmas, kinds["empty"]))
            found[kind, start, end].append((metrics.gram_distance(image, style), metrics.lpips(image, target)))
            print(kind, start, end, "%.3f/%.4f" % found[kind, start, end][-1], flush=True)
    mean = {setting: tuple(sum(values) / len(values) for values in zip(*numbers)) for setting, numbers in found.items()}
    curve = [(lpips, gram) for setting, (gram, lpips) in mean.items() if setting[0] == "constant"]
    text = [
        f"# Gamma schedules of Style Injection, mini U-Net, {options.pairs} held-out pairs, {options.size} px, {options.steps} steps",
        "",
        "Mean Gram distance to the style and LPIPS to the content's decode (lower is nearer). Last column: Gram of the constant gammas at that "
        f"LPIPS; where it is larger, the schedule is better. {setup_host.hardware()}, {time.process_time() - started:.0f} s of CPU.",
        "",
        "| schedule | gamma | gamma_end | Gram | LPIPS | constant gamma at that LPIPS |",
        "|---|---|---|---|---|---|",
    ]
    for (kind, start, end), (gram, lpips) in mean.items():
        other = None if kind == "constant" else between(curve, lpips)
        text.append(f"| {kind} | {start} | {end} | {gram:.4f} | {lpips:.4f} | {'' if other is None else f'{other:.4f}'} |")
    publish(text, options.table)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
