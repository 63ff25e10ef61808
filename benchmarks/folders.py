"""tools/restyle.py on 20 contents and 3 styles with two ComfyUIs, one of which is killed on the way: on its own, and on Ray.

    python benchmarks/folders.py [--contents 20] [--styles 3] [--size 96] [--steps 4] [--table FILE]

Counts what is in the output folder, in the journal and in the servers' own output folders. The pictures are crops of the
samples. COMFYUI_PATH as for tools/demo.py; the second half needs Ray.
"""

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import setup_host  # before torch and comfy
from PIL import Image
from report import add_outputs, publish

import restyle
from host import environment
from host.comfy import Server, make_base


def make_pictures(folder: Path, contents: int, styles: int) -> None:
    """`contents` and `styles` different pictures in folders of these names."""
    for kind, count in (("content", contents), ("style", styles)):
        samples = sorted(path for path in (setup_host.ROOT / "assets" / "samples").glob(f"{kind}_*") if path.suffix in (".jpg", ".png"))
        (folder / kind).mkdir()
        for number in range(count):
            with Image.open(samples[number % len(samples)]) as image:
                shift = 8 * (number // len(samples))
                crop = image.convert("RGB").crop((shift, shift, image.width, image.height))
                crop.save(folder / kind / f"{samples[number % len(samples)].stem}_{number // len(samples)}.png")


def journal(out: Path) -> list[dict]:
    text = (out / "restyle.jsonl").read_text() if (out / "restyle.jsonl").is_file() else ""
    return [line for line in map(json.loads, text.splitlines()) if "name" in line]


def kill_on_the_way(out: Path, after: int, kill) -> threading.Thread:
    """Calls `kill` with the journal once it has `after` pictures."""

    def act():
        while len(journal(out)) < after:
            time.sleep(0.05)
        kill(journal(out))

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def row(name: str, out: Path, code: int, seconds: float, finished: int | None) -> str:
    made = journal(out)
    pairs = Counter((line["content"], line["style"]) for line in made)
    inverted = {
        title: Counter((line["server"], line[side]) for line in made if title in line["ran"])
        for title, side in (("Invert content", "content"), ("Invert style", "style"))
    }
    by_server = ", ".join(map(str, Counter(line["server"] for line in made).values()))
    counts = " | ".join(f"{sum(found.values())} ({max(found.values())})" for found in inverted.values())
    return (f"| {name} | {len(list(out.glob('*.png')))} | {sum(count > 1 for count in pairs.values())} | {by_server} | "
            f"{'' if finished is None else finished} | {counts} | {code} | {seconds:.0f} |")


def two_servers(host: environment.Host, folder: Path, arguments: list[str], after: int) -> str:
    out = folder / "servers"
    bases = [make_base(folder / f"base{number}") for number in (1, 2)]
    with Server(host, bases[0]) as first, Server(host, bases[1]) as doomed:
        killing = kill_on_the_way(out, after, lambda made: os.killpg(doomed.pid, signal.SIGKILL))
        started = time.monotonic()
        code = restyle.main([*arguments, "--output", str(out), "--servers", f"{first.url},{doomed.url}", "--patience", "5"])
        seconds = time.monotonic() - started
        killing.join(1)
        assert not killing.is_alive(), "nothing was killed"
    finished = sum(len(list((base / "output").rglob("*.png"))) for base in bases)
    return row("two servers, one killed", out, code, seconds, finished)


def two_workers(folder: Path, arguments: list[str], after: int) -> str:
    out = folder / "ray"
    kill = lambda made: os.kill(int(re.search(r"process (\d+)", made[0]["server"])[1]), signal.SIGKILL)  # noqa: E731
    killing = kill_on_the_way(out, after, kill)
    started = time.monotonic()
    code = restyle.main([*arguments, "--output", str(out), "--ray", "local", "--workers", "2"])
    seconds = time.monotonic() - started
    killing.join(1)
    assert not killing.is_alive(), "nothing was killed"
    return row("Ray, two workers that start a ComfyUI each, one killed", out, code, seconds, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contents", type=int, default=20)
    parser.add_argument("--styles", type=int, default=3)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", choices=["servers", "ray"])
    add_outputs(parser)
    options = parser.parse_args()
    os.environ.setdefault("COMFYUI_PYTHON", sys.executable)
    host = environment.prepare()
    pictures = options.contents * options.styles
    with tempfile.TemporaryDirectory(prefix="pastiche-folders-") as name:
        folder = Path(name)
        make_pictures(folder, options.contents, options.styles)
        arguments = [str(folder / "content"), str(folder / "style"), "--set", f"Schedule.steps={options.steps}"]
        arguments += [word for side in ("Content", "Style") for word in ("--set", f"{side} size.largest_size={options.size}")]
        rows = [] if options.only == "ray" else [two_servers(host, folder, arguments, pictures // 4)]
        rows += [] if options.only == "servers" else [two_workers(folder, arguments, pictures // 4)]
    publish([
        f"# {options.contents} contents x {options.styles} styles with two ComfyUIs, one killed", "",
        f"`tools/restyle.py`, styleid_mini at {options.size} px and {options.steps} steps; killed (SIGKILL) after {pictures // 4} pictures. "
        f"{setup_host.hardware()}; both ComfyUIs share it. Inversions are counted from the server's own messages about nodes that ran, "
        "in brackets the most for one picture on one server. Where a count is by server or worker, one that Ray started anew is another.", "",
        "| run | files | pairs made twice | pictures by server | saved by the servers | content inversions | style inversions | exit status | seconds |",
        "|---|---|---|---|---|---|---|---|---|", *rows,
    ], options.table)


if __name__ == "__main__":
    main()
