"""What the benchmarks share: their pictures, and how tables and picture sheets are written."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import setup_host  # noqa: F401  (before torch)
import torch
from PIL import Image

sys.path.append(str(setup_host.ROOT / "tools"))
from mini_training.data import HELD_OUT_STYLES, square

# Photos that the mini model never saw; HELD_OUT_STYLES are the paintings that it never saw.
CONTENTS = ("skimage_astronaut.png", "skimage_chelsea.png", "skimage_coffee.png", "skimage_rocket.png",
            "seeding_by_Clements_Engelhardt.jpg", "Wine_by_Jakkub_Mede.jpg", "friends_by_Aitzol_Berasategi.jpg",
            "sunset_by_Aitzol_Berasategi.jpg", "picosdeeuropa_by_Aitzol_Berasategi.jpg", "Picture_0B_by_freespace.jpg")
NOTES = "\nNotes\n"


def add_outputs(parser: argparse.ArgumentParser, sheet: bool = False) -> None:
    parser.add_argument("--table", type=Path, help="Markdown file to write; what stands there from a line 'Notes' on is kept")
    if sheet:
        parser.add_argument("--sheet", type=Path, help="picture file to write")


def add_pictures(parser: argparse.ArgumentParser, steps: int, size: int, pairs: int) -> None:
    """What `pictures` is asked for, and the schedule."""
    parser.add_argument("assets", type=Path)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--size", type=int, default=size)
    parser.add_argument("--pairs", type=int, default=pairs)


def pictures(assets: Path, size: int, count: int, styles: tuple[str, ...] = HELD_OUT_STYLES) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` held-out photos and paintings, (B, 3, size, size) in [0, 1]; paintings repeat where there are fewer."""
    photos = [assets / "content" / name for name in CONTENTS[:count]]
    paintings = [assets / "style" / f"{styles[i % len(styles)]}.png" for i in range(count)]
    return tuple(torch.stack([square(path, size) for path in paths]) / 2 + 0.5 for paths in (photos, paintings))


def publish(lines: list[str], table: Path | None) -> None:
    """Prints the lines and writes them to `table`, where notes written by hand stay."""
    text = "\n".join(lines).rstrip() + "\n"
    print(text)
    if table is None:
        return
    _, mark, notes = table.read_text().partition(NOTES) if table.exists() else ("", "", "")
    table.write_text(text + mark + notes)
    if mark:
        print(f"{table}: kept its notes; see that they are still true.")


def save_sheet(rows: list[torch.Tensor], path: Path | None) -> None:
    """Rows of (1, 3, H, W) pictures side by side, each (1, 3, H, n W), to one picture file."""
    if path is not None:
        pixels = (torch.cat(rows, dim=2)[0].movedim(0, -1) * 255).round().to(torch.uint8).numpy()  # CHW -> HWC
        Image.fromarray(pixels).save(path, quality=85)
