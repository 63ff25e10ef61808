"""Style Reference on held-out pairs with a mini model: restyling from a noised start and from an inversion, text to image.

    python benchmarks/style_reference.py ASSETS [--architecture transformer] [--steps 20] [--size 128] [--pairs 10]
        [--starts noised,inverted,text] [--table FILE] [--sheet FILE]

ASSETS holds content/, style/ (images that the mini models never saw) and metrics/. Gram: distance to the style, LPIPS: distance to
the content's decode (for text to image: to the plain sample), lower is nearer. The sheet has the pictures of the first start, six pairs.
"""

import argparse
import time

import setup_host  # noqa: F401  (before torch and comfy)
import comfy.sample
import comfy.samplers
import torch
from metrics import Metrics
from pastiche.nodes.host.networks.mini import load_mini
from pastiche.nodes.host.references.install import style_reference
from pastiche.nodes.host.references.settings import PRESETS, Cures
from pastiche.nodes.host.trajectories.inversion import invert, inverted_noise
from report import CONTENTS, HELD_OUT_STYLES, add_outputs, add_pictures, pictures, publish, save_sheet
from support.sampling import schedule

START = 0.6  # share of the schedule that restyling from a noised start runs
STARTS = {"noised": "noised start", "inverted": "inversion, its queries kept", "text": "text to image"}
BASE = dict(gamma=0.75, gamma_end=0.375, schedule="cosine", strength=1.0, layers="auto", start_percent=0.0, end_percent=1.0)
VARIANTS = {
    "join": dict(share="join", temperature=1.0),
    "replace": dict(share="replace", temperature=1.0),
    "replace, temperature 1.5": dict(share="replace", temperature=1.5),
}
OF_TRANSFORMERS = {
    "replace, untwisted": dict(share="replace", temperature=1.0, cures=Cures(untwist_high=0.5, untwist_low=1.3)),
    "replace, moved aside": dict(share="replace", temperature=1.0, cures=Cures(position_shift=1.0)),
    "join, balanced": dict(share="join", temperature=1.0, cures=PRESETS["balanced"]),
    "replace, balanced": dict(share="replace", temperature=1.5, cures=PRESETS["balanced"]),
    "replace, more style": dict(share="replace", temperature=1.5, cures=PRESETS["more style"]),
}
SHOWN = 6  # pairs on the sheet


class Pair:
    def __init__(self, loaded: tuple, content: torch.Tensor, style: torch.Tensor, steps: int):
        self.model, self.vae, self.kinds = loaded
        self.sigmas = schedule(self.model, steps, "simple")
        self.content, self.style = ({"samples": self.vae.encode(image.movedim(1, -1))} for image in (content, style))  # BCHW -> BHWC
        self.noise = torch.randn(self.content["samples"].shape, generator=torch.Generator().manual_seed(11))

    def decode(self, latent):
        return self.vae.decode(latent).movedim(-1, 1).float().clamp(0, 1)  # BHWC -> BCHW

    def draw(self, model, noise, latent, sigmas, kind):
        return self.decode(comfy.sample.sample_custom(
            model, noise, 1.0, comfy.samplers.sampler_object("euler"), sigmas, self.kinds[kind], self.kinds["empty"], latent,
            disable_pbar=True, seed=0,
        ))

    def pictures(self, start, variants):
        """(plain picture, {variant: picture}) of one way to begin."""
        clean, content, kind, noise, sigmas = self.content["samples"], None, "photo", self.noise, self.sigmas
        empty = torch.zeros_like(clean)
        if start == "noised":
            sigmas, latent = sigmas[round((1 - START) * (len(sigmas) - 1)):], clean
        elif start == "inverted":
            _, content = invert(self.model, self.content, sigmas, self.kinds["empty"], "predicted")
            noise, latent, kind = inverted_noise(self.model, content).generate_noise({"samples": empty}), empty, "empty"
        else:
            latent = empty
        models = {name: style_reference(self.model, self.style, None, content, **BASE | settings) for name, settings in variants.items()}
        return self.draw(self.model, noise, latent, sigmas, kind), {
            name: self.draw(model, noise, latent, sigmas, kind) for name, model in models.items()
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_pictures(parser, 20, 128, 10)
    parser.add_argument("--architecture", default="transformer", choices=("unet", "transformer"))
    parser.add_argument("--starts", default=",".join(STARTS))
    add_outputs(parser, sheet=True)
    options = parser.parse_args()
    variants = VARIANTS | (OF_TRANSFORMERS if options.architecture == "transformer" else {})
    starts = options.starts.split(",")
    metrics = Metrics(options.assets / "metrics")
    found, sheet, started = {}, [], time.process_time()
    contents, styles = pictures(options.assets, options.size, options.pairs)
    loaded = load_mini(architecture=options.architecture)
    for i, (content, style) in enumerate(zip(CONTENTS[: options.pairs], HELD_OUT_STYLES)):
        painting = styles[i : i + 1]
        pair = Pair(loaded, contents[i : i + 1], painting, options.steps)
        target = pair.decode(pair.content["samples"])
        for start in starts:
            plain, images = pair.pictures(start, variants)
            near = plain if start == "text" else target
            for variant, image in {"plain": plain, **images}.items():
                numbers = metrics.gram_distance(image, painting), metrics.lpips(image, near)
                found.setdefault((start, variant), []).append(numbers)
                print(content, style[:20], start, variant, "%.3f/%.3f" % numbers, flush=True)
            if start == starts[0] and i < SHOWN:
                sheet.append(torch.cat([contents[i : i + 1], painting, plain, *images.values()], dim=3))
    text = [
        f"# Style Reference on {options.pairs} held-out pairs, mini {options.architecture}, {options.size} px, {options.steps} steps",
        "",
        "Mean Gram distance to the style / LPIPS to the content's decode (text to image: to the plain sample); in brackets the pairs whose "
        f"Gram is below plain's. {setup_host.hardware()}, {time.process_time() - started:.0f} s of CPU.",
        "",
        "| | " + " | ".join(STARTS[start] for start in starts) + " |",
        "|---|" + "---|" * len(starts),
    ]
    for variant in ("plain", *variants):
        cells = []
        for start in starts:
            gram, lpips = (sum(values) / options.pairs for values in zip(*found[start, variant]))
            fallen = sum(own[0] < plain[0] for own, plain in zip(found[start, variant], found[start, "plain"]))
            cells.append(f"{gram:.3f} / {lpips:.3f}" + ("" if variant == "plain" else f" ({fallen})"))
        text.append(f"| {variant} | " + " | ".join(cells) + " |")
    publish(text, options.table)
    save_sheet(sheet, options.sheet)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
