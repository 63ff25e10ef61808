"""benchmarks/gpu.py: steps run on after failures, are not run twice, and end at their time limit."""

import importlib.util
import os
import sys
import time
from types import SimpleNamespace

import pytest


@pytest.fixture
def gpu(repository, monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_command", repository / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_command", module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def step(gpu, name, code, minutes=1.0, missing=""):
    return gpu.Step(name, [sys.executable, "-c", code], [sys.executable, "-c", code], minutes, missing)


@pytest.fixture
def options(tmp_path):
    return SimpleNamespace(work=tmp_path / "work", dry_run=False, again=[])


def test_failures_do_not_stop_the_others_and_done_steps_stay_done(gpu, options, tmp_path):
    count = tmp_path / "count"
    steps = [step(gpu, "fails", "print('about to'); raise SystemExit('no | good')"),
             step(gpu, "counts", f"open({str(count)!r}, 'a').write('x')"),
             step(gpu, "lacks", "", missing="--drawings: not given")]
    found = [list(gpu.run_all(steps, options)) for _ in range(2)]
    assert [[outcome.result for outcome in outcomes] for outcomes in found] == [["failed", "done", "skipped"]] * 2
    assert found[0][0].note == "status 1: no / good" and found[1][1].note == "earlier" and found[0][2].note == "--drawings: not given"
    assert count.read_text() == "x"
    options.again = ["counts"]
    list(gpu.run_all(steps, options))
    assert count.read_text() == "xx"
    changed = [step(gpu, "counts", f"open({str(count)!r}, 'a').write('y')")]
    options.again = []
    assert [outcome.note for outcome in gpu.run_all(changed, options)] == [""] and count.read_text() == "xxy"
    text = gpu.table(found[0], "some GPU")
    assert "1 done, 1 failed, 1 skipped." in text and "| lacks | skipped | 0.0 | --drawings: not given |" in text


@pytest.mark.skipif(os.name == "nt", reason="process groups")
def test_a_time_limit_ends_a_step_and_its_children(gpu, options, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PATIENCE", 0.2)
    told = tmp_path / "child"
    code = f"import subprocess, sys; p = subprocess.Popen(['sleep', '60']); open({str(told)!r}, 'w').write(str(p.pid)); p.wait()"
    started = time.monotonic()
    (outcome,) = gpu.run_all([step(gpu, "slow", code, minutes=1.5 / 60)], options)
    assert outcome.result == "failed" and "time limit of 0.025 minutes" in outcome.note and time.monotonic() - started < 20
    pid, deadline = int(told.read_text()), time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return  # ended; whoever adopted it has not looked yet
        except FileNotFoundError:
            return
        time.sleep(0.05)
    pytest.fail("the step's child still runs")


def test_every_benchmark_and_both_trainings_are_steps(gpu, repository, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "TRANSFORMER", repository / "README.md")  # there
    options = gpu.parse(["--assets", str(tmp_path), "--work", str(tmp_path)])
    steps = gpu.plan(options, tmp_path)
    names = [step.name for step in steps]
    assert names[:5] == ["paint-strokes", "train-unet", "train-transformer", "export", "tests"] and len(set(names)) == len(names)
    scripts = {word for step in steps for word in step.full if word.endswith(".py")}
    helpers = {"gpu", "setup_host", "metrics", "report", "tables", "published_metrics"}
    assert {f"benchmarks/{path.name}" for path in (repository / "benchmarks").glob("*.py") if path.stem not in helpers} <= scripts
    assert all((repository / script).is_file() for script in scripts)
    tests = steps[4]
    assert tests.variables == {"PASTICHE_TEST_DEVICE": "cuda"} and tests.full[-1] == "tests"
    missing = {step.name: step.missing for step in steps if step.missing}
    assert missing == {"paint-strokes": "--drawings: a folder of PNG drawings, to train on",
                       "train-unet": "--drawings: a folder of PNG drawings, to train on",
                       "train-transformer": "--drawings: a folder of PNG drawings, to train on",
                       "styleid_table": "--checkpoint, --styleid-data, --weights: not given",
                       "injectfusion_table": "--injectfusion-model, --injectfusion-data, --weights: not given"}
    given = gpu.parse(["--assets", "a", "--checkpoint", "c", "--styleid-data", "d", "--weights", "w", "--injectfusion-model", "m",
                       "--injectfusion-data", "i", "--drawings", "p"])
    full = {step.name: " ".join(step.full) for step in gpu.plan(given, tmp_path)}
    assert "--checkpoint c --data d --weights w" in full["styleid_table"]
    assert "--model m --data i --weights w" in full["injectfusion_table"]
    assert not any(step.missing for step in gpu.plan(given, tmp_path))
    monkeypatch.setattr(gpu, "TRANSFORMER", repository / "none")
    assert [step.name for step in gpu.plan(given, tmp_path) if "mini_transformer" in step.missing] == [
        "style_reference_transformer", "inversion_transformer"]


def test_a_benchmark_that_nobody_listed_is_a_step(gpu, tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "new.py").write_text('parser.add_argument("assets", type=Path)\n    add_outputs(parser)\n')
    (tmp_path / "benchmarks" / "helper.py").write_text("def add_outputs(parser): ...\n".replace("(parser)", "(p)"))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    step = gpu.plan(gpu.parse(["--assets", "/a", "--work", str(tmp_path)]), tmp_path)[-1]
    assert step.name == "new" and step.full[1:3] == ["benchmarks/new.py", "/a"] and step.small is None


def test_without_a_gpu_nothing_starts(gpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "hardware", lambda: "")
    assert gpu.main(["--assets", str(tmp_path), "--work", str(tmp_path / "work")]) == 2
    assert "no GPU" in capsys.readouterr().err and not (tmp_path / "work").exists()


def test_tests_are_summed_up(gpu, tmp_path):
    (tmp_path / "tests.log").write_text("..F\nFAILED tests/host/test_a.py::test_b - wrong\n=== 1 failed, 2 passed in 3.0s ===\n")
    gpu.summarise_tests(tmp_path / "tests.log", tmp_path / "tests.md", "NVIDIA X")
    assert (tmp_path / "tests.md").read_text() == (
        "# The test suite: NVIDIA X\n\n- FAILED tests/host/test_a.py::test_b - wrong\n- 1 failed, 2 passed in 3.0s\n")
    assert gpu.slug("NVIDIA H200 NVL (141GB)") == "nvidia-h200-nvl-141gb"
