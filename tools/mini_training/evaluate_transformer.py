"""Measures the exported flow transformer as the pack loads it: docs/mini/transformer.json and pictures."""
import json

import torch
from safetensors import safe_open

from .evaluate import ddim_sigmas, images_at, load_pack, loss_curve, psnr, sheet

PHOTOS = ("skimage_astronaut", "skimage_coffee", "skimage_rocket", "seeding_by_Clements_Engelhardt")


class Velocity:
    """v(x, s) of MODEL for one conditioning; counts its evaluations."""

    def __init__(self, model, conditioning):
        self.model, (self.context, extra) = model, conditioning[0]
        self.pooled, self.calls = extra["pooled_output"], 0

    def __call__(self, x, s):
        self.calls += 1
        rows = len(x)
        clean = self.model.model.apply_model(x, s.expand(rows), c_crossattn=self.context.repeat(rows, 1, 1), y=self.pooled.repeat(rows, 1))
        return (x - clean) / s


def invert(velocity, x, ascending, scheme):
    """Along ascending sigmas from 0. `next`: v at (x, s'); `predicted`: v at the guess x + h v_before (Uni-Inv);
    `midpoint`: v at x + h/2 v_before, s + h/2 (FireFlow)."""
    last = None
    for s, following in zip(ascending[:-1], ascending[1:]):
        h = following - s
        if scheme == "midpoint":
            # The first step has no velocity before it, and the network knows no time 0.
            guess = velocity(x, following) if last is None else last
            last = velocity(x + h / 2 * guess, s + h / 2)
        else:
            last = velocity(x if last is None or scheme == "next" else x + h * last, following)
        x = x + h * last
    return x


def sample(velocity, x, descending, scheme):
    """Euler, or for `midpoint` its own way down: v at x + h/2 v_before, s + h/2."""
    last = None
    for s, following in zip(descending[:-1], descending[1:]):
        h = following - s
        if scheme == "midpoint":
            guess = velocity(x, s) if last is None else last
            last = velocity(x + h / 2 * guess, s + h / 2)
        else:
            last = velocity(x, s)
        x = x + h * last
    return x


@torch.no_grad()
def report(weights, transformer, assets, work, output, size=128):
    load_mini = load_pack()
    model, vae, kinds = load_mini(weights, "transformer", transformer)
    with safe_open(str(transformer), framework="pt") as file:
        steps = int(file.metadata()["steps"])
    numbers = {"training": loss_curve(work / "transformer_log.jsonl", steps, output / "transformer_loss.png", "velocity")}
    images = images_at([next((assets / "content").glob(f"{name}.*")) for name in PHOTOS], size)
    clean = model.model.process_latent_in(vae.encode(images))
    reference = vae.decode(model.model.process_latent_out(clean))
    sigmas = ddim_sigmas(model, 20)
    shown = None
    for scheme in ("next", "predicted", "midpoint"):
        velocity = Velocity(model, kinds["empty"])
        inverted = invert(velocity, clean, sigmas.flip(0), scheme)
        rebuilt = vae.decode(model.model.process_latent_out(sample(velocity, inverted, sigmas, scheme)))
        decibels = [round(psnr(a, b), 1) for a, b in zip(rebuilt, reference)]
        numbers[f"round_trip_20_{scheme}"] = {"db": decibels, "mean": round(sum(decibels) / len(decibels), 1),
                                              "std_of_inverted": round(inverted.std().item(), 3), "evaluations": velocity.calls}
        print(scheme, numbers[f"round_trip_20_{scheme}"], flush=True)
        if scheme == "predicted":
            shown = rebuilt
    sheet([images, reference, shown]).save(output / "transformer_reconstruction.jpg", quality=90)
    rows, sigmas = [], ddim_sigmas(model, 30)
    for name in ("photo", "painting", "drawing"):
        noise = torch.randn(3, 16, size // 8, size // 8, generator=torch.Generator().manual_seed(5))
        rows.append(vae.decode(model.model.process_latent_out(sample(Velocity(model, kinds[name]), noise, sigmas, "euler"))))
    sheet(rows).save(output / "transformer_samples.jpg", quality=90)
    # Root mean square between samples of the same noise, in a range of 0..1: photo-painting, photo-drawing, painting-drawing
    numbers["kinds_apart"] = [round((rows[i] - rows[j]).square().mean().sqrt().item(), 4) for i, j in ((0, 1), (0, 2), (1, 2))]
    (output / "transformer.json").write_text(json.dumps(numbers, indent=1) + "\n")
