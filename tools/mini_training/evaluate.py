"""Measures the exported file as the pack loads it, and writes docs/mini: numbers.json and pictures."""
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open

from .data import square, validation_photos


def load_pack():
    """The pack's own loader, imported as package `pastiche`."""
    package = types.ModuleType("pastiche")
    package.__path__ = [str(Path(__file__).resolve().parents[2])]
    sys.modules.setdefault("pastiche", package)
    from pastiche.nodes.host.networks.mini import load_mini

    return load_mini


def psnr(a, b):
    """Decibels for tensors in 0..1."""
    return 10 * torch.log10(1 / (a - b).square().mean()).item()


def ddim_sigmas(model, steps):
    """Descending sigmas of ComfyUI's `simple` schedule, ending in 0."""
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(model.model.model_sampling, "simple", steps)


def walk(model, x, sigmas, context, inverting):
    """Euler steps x + (s' - s) eps along sigmas. Sampling takes eps(x, s); inverting (scheme `next`, as
    diffusers has it) takes eps at s' of the network's own latent x / sqrt(1 + s^2) as it stands."""
    for s, following in zip(sigmas[:-1], sigmas[1:]):
        at, seen = s, x
        if inverting:
            at, seen = following, x * ((1 + following ** 2) / (1 + s ** 2)).sqrt()
        denoised = model.model.apply_model(seen, at.expand(len(x)), c_crossattn=context.expand(len(x), -1, -1))
        x = x + (following - s) * (seen - denoised) / at
    return x


@torch.no_grad()
def round_trip(model, vae, context, images, steps):
    """DDIM inversion (`next`) and reconstruction of images (B, H, W, 3): dB of each against the VAE's own
    decode, std of the inverted latents at unit scale, decoded reconstructions."""
    clean = model.model.process_latent_in(vae.encode(images))
    sigmas = ddim_sigmas(model, steps)
    inverted = walk(model, clean, sigmas.flip(0), context, inverting=True)
    rebuilt = walk(model, inverted, sigmas, context, inverting=False)
    ours, reference = (vae.decode(model.model.process_latent_out(z)) for z in (rebuilt, clean))
    decibels = [psnr(a, b) for a, b in zip(ours, reference)]
    return decibels, (inverted.std() / (1 + sigmas[0] ** 2).sqrt()).item(), ours


def sheet(rows):
    """Rows of IMAGE tensors (B, H, W, 3) in 0..1 -> one PIL image."""
    picture = torch.cat([torch.cat(list(row), 1) for row in rows], 0)
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().numpy())


def loss_curve(log, last_step, path, target="noise", size=(760, 420)):
    """Training and validation loss over images seen, drawn from a log of lines; returns the last entry drawn."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    entries = [entry for entry in entries if entry["step"] <= last_step]
    shown = {"training": ("train", (150, 160, 180)), "validation (EMA)": ("validation", (190, 60, 40))}
    series = {name: ([(e["images"], e[key]) for e in entries if key in e], color) for name, (key, color) in shown.items()}
    losses = [loss for points, _ in series.values() for _, loss in points]
    low = 0.02 * np.floor(min(losses) / 0.02)
    high = low + 0.02 * np.ceil((np.percentile(losses, 90) - low) / 0.02)
    last_seen = entries[-1]["images"]
    width, height = size
    left, top, right, bottom = 62, 24, width - 20, height - 46
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)

    def place(x, y):
        return left + (right - left) * x / last_seen, bottom - (bottom - top) * (min(y, high) - low) / (high - low)

    for level in np.arange(low, high + 1e-9, (high - low) / 5):
        y = place(0, level)[1]
        draw.line((left, y, right, y), (225, 225, 225))
        draw.text((14, y - 6), f"{level:.3f}", "black")
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = place(share * last_seen, low)[0]
        draw.text((x - 14, bottom + 8), f"{share * last_seen / 1000:.1f}k", "black")
    draw.text((left, bottom + 26), f"images seen; mean squared error of the predicted {target}", "black")
    for i, (name, (points, color)) in enumerate(series.items()):
        draw.line([place(*point) for point in points], color, 2, joint="curve")
        draw.text((right - 130, top + 16 * i), name, color)
    image.save(path)
    return entries[-1]


def images_at(paths, size):
    """IMAGE (B, size, size, 3) in 0..1 of centre squares."""
    return (torch.stack([square(p, size) for p in paths]).movedim(1, -1) + 1) / 2  # BCHW -> BHWC


@torch.no_grad()
def report(weights, assets, work, output, size=256):
    load_mini = load_pack()
    model, vae, kinds = load_mini(weights)
    output.mkdir(parents=True, exist_ok=True)
    with safe_open(str(weights), framework="pt") as file:
        steps = int(file.metadata()["steps"])
    log, before = work / "unet_log.jsonl", output / "numbers.json"
    # a work folder of another stage alone, the decoder's for one, leaves the U-Net's curve as it was
    last = loss_curve(log, steps, output / "loss.png") if log.exists() else json.loads(before.read_text())["training"]
    contents = sorted((assets / "content").iterdir())
    images = images_at(contents, size)
    decoded = vae.decode(vae.encode(images))
    held_out = images_at(validation_photos(assets)[::4], size)
    numbers = {
        "training": last,
        "autoencoder_db": {p.stem: round(psnr(a, b), 1) for p, a, b in zip(contents, images, decoded)},
        "autoencoder_db_validation": round(float(np.mean([psnr(a, b) for a, b in zip(held_out, vae.decode(vae.encode(held_out)))])), 1),
    }
    shown = [i for i, p in enumerate(contents) if p.stem in ("skimage_astronaut", "skimage_coffee", "skimage_rocket", "seeding_by_Clements_Engelhardt")]
    for steps in (20, 50):
        decibels, std, rebuilt = round_trip(model, vae, kinds["empty"][0][0], images[shown], steps)
        numbers[f"round_trip_{steps}"] = {"db": {contents[i].stem: round(d, 1) for i, d in zip(shown, decibels)},
                                          "mean": round(float(np.mean(decibels)), 1), "std_of_inverted": round(std, 3)}
        print(steps, numbers[f"round_trip_{steps}"], flush=True)
    sheet([images[shown], decoded[shown], rebuilt]).save(output / "reconstruction.jpg", quality=90)
    rows = []
    sigmas = ddim_sigmas(model, 30)
    for name in ("photo", "painting", "drawing"):
        noise = torch.randn(3, 16, size // 16, size // 16, generator=torch.Generator().manual_seed(5))
        rows.append(vae.decode(model.model.process_latent_out(walk(model, noise * sigmas[0], sigmas, kinds[name][0][0], inverting=False))))
    sheet(rows).save(output / "samples.jpg", quality=90)
    numbers["autoencoder_db_mean"] = round(float(np.mean(list(numbers["autoencoder_db"].values()))), 1)
    (output / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")
