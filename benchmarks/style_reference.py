"""Style Reference on held-out pairs with a mini model: text to image, restyling from a noised start and from an inversion.

    python benchmarks/style_reference.py ASSETS [--architecture unet] [--steps 20] [--size 256] [--pairs 10] [--table FILE] [--sheet FILE]

ASSETS holds content/, style/ (images that the mini models never saw) and metrics/. Gram: distance to the style, LPIPS: distance to
the content's decode (for text to image: to the plain sample), lower is nearer.
"""

import argparse
import time
from pathlib import Path

import setup_host  # noqa: F401  (before torch and comfy)
import comfy.sample
import comfy.samplers
import torch
from metrics import Metrics
from pastiche.nodes.host.networks.mini import load_mini
from pastiche.nodes.host.references.install import style_reference
from pastiche.nodes.host.references.settings import PRESETS
from pastiche.nodes.host.trajectories.inversion import invert
from report import CONTENTS, HELD_OUT_STYLES, add_outputs, pictures, publish, save_sheet
from support.sampling import schedule

START = 0.6  # share of the schedule that restyling from a noised start runs
BASE = dict(gamma=0.75, gamma_end=0.375, schedule="cosine", strength=1.0, layers="auto", start_percent=0.0, end_percent=1.0)
VARIANTS = {
    "join": dict(share="join", temperature=1.0),
    "join, temperature 1.5": dict(share="join", temperature=1.5),
    "replace": dict(share="replace", temperature=1.0),
    "replace, temperature 1.5": dict(share="replace", temperature=1.5),
}
OF_TRANSFORMERS = {f"join, {name}": dict(share="join", temperature=1.0, cures=cures) for name, cures in PRESETS.items() if name != "plain"}


class Pair:
    def __init__(self, architecture: str, content: torch.Tensor, style: torch.Tensor, steps: int):
        self.model, self.vae, self.kinds = load_mini(architecture=architecture)
        self.sigmas = schedule(self.model, steps, "simple")
        self.content, self.style = ({"samples": self.vae.encode(image.movedim(1, -1))} for image in (content, style))  # BCHW -> BHWC
        self.noise = torch.randn(self.content["samples"].shape, generator=torch.Generator().manual_seed(11))

    def decode(self, latent):
        return self.vae.decode(latent).movedim(-1, 1).float().clamp(0, 1)  # BHWC -> BCHW

    def draw(self, model, noise, latent, sigmas, kind="photo"):
        return self.decode(comfy.sample.sample_custom(
            model, noise, 1.0, comfy.samplers.sampler_object("euler"), sigmas, self.kinds[kind], self.kinds["empty"], latent,
            disable_pbar=True, seed=0,
        ))

    def rows(self, variants):
        """(name of the row, plain picture, {variant: picture})."""
        clean = self.content["samples"]
        late = self.sigmas[round((1 - START) * (len(self.sigmas) - 1)):]
        _, trajectory = invert(self.model, self.content, self.sigmas, self.kinds["empty"], "predicted")
        for name, latent, sigmas, content in (
            ("text to image", torch.zeros_like(clean), self.sigmas, None), ("noised start", clean, late, None),
            ("noised start, content", clean, late, trajectory),
        ):
            models = {variant: style_reference(self.model, self.style, None, content, **BASE | settings) for variant, settings in variants.items()}
            yield name, self.draw(self.model, self.noise, latent, sigmas), {
                variant: self.draw(model, self.noise, latent, sigmas) for variant, model in models.items()
            }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("assets", type=Path)
    parser.add_argument("--architecture", default="unet", choices=("unet", "transformer"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=10)
    add_outputs(parser, sheet=True)
    options = parser.parse_args()
    variants = VARIANTS | (OF_TRANSFORMERS if options.architecture == "transformer" else {})
    metrics = Metrics(options.assets / "metrics")
    found, sheet, started = {}, [], time.perf_counter()
    contents, styles = pictures(options.assets, options.size, options.pairs)
    for i, (content, style) in enumerate(zip(CONTENTS[: options.pairs], HELD_OUT_STYLES)):
        pair = Pair(options.architecture, contents[i : i + 1], styles[i : i + 1], options.steps)
        target = pair.decode(pair.content["samples"])
        for row, plain, images in pair.rows(variants):
            near = plain if row == "text to image" else target
            for variant, image in {"plain": plain, **images}.items():
                numbers = metrics.gram_distance(image, styles[i : i + 1]), metrics.lpips(image, near)
                found.setdefault((row, variant), []).append(numbers)
                print(content, style[:20], row, variant, "%.3f/%.3f" % numbers, flush=True)
            sheet.append(torch.cat([contents[i : i + 1], styles[i : i + 1], plain, *images.values()], dim=3))
    rows = list(dict.fromkeys(row for row, _ in found))
    mean = {key: tuple(sum(values) / len(values) for values in zip(*numbers)) for key, numbers in found.items()}
    text = [
        f"# Style Reference on {options.pairs} held-out pairs, mini {options.architecture}, {options.size} px, {options.steps} steps",
        "",
        f"Gram distance to the style / LPIPS. {setup_host.hardware()}, {time.perf_counter() - started:.0f} s.",
        "",
        "| | plain | " + " | ".join(variants) + " |",
        "|---|---|" + "---|" * len(variants),
        *(f"| {row} | " + " | ".join("%.3f / %.3f" % mean[row, variant] for variant in ("plain", *variants)) + " |" for row in rows),
    ]
    publish(text, options.table)
    save_sheet(sheet, options.sheet)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
