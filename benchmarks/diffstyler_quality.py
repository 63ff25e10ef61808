"""DiffStyler with the mini model on five held-out styles: does training learn, and does the LoRA carry the style?

    python benchmarks/diffstyler_quality.py ASSETS [--steps 20] [--train 300] [--table FILE] [--sheet FILE]

ASSETS holds content/, style/ (images that the mini model never saw) and metrics/. Loss: mean over draws of noise and
timestep that training never used, the same for the base and the LoRA at strength 1. Gram: distance to the style, lower is
nearer; first of pictures drawn from plain noise (mean of four seeds), then of pictures that start from the content's
inverted noise. LPIPS: distance to the content's decode. Floor: Gram distance of the decode of the style's own latent,
which a LoRA that drew its picture exactly would reach. The defaults were chosen with --tune.
"""

import argparse
import time
from pathlib import Path

import setup_host  # noqa: F401  (before torch and comfy)
import comfy.sd
import torch
from metrics import Metrics
from pastiche.nodes.algorithms.lora import TARGETS
from pastiche.nodes.algorithms.training import SCHEDULES
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
    parser.add_argument("--train", type=int, default=300, help="training steps")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", default="all+conv", choices=TARGETS)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--schedule", default="cosine", choices=SCHEDULES)
    parser.add_argument("--clean-weight", type=float, default=0.1)
    parser.add_argument("--crop", type=float, default=0.5)
    parser.add_argument("--strength", type=float, default=1.0, help="of the LoRA")
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

    def draw(m, shape):
        """Pictures from plain noise, (SEEDS, 3, H, W)."""
        noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
        start = model.model.process_latent_out(noise * float((1 + sigmas[0] ** 2) ** 0.5))
        return decode(sample(m, start, sigmas, kinds["painting"])).split(1)

    plain = None  # what the base draws depends on no style
    names = HELD_OUT_STYLES[5:] if options.tune else HELD_OUT_STYLES[: options.styles]
    for style, *images in zip(names, *pictures(options.assets, options.size, len(names), names)):
        content_image, style_image = (image[None] for image in images)
        data = training_images(None, style_image.movedim(1, -1), vae, False)  # BCHW -> BHWC
        settings = TrainingSettings(
            steps=options.train, learning_rate=options.rate, crop=options.crop, rank=options.rank, targets=options.targets,
            batch_size=options.batch, schedule=options.schedule, clean_weight=options.clean_weight,
        )
        trained = train_style_lora(model, data, kinds["painting"], settings)
        learned, lora = (comfy.sd.load_lora_for_models(model, None, trained.lora, s, 0)[0] for s in (1.0, options.strength))
        losses = [probe(m, data.mean[0], kinds["painting"]) for m in (model, learned)]
        plain = plain or draw(model, data.shape)
        floor = metrics.gram_distance(decode(data.mean[0]), style_image)
        drawings = plain, draw(lora, data.shape)
        drawn = [sum(metrics.gram_distance(x, style_image) for x in four) / len(SEEDS) for four in drawings]
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
        rows.append((style[:32], *losses, *drawn, values, floor))
        sheet.append(torch.cat([content_image, style_image, *(four[0] for four in drawings), *results], dim=3))
        inverted = " ".join(f"{g:.3f}/{p:.3f}" for g, p in values)
        print(style[:32], "loss %.4f -> %.4f, drawn %.3f -> %.3f," % rows[-1][1:5], inverted, f"floor {floor:.3f}", flush=True)
    text = [
        f"# DiffStyler on {len(rows)} held-out styles, mini model, {options.size} px", "",
        f"LoRA of one picture: rank {options.rank}, targets {options.targets}, {options.train} steps of {options.batch}, rate "
        f"{options.rate:g} {options.schedule}, clean_weight {options.clean_weight:g}, crop {options.crop:g}, used at strength "
        f"{options.strength:g}; {options.steps} sampling steps, cfg {options.cfg:g}. Loss: mean of {DRAWS} draws that training "
        f"never used, LoRA at strength 1. Drawn: Gram distance to the style of pictures from plain noise, mean of {len(SEEDS)} "
        f"seeds. Then from the content's inverted noise: Gram distance to the style / LPIPS to the content's decode. Floor: Gram "
        f"distance of the style's own decode. {setup_host.hardware()}, {time.perf_counter() - started:.0f} s. "
        "Made by `benchmarks/diffstyler_quality.py`.", "",
        "| style | floor | loss, base | loss, LoRA | drawn, base | drawn, LoRA | " + " | ".join(VARIANTS) + " |",
        "|---|---|---|---|---|---|" + "---|" * len(VARIANTS),
        *(f"| {s} | {f:.3f} | {a:.4f} | {b:.4f} | {c:.3f} | {d:.3f} | " + " | ".join(f"{g:.3f} / {p:.3f}" for g, p in v) + " |"
          for s, a, b, c, d, v, f in rows), "",
        f"- the loss falls for {sum(row[2] < row[1] for row in rows)} of {len(rows)} styles",
        f"- drawn from noise, the LoRA lowers Gram against the base for {sum(row[4] < row[3] for row in rows)} of {len(rows)}",
        f"- from inverted noise, the LoRA lowers Gram for {sum(row[5][1][0] < row[5][0][0] for row in rows)} of {len(rows)}",
        "- injection keeps more of the content (LPIPS below the LoRA's alone) for "
        f"{sum(row[5][2][1] < row[5][1][1] for row in rows)} of {len(rows)}",
    ]
    publish(text, options.table)
    save_sheet(sheet, options.sheet)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
