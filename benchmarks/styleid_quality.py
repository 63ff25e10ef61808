"""StyleID on ten held-out pairs with the mini model: does each part move the picture the way the paper says?

    python benchmarks/styleid_quality.py ASSETS [--steps 20] [--size 256] [--pairs 10] [--weights FILE] [--table FILE] [--sheet FILE]

ASSETS holds content/, style/ (images that the mini model never saw) and metrics/. Gram: distance to the style, lower is
nearer. LPIPS: distance to the content's decode, lower is nearer. Grid: jumps over the borders of 8x8 patches over those
inside; comb: power at a period of 8 pixels and its harmonics over that beside them (mini_training.decoder), both 1 where no
patch shows. --weights: another generation's mini.safetensors, to compare.
"""

import argparse
import time
from pathlib import Path

import setup_host  # noqa: F401  (before torch and comfy)
import torch
from metrics import Metrics
from mini_training.decoder import comb, grid
from pastiche.nodes.algorithms.metrics import psnr
from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.trajectories.inversion import invert, reconstruct
from pastiche.nodes.host.trajectories.latent_adain import latent_adain
from pastiche.nodes.host.networks.mini import WEIGHTS, load_mini
from pastiche.nodes.host.injections.style import inject_style
from report import CONTENTS, HELD_OUT_STYLES, add_outputs, add_pictures, pictures, publish, save_sheet
from support.sampling import sample, schedule

VARIANTS = ("reconstruction", "injection", "AdaIN", "both", "both, gamma 0.3")


class Pair:
    """One content and one style, inverted and captured."""

    def __init__(self, content_image: torch.Tensor, style_image: torch.Tensor, steps: int, weights: Path):
        self.model, self.vae, kinds = load_mini(weights)
        self.empty = kinds["empty"]
        self.sigmas = schedule(self.model, steps)
        self.content_image, self.style_image = content_image, style_image
        self.content, self.style = self.prepare(content_image), self.prepare(style_image)

    def prepare(self, image):
        latent = {"samples": self.vae.encode(image.movedim(1, -1))}  # BCHW -> BHWC
        noise, trajectory = invert(self.model, latent, self.sigmas, self.empty, "fixed_point", 1)
        return latent["samples"], noise, trajectory, capture(self.model, trajectory, "self_attention", "6-11", "ram")

    def decode(self, latent):
        return self.vae.decode(latent).movedim(-1, 1).float().clamp(0, 1)  # BHWC -> BCHW

    def styled(self, injection: bool, adain: bool, gamma: float = 0.75):
        start = latent_adain(self.content[1], self.style[1], 1.0, None, None) if adain else self.content[1]
        model = self.model
        if injection:
            model = inject_style(model, self.style[3], self.content[3], gamma, 1.5, 1.0, "6-11", 0.0, 1.0, None)
        return self.decode(sample(model, start["samples"], self.sigmas, self.empty))

    def variants(self):
        yield self.styled(False, False)
        yield self.styled(True, False)
        yield self.styled(False, True)
        yield self.styled(True, True)
        yield self.styled(True, True, 0.3)


def means(measured):
    """Of each column of rows (photo, *VARIANTS), named."""
    return ", ".join(f"{name} {sum(column) / len(column):.2f}" for name, column in zip(("photos", *VARIANTS), zip(*measured)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_pictures(parser, 20, 256, 10)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    add_outputs(parser, sheet=True)
    options = parser.parse_args()
    metrics = Metrics(options.assets / "metrics")
    rows, grids, combs, sheet, started = [], [], [], [], time.perf_counter()
    contents, styles = pictures(options.assets, options.size, options.pairs)
    for i, (content, style) in enumerate(zip(CONTENTS[: options.pairs], HELD_OUT_STYLES)):
        pair = Pair(contents[i : i + 1], styles[i : i + 1], options.steps, options.weights)
        target = pair.decode(pair.content[0])
        images = list(pair.variants())
        dB = psnr(pair.decode(reconstruct(pair.model, pair.content[2])), target, 1.0)
        rows.append((content.split(".")[0], style[:28], dB, [(metrics.gram_distance(x, pair.style_image), metrics.lpips(x, target)) for x in images]))
        grids.append([grid(x).item() for x in (pair.content_image, *images)])
        combs.append([comb(x).item() for x in (pair.content_image, *images)])
        sheet.append(torch.cat([pair.content_image, pair.style_image, *images], dim=3))
        print(content, style, f"{dB:.1f} dB", " ".join(f"{g:.3f}/{p:.3f}" for g, p in rows[-1][3]), flush=True)
    mean = [tuple(sum(row[3][v][m] for row in rows) / len(rows) for m in (0, 1)) for v in range(len(VARIANTS))]
    wins = sum(row[3][1][0] < row[3][0][0] for row in rows)
    text = [
        f"# StyleID on {len(rows)} held-out pairs, mini model, {options.size} px, {options.steps} steps",
        "",
        f"Gram distance to the style / LPIPS to the content's decode. {setup_host.hardware()}, {time.perf_counter() - started:.0f} s.",
        "",
        "| content | style | reconstruction PSNR | " + " | ".join(VARIANTS) + " |",
        "|---|---|---|" + "---|" * len(VARIANTS),
        *(f"| {c} | {s} | {dB:.1f} dB | " + " | ".join(f"{g:.3f} / {p:.3f}" for g, p in v) + " |" for c, s, dB, v in rows),
        "| **mean** | | | " + " | ".join(f"**{g:.3f} / {p:.3f}**" for g, p in mean) + " |",
        "",
        f"- injection alone lowers Gram against reconstruction on {wins} of {len(rows)} pairs",
        f"- injection with AdaIN {mean[3][0]:.3f}, injection {mean[1][0]:.3f}, AdaIN {mean[2][0]:.3f} (mean Gram)",
        f"- gamma 0.3 against 0.75: Gram {mean[4][0]:.3f} against {mean[3][0]:.3f}, LPIPS {mean[4][1]:.3f} against {mean[3][1]:.3f}",
        f"- grid: {means(grids)}",
        f"- comb: {means(combs)}; both, pair by pair: {', '.join(f'{row[4]:.2f}' for row in combs)}",
    ]
    publish(text, options.table)
    save_sheet(sheet, options.sheet)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
