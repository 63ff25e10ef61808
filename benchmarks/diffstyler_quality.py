"""DiffStyler with the mini model on five held-out styles: does training learn, and does the LoRA carry the style?

    python benchmarks/diffstyler_quality.py ASSETS [--steps 20] [--train 120] [--table FILE] [--sheet FILE]

ASSETS holds content/, style/ (images that the mini model never saw) and metrics/. Loss: mean over draws of noise and
timestep that training never used, the same for base and LoRA. Gram: distance to the style, lower is nearer; first of
pictures drawn from plain noise (mean of four seeds), then of pictures that start from the content's inverted noise.
LPIPS: distance to the content's decode.
"""

import argparse
import time
from pathlib import Path

import setup_host  # noqa: F401  (before torch and comfy)
import comfy.sd
import torch
from metrics import Metrics
from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.injections.content import inject_features
from pastiche.nodes.host.trajectories.inversion import invert, walk_latent
from pastiche.nodes.host.training.loop import TrainingSettings, train_style_lora
from pastiche.nodes.host.networks.mini import load_mini
from pastiche.nodes.host.training.images import training_images
from report import HELD_OUT_STYLES, add_outputs, pictures, publish, save_sheet
from support.sampling import sample, schedule

VARIANTS = ("base", "LoRA", "LoRA + injection")
DRAWS, SEEDS = 24, (1, 2, 3, 4)


def probe(model, latent, conditioning):
    """Mean loss on eps over draws of noise and timestep that are always the same."""
    generator = torch.Generator().manual_seed(987654321)
    levels = model.get_model_object("model_sampling").sigmas
    drawn = [(levels[int(torch.rand((), generator=generator) * len(levels))], torch.randn(latent.shape, generator=generator)) for _ in range(DRAWS)]

    def walk(predict, x, report):
        errors = [((predict(x + sigma * noise, sigma) - x) / sigma).square().mean() for sigma, noise in drawn]
        return torch.full_like(x, float(sum(errors) / DRAWS))

    out = walk_latent(model, latent, conditioning, torch.tensor([1.0, 0.0]), walk)
    return float(model.model.process_latent_in(out).mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("assets", type=Path)
    parser.add_argument("--steps", type=int, default=20, help="sampling steps")
    parser.add_argument("--train", type=int, default=120, help="training steps")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--crop", type=float, default=1.0)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--styles", type=int, default=5)
    parser.add_argument("--tune", action="store_true", help="the other five held-out styles: choose settings on these")
    parser.add_argument("--cfg", type=float, default=1.0)
    add_outputs(parser, sheet=True)
    options = parser.parse_args()
    metrics = Metrics(options.assets / "metrics")
    model, vae, kinds = load_mini()
    sigmas, rows, sheet, started = schedule(model, options.steps), [], [], time.perf_counter()

    def decode(latent):
        return vae.decode(latent).movedim(-1, 1).float().clamp(0, 1)  # BHWC -> BCHW

    names = HELD_OUT_STYLES[5:] if options.tune else HELD_OUT_STYLES[: options.styles]
    for style, *images in zip(names, *pictures(options.assets, options.size, len(names), names)):
        content_image, style_image = (image[None] for image in images)
        data = training_images(None, style_image.movedim(1, -1), vae, False)  # BCHW -> BHWC
        settings = TrainingSettings(steps=options.train, learning_rate=options.rate, crop=options.crop)
        trained = train_style_lora(model, data, kinds["painting"], settings)
        lora = comfy.sd.load_lora_for_models(model, None, trained.lora, 1.0, 0)[0]
        losses = [probe(m, data.mean[0], kinds["painting"]) for m in (model, lora)]
        drawn = []
        for m in (model, lora):
            noises = (torch.randn(data.shape, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS)
            starts = (model.model.process_latent_out(noise * float((1 + sigmas[0] ** 2) ** 0.5)) for noise in noises)
            drawings = [decode(sample(m, start, sigmas, kinds["painting"])) for start in starts]
            drawn.append((sum(metrics.gram_distance(x, style_image) for x in drawings) / len(SEEDS), drawings[0]))
        latent = {"samples": vae.encode(content_image.movedim(1, -1))}
        noise, trajectory = invert(model, latent, sigmas, kinds["empty"], "fixed_point", 3)
        features = capture(model, trajectory, "residual, self_attention_qk, cross_attention", "3-11", "ram")
        target = decode(latent["samples"])
        results = []
        for name in VARIANTS:
            sampled = model if name == "base" else lora
            if name.endswith("injection"):
                sampled = inject_features(sampled, features, 0.6, 0.5, "auto", "auto", "auto")
            results.append(decode(sample(sampled, noise["samples"], sigmas, kinds["painting"], kinds["empty"], options.cfg)))
        values = [(metrics.gram_distance(x, style_image), metrics.lpips(x, target)) for x in results]
        rows.append((style[:32], *losses, *(gram for gram, _ in drawn), values))
        sheet.append(torch.cat([content_image, style_image, drawn[0][1], drawn[1][1], *results], dim=3))
        print(style[:32], "loss %.4f -> %.4f, drawn %.3f -> %.3f" % rows[-1][1:5], " ".join(f"{g:.3f}/{p:.3f}" for g, p in values), flush=True)
    text = [
        f"# DiffStyler on {len(rows)} held-out styles, mini model, {options.size} px", "",
        f"LoRA of one picture: rank 16, qkv, {options.train} steps, rate {options.rate:g}, crop {options.crop:g}; "
        f"{options.steps} sampling steps, cfg {options.cfg:g}. Loss: mean of {DRAWS} draws that training never used. Drawn: Gram "
        f"distance to the style of pictures from plain noise, mean of {len(SEEDS)} seeds. Then from the content's inverted noise: "
        f"Gram distance to the style / LPIPS to the content's decode. {setup_host.hardware()}, "
        f"{time.perf_counter() - started:.0f} s. Made by `benchmarks/diffstyler_quality.py`.", "",
        "| style | loss, base | loss, LoRA | drawn, base | drawn, LoRA | " + " | ".join(VARIANTS) + " |",
        "|---|---|---|---|---|" + "---|" * len(VARIANTS),
        *(f"| {s} | {a:.4f} | {b:.4f} | {c:.3f} | {d:.3f} | " + " | ".join(f"{g:.3f} / {p:.3f}" for g, p in v) + " |"
          for s, a, b, c, d, v in rows), "",
        f"- the loss falls for {sum(row[2] < row[1] for row in rows)} of {len(rows)} styles",
        f"- drawn from noise, the LoRA lowers Gram against the base for {sum(row[4] < row[3] for row in rows)} of {len(rows)}",
        f"- from inverted noise, the LoRA lowers Gram for {sum(row[5][1][0] < row[5][0][0] for row in rows)} of {len(rows)}",
        f"- injection keeps more of the content (LPIPS below the LoRA's alone) for {sum(row[5][2][1] < row[5][1][1] for row in rows)} of {len(rows)}",
    ]
    publish(text, options.table)
    save_sheet(sheet, options.sheet)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
