#!/usr/bin/env python3
"""Runs many mixed prompts on one ComfyUI server, some cancelled and some invalid, and looks whether anything stays behind.

    python tools/soak.py                       40 prompts, some 10 minutes on two cores
    python tools/soak.py --prompts 400 --seed 3 --output soak.md

The shipped mini workflows, made small, run with settings drawn from the seed. Measured after a prompt that is always the
same, while nothing runs and all models are unloaded: the server's memory, open files, threads, and temporary files. That
prompt's pictures must be the same bytes every time. Prints one table (--output: into a file too). Exit status: 0, or 1 where something
grew or changed. Linux only: the numbers come from /proc. Standard library only; COMFYUI_PATH as for tools/demo.py.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from host import environment, graph
from host.comfy import Interrupted, Server, ServerError, make_base
from host.environment import ROOT
from pastiche_client import load

MINI = sorted(path.stem for path in (ROOT / "workflows" / "api").glob("*_mini.json"))
REFERENCE = "styleid_mini"
SMALL = [
    ("BasicScheduler", "steps", 4), ("KSampler", "steps", 4), ("KSamplerAdvanced", "steps", 4),
    ("ImageScaleToMaxDimension", "largest_size", 128), ("ImageScale", "width", 128), ("ImageScale", "height", 128),
    ("PasticheTrainStyleLoRA", "steps", 3),
]
DRAWN = [  # (class, input, how)
    ("PasticheStyleInjection", "gamma", lambda draw: draw.random()), ("PasticheStyleInjection", "temperature", lambda draw: 1 + draw.random()),
    ("PasticheCaptureFeatures", "memory", lambda draw: draw.choice(["ram", "disk", "recompute"])),
    ("PasticheDDIMInversion", "scheme", lambda draw: draw.choice(["predicted", "fixed_point", "next"])),
    ("PasticheHSpaceSlerp", "gamma", lambda draw: draw.random()), ("PasticheTrainStyleLoRA", "seed", lambda draw: draw.randrange(1 << 40)),
    ("PasticheSamplePicture", "picture", lambda draw: draw.choice(["coffee", "dandelion", "impasto", "woodcut"])),
]
MISTAKES = [
    ("PasticheStyleInjection", "layers", "0-999999999"), ("PasticheStyleInjection", "layers", "nowhere"), ("PasticheCaptureFeatures", "streams", "nothing"),
    ("PasticheFastSAMPrompt", "points", "[" * 3000), ("PasticheFastSAMPrompt", "boxes", "[[1e308, 0, 1, 1]]"), ("PasticheTrainStyleLoRA", "checkpoint", "../out"),
    ("PasticheTrainStyleLoRA", "checkpoint", "n" * 300), ("PasticheDDIMInversion", "streams", ","), ("PasticheHSpaceSlerp", "branch", "none of them"),
    ("PasticheStyleEntry", "layers", "9999"), ("PasticheSamplePicture", "picture", "missing"), ("PasticheStyleReference", "weights", "nan"),
]
SPARE_FILES, SPARE_THREADS, SPARE_MEMORY = 4, 2, 0.06  # what may come and go, and a share of the memory


@dataclass(frozen=True)
class Measured:
    prompts: int
    memory: float  # MB, resident
    files: int
    threads: int
    left: int  # temporary files of the pack, and of anyone in the system's folder for them
    minutes: float


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=0, help="prompts between two measurements (default: a fifth of them)")
    parser.add_argument("--output", type=Path, help="file for the table")
    options = parser.parse_args(arguments)
    if sys.platform != "linux":
        print("error: needs Linux, whose /proc has the numbers", file=sys.stderr)
        return 2
    try:
        host = environment.prepare(tests=True)
        with tempfile.TemporaryDirectory(prefix="pastiche-soak-") as folder:
            os.environ["TMPDIR"] = str(Path(folder) / "system")
            Path(os.environ["TMPDIR"]).mkdir()
            # glibc keeps freed memory in heaps of every thread; then the numbers would tell of that, not of what is held
            os.environ.update(MALLOC_ARENA_MAX="1", MALLOC_TRIM_THRESHOLD_="65536", MALLOC_MMAP_THRESHOLD_="65536")
            with Server(host, make_base(Path(folder) / "base")) as server:
                text, good = soak(server, options)
    except (environment.SetupError, ServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    return int(not good)


def soak(server: Server, options: argparse.Namespace) -> tuple[str, bool]:
    draw, ended, started = random.Random(options.seed), Counter(), time.monotonic()
    every = options.every or max(1, options.prompts // 5)
    for name in MINI:  # every module is imported and every thread pool made before anything is counted
        server.run(small(load(name)))
    seen = [pictures(server)]
    table = [measure(server, 0, started)]
    for number in range(1, options.prompts + 1):
        kind = ("runs", "runs", "runs", "cancelled", "invalid")[number % 5]
        name = draw.choice(MINI)
        prompt = small(load(name))
        vary(prompt, draw)
        if kind == "invalid" and not spoil(prompt, draw):
            kind = "runs"
        ended[run(server, prompt, kind)] += 1
        if number % every == 0 or number == options.prompts:
            seen.append(pictures(server))
            table.append(measure(server, number, started))
            print(row(table[-1]), flush=True)
    return report(table, ended, bool(seen[0]) and seen.count(seen[0]) == len(seen), options)


def small(prompt: dict) -> dict:
    for class_type, name, value in SMALL:
        graph.set_input(prompt, class_type, name, value)
    return prompt


def vary(prompt: dict, draw: random.Random) -> None:
    for class_type, name, how in DRAWN:
        for key in graph.find(prompt, class_type):
            if name in prompt[key]["inputs"] and not isinstance(prompt[key]["inputs"][name], list):
                prompt[key]["inputs"][name] = how(draw)


def spoil(prompt: dict, draw: random.Random) -> bool:
    """Makes one of the mistakes that this graph has room for."""
    possible = [(class_type, name, value) for class_type, name, value in MISTAKES if graph.find(prompt, class_type)]
    if not possible:
        return False
    class_type, name, value = draw.choice(possible)
    for key in graph.find(prompt, class_type):
        prompt[key]["inputs"][name] = value
    return True


def run(server: Server, prompt: dict, kind: str) -> str:
    """How a prompt ended: "finished", "cancelled", "refused". Raises ServerError where that is not how it should."""
    asked = []

    def cancel(progress) -> None:
        if kind == "cancelled" and not asked and progress.finished >= 1:
            asked.append(True)
            server.interrupt()

    try:
        server.run(prompt, cancel)
    except Interrupted:
        return "cancelled"
    except ServerError as error:
        server.require_alive()
        if kind != "invalid" or "Traceback" in str(error):
            raise
        return "refused"
    return "finished"


def pictures(server: Server) -> list[str]:
    """Digests of what the reference prompt gives, computed anew."""
    forget(server)
    prompt = small(load(REFERENCE))
    graph.set_input(prompt, "BasicScheduler", "steps", 5)
    return [hashlib.sha256(server.fetch(image)).hexdigest() for image in server.run(prompt).images]


def forget(server: Server) -> None:
    """Models and cached outputs go; returns when the server's memory no longer falls, as it frees them in its own time."""
    server.request("/free", {"unload_models": True, "free_memory": True})
    low, calm = float("inf"), 0
    for _ in range(30):
        time.sleep(1)
        now = resident(server)
        calm = 0 if now < 0.995 * low else calm + 1
        low = min(low, now)
        if calm >= 4:
            return


def resident(server: Server) -> float:
    """MB of main memory that are its own; pages of mapped files come and go with the system."""
    return int(_status(server)["RssAnon"].split()[0]) / 1024


def _status(server: Server) -> dict[str, str]:
    lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def measure(server: Server, prompts: int, started: float) -> Measured:
    forget(server)
    ours = [*server.base.rglob("*.partial"), *(server.base / "temp" / "pastiche").glob("*"), *Path(os.environ["TMPDIR"]).iterdir()]
    return Measured(
        prompts, resident(server), len(os.listdir(f"/proc/{server.pid}/fd")), int(_status(server)["Threads"]), len(ours),
        (time.monotonic() - started) / 60,
    )


def row(measured: Measured) -> str:
    return (f"| {measured.prompts} | {measured.minutes:.1f} | {measured.memory:.0f} | {measured.files} | {measured.threads} | {measured.left} |")


def report(table: list[Measured], ended: Counter, same: bool, options: argparse.Namespace) -> tuple[str, bool]:
    """The table in Markdown, and whether nothing stayed behind. Memory is compared from the second measurement on."""
    begin, end = table[min(1, len(table) - 2)], table[-1]
    verdicts = {
        f"the fixed prompt gave the same bytes all {len(table)} times": same,
        f"open files at most {SPARE_FILES} more": end.files <= table[0].files + SPARE_FILES,
        f"threads at most {SPARE_THREADS} more": end.threads <= table[0].threads + SPARE_THREADS,
        "no temporary file left": end.left <= table[0].left,
        f"memory at most {SPARE_MEMORY:.0%} above prompt {begin.prompts}'s": end.memory <= begin.memory * (1 + SPARE_MEMORY),
    }
    lines = [
        f"# Soak: {options.prompts} prompts on one server, seed {options.seed}", "",
        f"{', '.join(f'{count} {how}' for how, count in sorted(ended.items()))}, drawn from {len(MINI)} mini workflows. "
        "Measured after the fixed prompt and /free. Made by tools/soak.py.", "",
        "| prompts | minutes | memory (MB) | open files | threads | temporary files |", "|---|---|---|---|---|---|",
        *map(row, table), "", *(f"- {what}: {'yes' if good else 'NO'}" for what, good in verdicts.items()), "",
    ]
    return "\n".join(lines), all(verdicts.values())


if __name__ == "__main__":
    sys.exit(main())
