"""A real ComfyUI and a real browser, shared by the whole test session.

Fixtures (all session-wide, started when first asked for):
    server   host.comfy.Server with the pack as a custom node, nothing in its input folder and an empty
             file for every model that a shipped workflow names
    page     host.browser.Browser
    ui       host.frontend.Frontend, opened on `server`
    artifacts  folder for screenshots: .environment/artifacts
Without a browser the browser tests are skipped, under CI they fail.
"""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from host import environment, graph
from host.browser import Browser
from host.comfy import Server, make_base
from host.frontend import Frontend

from .devices import TEST_DEVICE

ROOT = environment.ROOT
API_WORKFLOWS = sorted((ROOT / "workflows" / "api").glob("*.json"))
MINI_WORKFLOWS = [path for path in API_WORKFLOWS if path.stem.endswith("_mini")]
# Makes a workflow small enough for a test: (class, input, value), where it is a plain value
SMALL = [
    ("BasicScheduler", "steps", 4), ("KSampler", "steps", 4), ("KSamplerAdvanced", "steps", 4),
    ("ImageScaleToMaxDimension", "largest_size", 128), ("ImageScale", "width", 128), ("ImageScale", "height", 128),
    ("PasticheTrainStyleLoRA", "steps", 3), ("PasticheRestyleFrames", "steps", 2),
    ("ImageCrop", "width", 80), ("ImageCrop", "height", 96),
    ("PasticheStyleLibrary", "size", 128),
]


def small_prompt(path: Path) -> dict:
    """A shipped API workflow with few steps and small images."""
    prompt = json.loads(path.read_text())
    for class_type, name, value in SMALL:
        graph.set_input(prompt, class_type, name, value)
    return prompt


def workflow_by_name(name: str) -> Path:
    """workflows/api/<name>.json; fails the test when it is not there."""
    path = ROOT / "workflows" / "api" / f"{name}.json"
    assert path.is_file(), f"{path} is missing"
    return path


@pytest.fixture(scope="session")
def artifacts() -> Path:
    folder = ROOT / ".environment" / "artifacts"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def live_host(comfyui) -> environment.Host:
    """The ComfyUI under test, run by the Python that runs the tests."""
    return environment.Host(comfyui, Path(sys.executable), ours=False)


@pytest.fixture(scope="session")
def server(live_host, tmp_path_factory, artifacts):
    base = make_base(tmp_path_factory.mktemp("base"))
    for path in API_WORKFLOWS:
        graph.provide_files(json.loads(path.read_text()), base)
    running = Server(live_host, base, cpu=TEST_DEVICE != "cuda")
    with running:
        yield running
        process = os.environ.get("PYTEST_XDIST_WORKER")  # each has a server of its own
        shutil.copy(running.log, artifacts / (f"server_{process}.log" if process else "server.log"))


@pytest.fixture(scope="session")
def page():
    reason = None
    if environment.find_chromium() is None:
        reason = "no Chromium or Chrome found: install one (tools/test.py does with apt-get as root) or set CHROMIUM"
    elif importlib.util.find_spec("playwright") is None:
        reason = "no Playwright: pip install playwright"
    if reason:
        if environment.IN_CI:
            pytest.fail(reason)
        pytest.skip(reason)
    with Browser((1920, 1200)) as browser:
        yield browser


@pytest.fixture(scope="session")
def ui(server, page) -> Frontend:
    frontend = Frontend(page, server)
    frontend.open()
    return frontend
