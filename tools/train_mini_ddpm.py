"""Trains the small unconditional pixel model that the tests use: a diffusers UNet2DModel at 32x32.

    python tools/train_mini_ddpm.py PHOTOS OUT [--minutes 10] [--seed 0] [--threads 1]

PHOTOS is a folder of images (the committed model saw CC0 photos), OUT the model folder to write: config.json,
diffusion_pytorch_model.safetensors (half precision) and scheduler_config.json, as google/ddpm-cifar10-32 has
them, with the same block layout at a quarter of its width. It knows smears of colour, not objects: enough to
invert and inject, not to look at. Needs torch, diffusers and Pillow.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch
from PIL import Image

SIZE, BATCH, RATE, EMA = 32, 16, 4e-4, 0.998
NETWORK = dict(
    sample_size=SIZE, in_channels=3, out_channels=3, layers_per_block=2, block_out_channels=(32, 64, 64, 64),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
)
SCHEDULE = dict(_class_name="DDPMScheduler", beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
                num_train_timesteps=1000, clip_sample=True, variance_type="fixed_small")


def load_images(folder: Path) -> torch.Tensor:
    """(N, 3, 40, 40) in -1..1: the centre square of every image, a little larger than the model's own size."""
    side, images = SIZE + 8, []
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")):
        image = Image.open(path).convert("RGB")
        edge = min(image.size)
        box = ((image.width - edge) // 2, (image.height - edge) // 2)
        image = image.crop((*box, box[0] + edge, box[1] + edge)).resize((side, side), Image.Resampling.LANCZOS)
        images.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(side, side, 3))
    if not images:
        raise SystemExit(f"no .jpg, .png or .webp images in {folder}")
    return torch.stack(images).permute(0, 3, 1, 2).float() / 127.5 - 1  # BHWC -> BCHW


def batch_of(images: torch.Tensor) -> torch.Tensor:
    """(BATCH, 3, 32, 32): random crops, half of them mirrored."""
    picked = images[torch.randint(len(images), (BATCH,))]
    top, left = torch.randint(9, (2,)).tolist()
    picked = picked[..., top : top + SIZE, left : left + SIZE]
    return torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, picked.flip(-1), picked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    from diffusers import DDPMScheduler, UNet2DModel

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    images = load_images(options.photos)
    network = UNet2DModel(**NETWORK)
    average = copy.deepcopy(network).requires_grad_(False)
    schedule = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    print(f"{len(images)} images, {network.num_parameters() / 1e6:.2f} M parameters", flush=True)

    started, step, shown = time.monotonic(), 0, 0.0
    while (done := (time.monotonic() - started) / 60 / options.minutes) < 1:
        clean = batch_of(images)
        noise = torch.randn_like(clean)
        t = torch.randint(1000, (BATCH,))
        loss = torch.nn.functional.mse_loss(network(schedule.add_noise(clean, noise, t), t).sample, noise)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        decay = min(EMA, (step + 1) / (step + 10))
        for slow, fast in zip(average.parameters(), network.parameters()):
            slow.lerp_(fast.detach(), 1 - decay)
        step += 1
        shown += loss.item()
        if step % 100 == 0:
            print(f"step {step}  {100 * done:.0f} %  loss {shown / 100:.4f}", flush=True)
            shown = 0.0

    average.half().save_pretrained(options.out)
    (options.out / "scheduler_config.json").write_text(json.dumps(SCHEDULE, indent=2) + "\n")


if __name__ == "__main__":
    main()
