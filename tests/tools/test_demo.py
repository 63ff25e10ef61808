"""The demo's command line: settings, contact sheet, errors in one sentence. The run itself is the slow test."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import demo
import pytest
from host import environment, graph
from PIL import Image

SCRIPT = environment.ROOT / "tools" / "demo.py"


@pytest.fixture
def variables(comfyui):
    return {**os.environ, "COMFYUI_PATH": str(comfyui), "COMFYUI_PYTHON": sys.executable}


def run(variables, *arguments, timeout=60):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], env=variables, capture_output=True, text=True, timeout=timeout)


def test_defaults_are_the_workflows(capsys):
    options = demo.parse([])
    prompt = __import__("json").loads(demo.WORKFLOW.read_text())
    injection = prompt[graph.find(prompt, "PasticheStyleInjection")[0]]["inputs"]
    assert (options.gamma, options.temperature) == (injection["gamma"], injection["temperature"])
    assert options.steps == prompt[graph.find(prompt, "BasicScheduler")[0]]["inputs"]["steps"]
    for wrong in (["--gamma", "1.5"], ["--steps", "0"], ["--size", "huge"], ["--port", "70000"]):
        with pytest.raises(SystemExit):
            demo.parse(wrong)
        assert wrong[0] in capsys.readouterr().err


def test_contact_sheet_shows_all_at_one_height(tmp_path):
    panels = []
    for name, size, colour in (("content", (300, 200), "red"), ("style", (50, 400), "green"), ("result", (320, 240), "blue")):
        Image.new("RGB", size, colour).save(tmp_path / f"{name}.png")
        panels.append((name, tmp_path / f"{name}.png"))
    demo.contact_sheet(panels, tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.height > 240 and sheet.width == 360 + 30 + 320 + 4 * 6
    assert [sheet.getpixel((x, 120)) for x in (180, 385, 600)] == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
    assert not list(tmp_path.glob("*.part"))


def test_results_are_never_overwritten(tmp_path):
    assert demo._unused(tmp_path / "a.png").name == "a.png"
    (tmp_path / "a.png").touch()
    (tmp_path / "a_2.png").touch()
    assert demo._unused(tmp_path / "a.png").name == "a_3.png"


def test_bad_images_are_told_before_the_server_starts(variables, tmp_path):
    (tmp_path / "fake.png").write_text("no image")
    for path, words in ((tmp_path / "none.png", "is not a file"), (tmp_path / "fake.png", "cannot be read as an image")):
        done = run(variables, "--content", path)
        assert done.returncode == 1 and words in done.stderr and str(path) in done.stderr
        assert "Traceback" not in done.stderr and "starting" not in done.stdout


def test_taken_port_is_one_sentence(variables, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        done = run(variables, "--port", other.getsockname()[1], "--output", tmp_path)
    assert done.returncode == 1 and "is taken" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_demo_runs_and_says_where_its_images_are(variables, tmp_path):
    done = run(variables, "--steps", 3, "--size", 128, "--output", tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    shown = [Path(line.split("  ")[-1].strip()) for line in done.stdout.splitlines() if line.startswith(("result", "contact"))]
    assert len(shown) == 2 and all(path.parent == tmp_path.resolve() for path in shown)
    assert max(Image.open(shown[0]).size) == 128
    assert Image.open(shown[1]).width > 3 * 128


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_no_process(variables, tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--output", str(tmp_path)], env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite run in the background has it ignored
    )
    while "starting ComfyUI" not in process.stdout.readline():
        assert process.poll() is None
    children = []
    while not children:
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        time.sleep(0.1)
    process.send_signal(number)
    output = process.communicate(timeout=30)[0]
    assert process.returncode not in (0, None) and "Traceback" not in output
    assert not any(Path(f"/proc/{child}").exists() for child in children)
