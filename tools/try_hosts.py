"""Runs the pack on other ComfyUIs: its import, every node's schema and a small functional set.

    python tools/try_hosts.py FOLDER [FOLDER ...]       each the folder of a ComfyUI, of any version
    python tools/try_hosts.py --results DIR FOLDER      keeps the results in DIR; the page is made of all that lie there

Runs under the Python it is started with, which needs ComfyUI's requirements and pytest (tools/test.py makes such an
environment); comfy-kitchen and comfy-aimdo are installed beside the results in the versions that a ComfyUI pins.
Nothing is written into the folders. Writes docs/hosts.md. Ends with status 1 if anything failed on a supported version.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from host.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / ".environment" / "hosts"
PINNED = re.compile(r"^(comfy-(?:kitchen|aimdo)==\S+)", re.MULTILINE)
MATRIX = "tests/neighbours/test_neighbours_matrix.py"
SETS = {
    "import, schemas": ("tests/nodes/test_schemas.py", "tests/host/test_compatibility.py"),
    "DDIM Inversion": ("tests/host/test_inversion.py::test_stock_sampler_continues_the_inverted_latent",),
    "Capture Features, Style Injection": (f"{MATRIX}::test_ours_and_theirs[pag-style]", f"{MATRIX}::test_ours_and_theirs[lora-style]"),
    "Feature Injection": (f"{MATRIX}::test_ours_and_theirs[nag-features]", f"{MATRIX}::test_ours_and_theirs[prompted-features]"),
    "h-space Slerp": (f"{MATRIX}::test_ours_and_theirs[freeu-h-space]",),
    "InjectFusion Sampler": ("tests/host/test_injectfusion_sampler.py::test_without_injection_it_is_cores_ddim_bit_for_bit",),
    "Multi-Style Guider": ("tests/host/test_multistyle.py::test_equals_a_loop_over_patched_models", f"{MATRIX}::test_multi_style_guider_and_theirs[pag]"),
    "Style Reference": ("tests/host/test_style_reference_run.py::test_on_unets_it_equals_style_injection_with_recompute",),
    "Keep Outside Mask": ("tests/host/test_keep_outside.py::test_outside_is_the_content[euler]",),
    "Latent AdaIN": ("tests/host/test_latent_adain.py",),
    "Train Style LoRA": ("tests/host/test_lora_training.py::test_trains_saves_and_loads_in_core[sd15-eps]",),
    "Load Mini Model": ("tests/nodes/test_mini_node.py",),
    "FastSAM Prompt": ("tests/nodes/test_fastsam_nodes.py::test_everything_finds_the_objects",),
}
HEADER = """# ComfyUI versions

Written by `tools/try_hosts.py`, which runs the pack's import, every node's schema and a small functional set (real sampling on tiny random models, most of it against oracles without our code) on a ComfyUI folder. Only the versions listed were run, on the CPU; the oldest supported is {oldest}, the first with the hook behind the U-Net's middle block (`middle_block_after_patch`) that h-space Slerp stands on. The whole test suite runs on {pinned}.

"""


def version_of(comfyui: Path) -> str:
    """Raises ValueError for a folder that is no ComfyUI with a version."""
    path = comfyui / "comfyui_version.py"
    found = re.search(r'"(.+)"', path.read_text(encoding="utf-8")) if path.is_file() else None
    if found is None:
        raise ValueError(f"{comfyui} is no folder of a ComfyUI that says its version (comfyui_version.py).")
    return found[1]


def own_packages(comfyui: Path, folder: Path) -> Path:
    """Installs what this ComfyUI pins of its own compiled packages; the folder for PYTHONPATH."""
    wanted = PINNED.findall((comfyui / "requirements.txt").read_text(encoding="utf-8"))
    there = {f"{found[1].replace('_', '-')}=={found[2]}" for path in folder.glob("*.dist-info") if (found := re.match(r"(.+)-(.+)\.dist-info", path.name))}
    if missing := [requirement for requirement in wanted if requirement not in there]:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *missing], check=True)
    return folder


def run_on(comfyui: Path, results: Path) -> None:
    """Runs every set on one ComfyUI; leaves <version>.xml in `results`."""
    version = version_of(comfyui)
    packages = own_packages(comfyui, results / "packages" / version)
    # NO_PTEST keeps test runners that hold a ComfyUI imported out of this
    variables = {**os.environ, "COMFYUI_PATH": str(comfyui), "PYTHONPATH": str(packages), "PYTHONDONTWRITEBYTECODE": "1", "NO_PTEST": "1"}
    tests = [test for tests in SETS.values() for test in tests]
    target = results / f"{version}.xml"
    target.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-c", "tests/pytest.ini", "-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1", f"--junitxml={target}"]
    subprocess.run([*command, *tests], cwd=ROOT, env=variables, check=False)


def outcome(results: Path) -> dict[str, str]:
    """Set -> works | fails (how many of how many) | not run, from a junit file."""
    counted = {name: [0, 0] for name in SETS}
    for case in ElementTree.parse(results).iter("testcase"):
        path = "tests/" + case.get("file", "").removeprefix("tests/")
        asked = {path, f"{path}::{case.get('name')}", f"{path}::{case.get('name').split('[')[0]}"}
        for name, tests in SETS.items():
            if asked & set(tests):
                counted[name][0] += all(case.find(kind) is None for kind in ("failure", "error", "skipped"))
                counted[name][1] += 1
    return {name: "not run" if not total else "works" if passed == total else f"fails ({total - passed} of {total})" for name, (passed, total) in counted.items()}


def as_page(rows: dict[str, dict[str, str]], oldest: str, pinned: str) -> str:
    """A table: versions down, sets across."""
    lines = [["ComfyUI", *SETS], ["---"] * (len(SETS) + 1)]
    ordered = sorted(rows, key=lambda version: [int(part) for part in re.findall(r"\d+", version)])
    lines += [[version, *(rows[version][name] for name in SETS)] for version in ordered]
    return HEADER.format(oldest=oldest, pinned=pinned) + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def stated(path: str, name: str) -> str:
    return re.search(rf'{name} = "(.+?)"', (ROOT / path).read_text(encoding="utf-8"))[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="folders of ComfyUIs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results and packages are kept")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    for folder in options.folders:
        try:
            run_on(folder.expanduser().resolve(), options.results.resolve())
        except ValueError as error:
            parser.error(str(error))
    rows = {path.stem: outcome(path) for path in options.results.glob("*.xml")}
    page, target = as_page(rows, stated("nodes/host/version.py", "OLDEST_COMFYUI"), stated("tools/host/pins.py", "COMFYUI")), ROOT / "docs" / "hosts.md"
    with atomic_write(target) as part:
        part.write_text(page, encoding="utf-8")
    print(f"{target}: {', '.join(rows)}")
    oldest = [int(part) for part in stated("nodes/host/version.py", "OLDEST_COMFYUI").split(".")]
    supported = [row for version, row in rows.items() if [int(part) for part in re.findall(r"\d+", version)] >= oldest]
    sys.exit(any(verdict != "works" for row in supported for verdict in row.values()))


if __name__ == "__main__":
    main()
