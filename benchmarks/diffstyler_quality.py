"""DiffStyler with the mini model on five held-out styles: does training learn, and does the LoRA carry the style?

    python benchmarks/diffstyler_quality.py ASSETS [--steps 20] [--train 120] [--table FILE] [--sheet FILE]

ASSETS holds content/, style/ (images that the mini model never saw) and metrics/. Loss: mean over draws of noise and
timestep that training never used, the same for base and LoRA. Gram: distance to the style, lower is nearer. LPIPS:
distance to the content's decode. All pictures start from the content's inverted noise.
"""

import argparse
import sys
import time
from pathlib import Path

import setup_host  # noqa: F401  (before torch and comfy)
import comfy.sd
import torch
from metrics import Metrics
from PIL import Image

sys.path.append(str(setup_host.ROOT / "tools"))
from mini_training.data import HELD_OUT_STYLES, square
from pastiche.nodes.host.capture import capture
from pastiche.nodes.host.feature_injection import inject_features
from pastiche.nodes.host.inversion import invert
from pastiche.nodes.host.lora_training import TrainingSettings, train_style_lora
from pastiche.nodes.host.mini import load_mini
from pastiche.nodes.host.training_data import training_images
from support.sampling import sample, schedule

CONTENTS = ("skimage_astronaut.png", "skimage_chelsea.png", "skimage_coffee.png", "skimage_rocket.png",
            "seeding_by_Clements_Engelhardt.jpg")
VARIANTS = ("base", "LoRA", "LoRA + injection")
PROBE = dict(steps=16, seed=987654321, learning_rate=1e-12, rank=1)  # a rate that changes nothing: losses of 16 fixed draws


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("assets", type=Path)
    parser.add_argument("--steps", type=int, default=20, help="sampling steps")
    parser.add_argument("--train", type=int, default=120, help="training steps")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--styles", type=int, default=5)
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args()
    metrics = Metrics(options.assets / "metrics")
    model, vae, kinds = load_mini()
    sigmas, rows, sheet, started = schedule(model, options.steps), [], [], time.perf_counter()

    def decode(latent):
        return vae.decode(latent).movedim(-1, 1).float().clamp(0, 1)  # BHWC -> BCHW

    for content, style in list(zip(CONTENTS, HELD_OUT_STYLES))[: options.styles]:
        content_image, style_image = (
            square(path, options.size)[None] / 2 + 0.5
            for path in (options.assets / "content" / content, options.assets / "style" / f"{style}.png")
        )
        data = training_images(None, style_image.movedim(1, -1), vae, False)  # BCHW -> BHWC
        settings = TrainingSettings(steps=options.train, learning_rate=options.rate, crop=0.5)
        clock = time.perf_counter()
        trained = train_style_lora(model, data, kinds["painting"], settings)
        seconds = (time.perf_counter() - clock) / options.train
        lora = comfy.sd.load_lora_for_models(model, None, trained.lora, 1.0, 0)[0]
        losses = [
            sum(train_style_lora(m, data, kinds["painting"], TrainingSettings(**PROBE)).losses) / PROBE["steps"] for m in (model, lora)
        ]
        latent = {"samples": vae.encode(content_image.movedim(1, -1))}
        noise, trajectory = invert(model, latent, sigmas, kinds["empty"], "fixed_point", 3)
        features = capture(model, trajectory, "residual, self_attention_qk, cross_attention", "3-11", "ram")
        target = decode(latent["samples"])
        pictures = []
        for name in VARIANTS:
            sampled = model if name == "base" else lora
            if name.endswith("injection"):
                sampled = inject_features(sampled, features, 0.6, 0.5, "auto", "auto", "auto")
            pictures.append(decode(sample(sampled, noise["samples"], sigmas, kinds["painting"], kinds["empty"], options.cfg)))
        values = [(metrics.gram_distance(x, style_image), metrics.lpips(x, target)) for x in pictures]
        rows.append((style[:32], *losses, values, seconds))
        sheet.append(torch.cat([content_image, style_image, *pictures], dim=3))
        print(style[:32], "loss %.4f -> %.4f" % tuple(losses), " ".join(f"{g:.3f}/{p:.3f}" for g, p in values), f"{seconds:.2f} s/step", flush=True)
    text = [
        f"# DiffStyler on {len(rows)} held-out styles, mini model, {options.size} px", "",
        f"LoRA of one picture: rank 16, qkv, {options.train} steps, rate {options.rate:g}, crops of half to the whole; "
        f"{options.steps} sampling steps from the content's inverted noise, cfg {options.cfg:g}. Loss on 16 draws that training "
        f"never used; Gram distance to the style / LPIPS to the content's decode. {setup_host.hardware()}, "
        f"{time.perf_counter() - started:.0f} s. Made by `benchmarks/diffstyler_quality.py`.", "",
        "| style | loss, base | loss, LoRA | " + " | ".join(VARIANTS) + " |", "|---|---|---|" + "---|" * len(VARIANTS),
        *(f"| {s} | {a:.4f} | {b:.4f} | " + " | ".join(f"{g:.3f} / {p:.3f}" for g, p in v) + " |" for s, a, b, v, _ in rows), "",
        f"- the loss falls for {sum(b < a for _, a, b, _, _ in rows)} of {len(rows)} styles",
        f"- the LoRA lowers Gram against the base for {sum(v[1][0] < v[0][0] for *_, v, _ in rows)} of {len(rows)}",
        f"- injection keeps more of the content (LPIPS below the LoRA's alone) for {sum(v[2][1] < v[1][1] for *_, v, _ in rows)} of {len(rows)}",
    ]
    print("\n".join(text))
    if options.table:
        options.table.write_text("\n".join(text) + "\n")
    if options.sheet:
        pixels = (torch.cat(sheet, dim=2)[0].movedim(0, -1) * 255).round().to(torch.uint8).numpy()  # CHW -> HWC
        Image.fromarray(pixels).save(options.sheet, quality=85)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
