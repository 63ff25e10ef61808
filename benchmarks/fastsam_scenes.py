"""How well prompts find objects: 50 drawn scenes with known masks that the demo model was not trained on.

    python benchmarks/fastsam_scenes.py [--model NAME] [--scenes 50] [--table FILE]

The model comes through Load FastSAM's own loader ("pastiche mini (demo)" by default), prompts through
FastSAM Prompt's own code.
"""

import argparse
import time

import setup_host  # first: makes ComfyUI and the pack importable
import torch
from pastiche.nodes.algorithms.prompts import parse_boxes, parse_points
from pastiche.nodes.host.fastsam.model import MINI, load_fastsam
from pastiche.nodes.host.fastsam.prompt import Finish, Prompt, prompt_masks
from report import add_outputs, publish
from support import segmenters

FIRST = 100  # after the seeds that tests use
SIZES = [(256, 256), (300, 400), (480, 320), (512, 512)]  # height, width
GOOD = 0.7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MINI)
    parser.add_argument("--scenes", type=int, default=50)
    add_outputs(parser)
    options = parser.parse_args()
    table = report(measure(options.model, options.scenes), options)
    publish(table.splitlines(), options.table)


def measure(model: str, count: int) -> dict[str, list[float]]:
    """IoU of each prompt's mask with the object it means, by kind of prompt, and counts of "everything"."""
    drawing = segmenters.scenes()
    sam = load_fastsam(model)
    found: dict[str, list[float]] = {
        kind: [] for kind in ("point", "box", "two points", "negative", "removed", "everything", "spurious", "ms network", "ms prompt")
    }
    for number in range(count):
        scene = drawing.draw_scene(drawing.HELD_OUT + FIRST + number, *SIZES[number % len(SIZES)])
        image = torch.from_numpy(scene.image)[None]
        masks = torch.from_numpy(scene.masks)
        points = [drawing.inner_point(mask) for mask in scene.masks]
        started = time.perf_counter()
        objects = prompt_masks(sam, image, Prompt(), Finish(merge=False)).masks > 0.5
        found["ms network"].append(1000 * (time.perf_counter() - started))

        def ask(points=(), boxes=()):
            prompt = Prompt(points=(parse_points([list(p) for p in points]),), boxes=(parse_boxes([list(b) for b in boxes]),))
            started = time.perf_counter()
            mask = prompt_masks(sam, image, prompt, Finish()).masks[0] > 0.5
            found["ms prompt"].append(1000 * (time.perf_counter() - started))
            return mask

        for i, mask in enumerate(masks):
            found["point"].append(iou(ask([points[i]]), mask))
            found["box"].append(iou(ask(boxes=[scene.boxes()[i].tolist()]), mask))
            found["everything"].append(max((iou(each, mask) for each in objects), default=0.0))
            other = (i + 1) % len(masks)
            if other != i:
                both = ask([points[i], points[other]])
                found["two points"].append(iou(both, mask | masks[other]))
                kept = ask([(*points[i], 1), (*points[other], 0)])
                found["negative"].append(iou(kept, mask))
                found["removed"].append(1.0 - (kept & masks[other]).sum().item() / masks[other].sum().item())
        found["spurious"].append(sum(max(iou(each, mask) for mask in masks) < 0.5 for each in objects if each.any()))
    return found


def iou(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a & b).sum().item() / max(1, (a | b).sum().item())


def report(found: dict[str, list[float]], options) -> str:
    def row(name, key, goal=""):
        values = torch.tensor(found[key])
        share = (values > GOOD).float().mean().item()
        return f"| {name} | {len(values)} | {share:.1%} | {goal} | {values.mean():.3f} | {values.median():.3f} |"

    spurious = sum(found["spurious"])
    network, prompt = (torch.tensor(found[key]).median().item() for key in ("ms network", "ms prompt"))
    lines = [
        "# FastSAM prompts on drawn scenes",
        "",
        f"{options.scenes} scenes of `tools/fastsam_scenes.py` with seeds that training never saw, 2 to 7 objects each, sizes "
        + ", ".join(f"{h}x{w}" for h, w in SIZES)
        + f". Model: {options.model}. Made by `python benchmarks/fastsam_scenes.py --write` on {setup_host.hardware()}.",
        "",
        f"| prompt | cases | IoU > {GOOD} | goal | mean IoU | median |",
        "|---|---|---|---|---|---|",
        row("a point inside an object", "point", "90%"),
        row("an object's bounding box", "box", "90%"),
        row("points in two objects: their union", "two points"),
        row("a point in one object, a negative one in another", "negative"),
        row('"everything": best mask of each object', "everything", "80%"),
        "",
        f"A negative point removed {sum(v > 0.95 for v in found['removed'])} of {len(found['removed'])} objects "
        f"(more than 95 % of their pixels). \"Everything\" gave {spurious} masks that fit no object (IoU < 0.5 with all).",
        f"Median time: {network:.0f} ms with the network and all masks, {prompt:.0f} ms for another prompt on the same image.",
        "",
        "The demo model knows drawn shapes only; these numbers say that loader, decoding and prompts are right, not how FastSAM-s",
        "or FastSAM-x do on photos.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
