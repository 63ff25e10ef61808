#!/usr/bin/env python3
"""Everything that waits for a GPU, in one command: both embedded models, the whole suite, every benchmark.

    python benchmarks/gpu.py --assets ASSETS --drawings DRAWINGS --unet 60 --transformer 60
    python benchmarks/gpu.py --assets ASSETS --dry-run       every step in its smallest form, on the CPU

ASSETS holds train_photos/, style/, content/ and metrics/. Tables, the tests' summary and steps.md go to
benchmarks/results/<the GPU's name>/, logs and checkpoints to --work. A step that is done is not run again: the same command
goes on after an interruption (trainings from their checkpoints), --again NAME repeats a step. A step that fails or passes
its time limit does not keep the others from running. Trained models are written to --work/models, not over the pack's: look
at them first (tools/train_mini.py report). The papers' tables need --checkpoint, --styleid-data, --injectfusion-model,
--injectfusion-data and --weights; see styleid_table.py. Started with any Python, it makes or finds the environment of
tools/test.py; COMFYUI_PATH selects a ComfyUI.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from host import environment  # noqa: E402
from host.files import atomic_write  # noqa: E402

PATIENCE = 20  # seconds from asking a step to end until it is killed
SMALL_PHOTOS = 68  # 64 are kept for validation
OUTCOMES = ("done", "failed", "skipped")
TRANSFORMER = ROOT / "nodes" / "assets" / "mini_transformer.safetensors"


@dataclass(frozen=True)
class Step:
    """One command: `full` on the GPU, `small` in a dry run (None: not run there, for the reason in `why`)."""

    name: str
    full: list[str]
    small: list[str] | None
    minutes: float  # time limit of the full form; a small one has 10
    missing: str = ""  # why it cannot run at all
    variables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    name: str
    result: str  # of OUTCOMES
    seconds: float
    note: str


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if not options.dry_run and not hardware():
        print("error: PyTorch sees no GPU here. --dry-run tries every step on the CPU.", file=sys.stderr)
        return 2
    name = "dry run on the CPU" if options.dry_run else hardware()
    results = options.work / "results" if options.dry_run else ROOT / "benchmarks" / "results" / slug(name)
    results.mkdir(parents=True, exist_ok=True)
    steps = plan(options, results)
    unknown = {*options.only, *options.again} - {step.name for step in steps}
    if unknown:
        print(f"error: no step {', '.join(sorted(unknown))}; there are {', '.join(step.name for step in steps)}.", file=sys.stderr)
        return 2
    chosen = [step for step in steps if not options.only or step.name in options.only]
    outcomes = list(run_all(chosen, options))
    summarise_tests(options.work / "logs" / "tests.log", results / "tests.md", name)
    text = table(outcomes, name)
    (results / "steps.md").write_text(text)
    print(text)
    return int(any(outcome.result == "failed" for outcome in outcomes))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="\n\n".join(__doc__.split("\n\n")[1:]),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--drawings", type=Path, help="PNG drawings for the trainings")
    parser.add_argument("--work", type=Path, help="logs, checkpoints, what is done (default: output/gpu, or output/gpu-dry-run)")
    parser.add_argument("--unet", type=float, default=60, metavar="MINUTES", help="training of the U-Net")
    parser.add_argument("--transformer", type=float, default=60, metavar="MINUTES", help="training of the transformer")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP")
    parser.add_argument("--again", nargs="+", default=[], metavar="STEP", help="run although done")
    parser.add_argument("--checkpoint", help="of StyleID's table: an SD checkpoint")
    parser.add_argument("--styleid-data", type=Path)
    parser.add_argument("--injectfusion-model", type=Path)
    parser.add_argument("--injectfusion-data", type=Path)
    parser.add_argument("--weights", type=Path, help="networks of the papers' measures")
    options = parser.parse_args(arguments)
    options.work = (options.work or ROOT / "output" / ("gpu-dry-run" if options.dry_run else "gpu")).resolve()
    options.assets = options.assets.resolve()
    return options


def plan(options: argparse.Namespace, results: Path) -> list[Step]:
    """Every step, in the order of what is needed first."""
    python, work, small = sys.executable, options.work, options.work / "small"
    device = "cpu" if options.dry_run else "cuda"
    run_here = {"BENCHMARK_DEVICE": device}

    train = [python, "tools/train_mini.py", "--work", str(work / "training"), "--assets"]
    all_data = [*train, str(options.assets), "--drawings", str(options.drawings)]
    some_data = [*train, str(small), "--drawings", str(small / "style")]
    no_drawings = "" if options.drawings or options.dry_run else "--drawings: a folder of PNG drawings, to train on"

    def training(stage: str, minutes: float) -> Step:
        workers = str(max(1, (os.cpu_count() or 2) - 2))
        full = [*all_data, stage, "--minutes", str(minutes), "--device", "cuda", "--processes", "1", "--batch", "256", "--workers", workers]
        less = [*some_data, stage, "--minutes", "0.02", "--processes", "1", "--batch", "2"]
        return Step(f"train-{stage}", full, less, minutes * 1.2 + 20, no_drawings)

    def benchmark(
        name: str, script: str, full: list[str], less: list[str] | None, minutes: float, sheet: bool = False, missing: str = ""
    ) -> Step:
        outputs = ["--table", str(results / f"{name}.md"), *(["--sheet", str(results / f"{name}.jpg")] if sheet else [])]
        command = [python, f"benchmarks/{script}.py"]
        small_command = None if less is None else [*command, *less, *outputs]
        return Step(name, [*command, *full, *outputs], small_command, minutes, missing, run_here)

    def paper(name: str, script: str, given: dict[str, object], less: list[str]) -> Step:
        missing = [option for option, value in given.items() if value is None]
        words = [word for option, value in given.items() for word in (f"--{option.split('-')[-1]}", str(value))]
        rest = ["--work", str(work / name), "--table", str(results / f"{name}.md"), "--device", device]
        why = f"{', '.join(missing)}: not given" if missing and not options.dry_run else ""
        command = [python, f"benchmarks/{script}.py"]
        return Step(name, [*command, *words, *rest], [*command, *less, *rest], 24 * 60, why)

    assets = str(options.assets)
    random = ["--data", str(small / "table"), "--weights", "random", "--pairs", "4", "--steps", "4"]
    tiny = [assets, "--size", "64", "--steps", "2", "--pairs", "1"]
    tests = [python, "-m", "pytest", "-c", "tests/pytest.ini", "-q", "-p", "no:cacheprovider"]
    untrained = "" if TRANSFORMER.exists() else "nodes/assets has no mini_transformer.safetensors: copy the trained one there"
    steps = [
        Step("paint-strokes", [*all_data, "strokes", "--count", "300"], [*some_data, "strokes", "--count", "2"], 40, no_drawings),
        training("unet", options.unet),
        training("transformer", options.transformer),
        Step("export", *2 * ([python, "tools/train_mini.py", "--work", str(work / "training"), "--output",
                              str(work / "models" / "mini.safetensors"), "export"],), 10),
        Step("tests", [*tests, "tests"], [*tests, "tests/algorithms/test_slerp.py", "tests/host/test_simulated_cuda.py"], 120,
             variables={"PASTICHE_TEST_DEVICE": device}),
        Step("formats", *2 * ([python, "tools/verify_models.py", "--device", device, "--size", "16", "--fastsam",
                               "assets/fastsam_mini.safetensors", "--unconditional", "tests/assets/ddpm_blobs"],), 10),
        benchmark("styleid_quality", "styleid_quality", [assets], tiny, 60, sheet=True),
        benchmark("style_reference", "style_reference", [assets, "--architecture", "unet"], [*tiny, "--architecture", "unet"], 60,
                  sheet=True),
        benchmark("style_reference_transformer", "style_reference", [assets], tiny, 60, sheet=True, missing=untrained),
        benchmark("gamma_schedule", "gamma_schedule", [assets], tiny, 60),
        benchmark("injectfusion", "injectfusion", [assets],
                  [assets, "--size", "64", "--steps", "4", "--pairs", "1", "--gammas", "0.4", "0.8", "--omegas", "0.3"], 60, sheet=True),
        benchmark("diffstyler_quality", "diffstyler_quality", [assets],
                  [assets, "--size", "64", "--steps", "2", "--train", "2", "--styles", "1"], 60, sheet=True),
        benchmark("inversion", "inversion", [assets], [assets, "--size", "64", "--photos", "1"], 60),
        benchmark("inversion_transformer", "inversion", [assets, "--architecture", "transformer"],
                  [assets, "--architecture", "transformer", "--size", "64", "--photos", "1"], 60, missing=untrained),
        benchmark("evaluations", "evaluations", [assets], [*tiny, "--rounds", "1", "--quick"], 60),
        benchmark("overhead", "overhead", ["--size", "512"], None, 60),
        benchmark("reference_cost", "reference_cost", [], ["--side", "8", "--hidden", "128", "--repeats", "1"], 60),
        benchmark("memory_modes", "memory_modes", ["--size", "512"], ["--size", "64", "--steps", "2", "--rounds", "1"], 60),
        benchmark("fastsam_scenes", "fastsam_scenes", [], ["--scenes", "2"], 60),
        benchmark("multistyle_mini", "multistyle", ["--mini", "--latent", "32", "64"],
                  ["--mini", "--latent", "8", "--steps", "2", "--rounds", "1"], 60),
        benchmark("multistyle", "multistyle", ["--full", str(work), "--latent", "64", "128"],
                  ["--width", "32", "--latent", "8", "--steps", "2", "--rounds", "1"], 60),
        benchmark("lora_training", "lora_training", ["--work", str(work), "--latent", "64", "--steps", "20"],
                  ["--work", str(work), "--width", "32", "--latent", "8", "--steps", "2", "--rounds", "1", "--only", "Train Style"], 120),
        paper("styleid_table", "styleid_table",
              {"--checkpoint": options.checkpoint, "--styleid-data": options.styleid_data, "--weights": options.weights},
              ["--checkpoint", "mini", "--size", "64", *random]),
        paper("injectfusion_table", "injectfusion_table",
              {"--injectfusion-model": options.injectfusion_model, "--injectfusion-data": options.injectfusion_data, "--weights": options.weights},
              ["--model", "tests/assets/ddpm_blobs", "--size", "32", *random]),
    ]
    listed = {Path(word).name for step in steps for word in step.full if word.endswith(".py")}
    for path in sorted((ROOT / "benchmarks").glob("*.py")):  # those that nobody listed above
        text = path.read_text(encoding="utf-8")
        if path.name not in listed and re.search(r"^    add_outputs\(parser", text, re.M):
            steps.append(benchmark(path.stem, path.stem, [assets] if 'add_argument("assets"' in text else [], None, 60))
    return steps


def run_all(steps: Iterable[Step], options: argparse.Namespace) -> Iterable[Outcome]:
    """Runs what is not done. What was done is kept in --work/steps.json with its command."""
    notes = options.work / "steps.json"
    notes.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(notes.read_text()) if notes.exists() else {}
    if options.dry_run:
        make_small(options.assets, options.work / "small")
    for step in steps:
        command = step.small if options.dry_run else step.full
        if step.missing or command is None:
            yield Outcome(step.name, "skipped", 0, step.missing or "no small form: too large for a CPU")
            continue
        earlier = known.get(step.name)
        if earlier and earlier["command"] == command and step.name not in options.again:
            yield Outcome(step.name, "done", earlier["seconds"], "earlier")
            continue
        print(f"{time.strftime('%H:%M:%S')} {step.name}: {' '.join(command)}", flush=True)
        outcome = run(step, command, options.work / "logs" / f"{step.name}.log", 10 if options.dry_run else step.minutes)
        print(f"{step.name}: {outcome.result} after {outcome.seconds:.0f} s {outcome.note}", flush=True)
        if outcome.result == "done":
            known[step.name] = {"command": command, "seconds": outcome.seconds}
            with atomic_write(notes) as partial:
                partial.write_text(json.dumps(known, indent=1))
        yield outcome


def run(step: Step, command: list[str], log: Path, minutes: float) -> Outcome:
    """Runs a step in a process group of its own, its output in `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with open(log, "wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **step.variables}, stdin=subprocess.DEVNULL, stdout=out,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(minutes * 60)
        except subprocess.TimeoutExpired:
            end(process)
            return Outcome(step.name, "failed", time.monotonic() - started, f"time limit of {minutes:g} minutes; see {log.name}")
        except BaseException:  # Ctrl-C: the step is in another group and does not see it
            end(process)
            raise
    seconds = time.monotonic() - started
    if code:
        return Outcome(step.name, "failed", seconds, f"status {code}: {last_line(log)}")
    return Outcome(step.name, "done", seconds, "")


def end(process: subprocess.Popen) -> None:
    """Ends a step and all that it started."""
    for wanted in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, wanted)
            process.wait(PATIENCE)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:160].replace("|", "/") if lines else "no output"


def make_small(assets: Path, folder: Path) -> None:
    """A few of the assets' pictures, so that a training reads them at once, and four for the papers' tables."""
    for name, pattern, count in (("train_photos", "*.jpg", SMALL_PHOTOS), ("style", "*.png", None)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for path in sorted((assets / name).glob(pattern))[:count]:
            if not (folder / name / path.name).exists():
                shutil.copy(path, folder / name)
    samples = ROOT / "assets" / "samples"
    contents, styles = ("content_coffee.jpg", "content_astronaut.jpg"), ("style_impasto.png", "style_woodcut.png")
    for name, pictures in (("cnt", contents), ("sty", styles), ("org", styles)):
        (folder / "table" / name).mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            shutil.copy(samples / picture, folder / "table" / name)


def summarise_tests(log: Path, target: Path, name: str) -> None:
    """pytest's last line and the names of what failed or was skipped, with the hardware's name."""
    if log.is_file():
        lines = [line for line in log.read_text(errors="replace").splitlines()
                 if line.startswith(("FAILED", "ERROR", "SKIPPED")) or re.search(r"\d+ (passed|failed|error)", line)]
        target.write_text(f"# The test suite: {name}\n\n" + "\n".join(f"- {line.strip('= ')[:300]}" for line in lines) + "\n")


def table(outcomes: list[Outcome], name: str) -> str:
    counts = ", ".join(f"{sum(outcome.result == result for outcome in outcomes)} {result}" for result in OUTCOMES)
    lines = [f"# benchmarks/gpu.py: {name}", "", f"{counts}.", "", "| step | | minutes | |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {o.name} | {o.result} | {o.seconds / 60:.1f} | {o.note} |" for o in outcomes)]) + "\n"


def hardware() -> str:
    """The GPU's name, or "" where there is none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def start(arguments: list[str]) -> int:
    """`main` in the Python of the environment that runs ComfyUI and the tests; makes one on first use."""
    parse(arguments)
    host = environment.prepare(tests=True)
    code = environment.run_inside(host, __file__, arguments)
    return main(arguments) if code is None else code


if __name__ == "__main__":
    try:
        sys.exit(start(sys.argv[1:]))
    except environment.SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
