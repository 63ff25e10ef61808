"""Train the demo segmenter: a small one-class YOLOv8-seg, on drawn scenes only.

    python tools/train_mini_fastsam.py [--minutes 18] [--output assets/fastsam_mini.safetensors]

Needs `pip install --no-deps ultralytics opencv-python-headless`. Data: 2,000 scenes of
tools/fastsam_scenes.py, flipped, turned and recoloured; no photos and no other weights, so there is
no licence to mind. One CPU core is enough (about 20 minutes); the seed fixes everything but rounding
(and, as training ends by the clock, the number of steps).
It is a stand-in for FastSAM-s and FastSAM-x that knows coloured shapes and nothing of the world.
"""

import argparse
import copy
import os
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
SIZE, BATCH, PEAK_RATE = 256, 8, 2e-3
MASK_SIZE = SIZE // 2  # twice the prototypes' grid: edges finer than a prototype cell are learned
DEPTH, WIDTH, MAX_CHANNELS = 0.33, 0.1875, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=18)
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(ROOT / "assets" / "fastsam_mini.safetensors"))
    options = parser.parse_args()

    os.environ.update(YOLO_CONFIG_DIR=tempfile.mkdtemp(), YOLO_OFFLINE="True", YOLO_VERBOSE="False")
    package = types.ModuleType("pastiche")
    package.__path__ = [str(ROOT)]
    sys.modules["pastiche"] = package
    sys.path.insert(0, str(ROOT / "tools"))
    from pastiche.nodes.host.fastsam.checkpoint import SegmenterWeights, save_safetensors

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    weights = SegmenterWeights(DEPTH, WIDTH, MAX_CHANNELS, SIZE, {})
    model = build(weights)
    pool = draw_pool(options.scenes)
    averaged = train(model, pool, options.minutes * 60, options.seed)
    weights.state = {key: value for key, value in averaged.state_dict().items()}
    os.makedirs(os.path.dirname(os.path.abspath(options.output)), exist_ok=True)
    save_safetensors(weights, options.output)
    print(f"{options.output}: {os.path.getsize(options.output) / 1e6:.1f} MB")


def build(weights) -> torch.nn.Module:
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import SegmentationModel

    model = SegmentationModel(weights.layout(), ch=3, nc=1, verbose=False)
    model.args = get_cfg(overrides={"overlap_mask": True})
    return model.train()


def draw_pool(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(image (3, S, S) uint8, index map (S, S) uint8 with 0 for the background) of each scene."""
    from fastsam_scenes import HELD_OUT, draw_scene

    assert count <= HELD_OUT
    pool = []
    for seed in range(count):
        scene = draw_scene(seed, SIZE, SIZE)
        index = np.zeros((SIZE, SIZE), np.uint8)
        for number, mask in enumerate(scene.masks, start=1):
            index[mask] = number
        image = torch.from_numpy((scene.image * 255).round().astype(np.uint8)).permute(2, 0, 1)  # HWC -> CHW
        pool.append((image.contiguous(), torch.from_numpy(index)))
    return pool


def draw_batch(pool, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A batch as ultralytics' loss takes it, each scene flipped, turned and recoloured at random."""
    images, maps, boxes, owners = [], [], [], []
    for slot in range(BATCH):
        image, index = pool[int(torch.randint(len(pool), (1,), generator=generator))]
        image = image[torch.randperm(3, generator=generator)].float() / 255
        flips = torch.randint(2, (3,), generator=generator).bool()
        axes = [axis for axis, flip in zip((-1, -2), flips) if flip]
        image, index = image.flip(axes), index.flip(axes)
        if flips[2]:
            image, index = image.transpose(-1, -2), index.transpose(-1, -2)
        renumbered = torch.zeros_like(index)
        for number, original in enumerate(index.unique()[1:], start=1):
            mask = index == original
            renumbered[mask] = number
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            x1, x2 = columns[0].item() / SIZE, (columns[-1].item() + 1) / SIZE
            y1, y2 = rows[0].item() / SIZE, (rows[-1].item() + 1) / SIZE
            boxes.append([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])
            owners.append(slot)
        images.append(image)
        maps.append(renumbered)
    masks = F.interpolate(torch.stack(maps)[:, None].float(), (MASK_SIZE, MASK_SIZE), mode="nearest-exact")[:, 0]
    return {
        "img": torch.stack(images),
        "masks": masks,
        "bboxes": torch.tensor(boxes),
        "cls": torch.zeros(len(boxes), 1),
        "batch_idx": torch.tensor(owners, dtype=torch.float32),
    }


def train(model, pool, seconds: float, seed: int) -> torch.nn.Module:
    """One warm-up and cosine cycle over the given time; returns the moving average of the weights."""
    decayed = [p for p in model.parameters() if p.ndim > 1 and p.requires_grad]
    plain = [p for p in model.parameters() if p.ndim <= 1 and p.requires_grad]
    groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98))
    averaged = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(seed)
    started, step, recent = time.process_time(), 0, []
    while (spent := (time.process_time() - started) / seconds) < 1:
        rate = PEAK_RATE * min(1, (step + 1) / 60) * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * spent)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses, _ = model(draw_batch(pool, generator))
        optimizer.zero_grad()
        losses.sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        keep = min(0.997, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, value in zip(averaged.state_dict().values(), model.state_dict().values()):
                mean.lerp_(value, 1 - keep) if mean.is_floating_point() else mean.copy_(value)
        recent.append((losses / BATCH).detach())
        step += 1
        if step % 50 == 0:
            box, mask, score, bins = torch.stack(recent).mean(0)[:4].tolist()
            print(f"{step:5d} {100 * spent:4.0f} %  box {box:.2f} mask {mask:.2f} score {score:.2f} bins {bins:.2f}", flush=True)
            recent.clear()
    return averaged


if __name__ == "__main__":
    main()
