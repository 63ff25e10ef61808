"""tools/test.py: what it hands to pytest, and the simulated device that needs a compiler."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from host import environment
from support.simulated_cuda import build

ROOT = environment.ROOT
BESIDE = {"OMP_NUM_THREADS": "1", "PASTICHE_TEST_DEVICE": "simulated"}


def load_runner():
    spec = importlib.util.spec_from_file_location("tools_test", ROOT / "tools" / "test.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Suite:
    """A pytest process: its exit status, and whether it was waited for."""

    def __init__(self, code):
        self.code, self.done = code, False

    def wait(self):
        self.done = True
        return self.code

    def kill(self):
        assert self.done, "killed while it ran"


@pytest.fixture
def runner(monkeypatch):
    module = load_runner()
    host = environment.Host(Path("ComfyUI"), Path(sys.executable), True)
    monkeypatch.setattr(environment, "prepare", lambda tests: host)
    monkeypatch.setattr(environment, "lacks_simulated_device", lambda host: "")
    for name in ("PASTICHE_TEST_DEVICE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    module.runs, module.codes, module.suites = [], {"cpu": 0, "simulated": 0}, []

    def start(host, arguments, variables={}, output=None):
        module.runs.append((arguments, variables))
        device = variables.get("PASTICHE_TEST_DEVICE", "cpu")
        if output is not None:
            output.write(f"what {device} said".encode())
        module.suites.append(Suite(module.codes[device]))
        return module.suites[-1]

    monkeypatch.setattr(module, "start_pytest", start)
    return module


@pytest.mark.parametrize("cpu, simulated, expected", [(0, 0, 0), (1, 0, 1), (0, 1, 1), (2, 1, 2)])
def test_without_arguments_both_devices_run_side_by_side_and_either_failure_counts(runner, capsys, cpu, simulated, expected):
    runner.codes.update(cpu=cpu, simulated=simulated)
    assert runner.main([]) == expected
    (beside, variables), everything = runner.runs
    assert everything == ([str(ROOT / "tests")], {"OMP_NUM_THREADS": "1"}) and variables == BESIDE
    assert beside[:2] == [str(ROOT / "tests" / "host"), str(ROOT / "tests" / "nodes")]
    assert "simulated CUDA device:\nwhat simulated said" in capsys.readouterr().out
    assert all(suite.done for suite in runner.suites)


def test_what_the_device_leaves_out_exists_and_has_a_reason(runner):
    runner.main([])
    ignored = [Path(part.partition("=")[2]) for part in runner.runs[0][0] if part.startswith("--ignore=")]
    assert len(ignored) == len(runner.WITHOUT_DEVICE) and all(path.is_file() for path in ignored)
    assert all(runner.WITHOUT_DEVICE.values())
    # files with tests for memory modes of a device belong on it
    assert not [path.name for path in ignored if "mark.device" in path.read_text()]


def test_threads_that_were_asked_for_stay(runner, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    runner.main([])
    assert [variables["OMP_NUM_THREADS"] for _, variables in runner.runs] == ["3", "3"]


@pytest.mark.parametrize("arguments, expected", [(["-x"], [str(ROOT / "tests"), "-x"]), ([__file__, "-x"], [__file__, "-x"])])
def test_with_arguments_pytest_runs_once(runner, arguments, expected):
    assert runner.main(arguments) == 0
    assert runner.runs == [(expected, {})]


def test_a_chosen_device_runs_everything_once(runner, monkeypatch):
    monkeypatch.setenv("PASTICHE_TEST_DEVICE", "cuda")
    assert runner.main([]) == 0
    assert runner.runs == [([str(ROOT / "tests")], {})]


@pytest.mark.parametrize("in_ci, expected", [(False, 0), (True, 1)])
def test_a_missing_device_is_said_and_fails_only_under_ci(runner, monkeypatch, capsys, in_ci, expected):
    monkeypatch.setattr(environment, "lacks_simulated_device", lambda host: "it needs g++")
    monkeypatch.setattr(environment, "IN_CI", in_ci)
    assert runner.main([]) == expected
    assert len(runner.runs) == 1 and "simulated CUDA device: not run, it needs g++" in capsys.readouterr().out


SUITE = """#!{python}
import os, sys, time
device = os.environ.get("PASTICHE_TEST_DEVICE", "cpu")
try:
    open(os.path.join({folder!r}, device), "w").write("running")
    while True:
        time.sleep(0.01)
except KeyboardInterrupt:
    print(device, "was interrupted")
    sys.exit(2)
"""
MAIN = """
import sys
sys.path.insert(0, {tools!r})
import test as runner
from pathlib import Path
from host import environment
environment.prepare = lambda tests: environment.Host(Path("ComfyUI"), Path({python!r}), True)
environment.lacks_simulated_device = lambda host: ""
sys.exit(runner.main([]))
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_ends_both_and_shows_what_both_said(tmp_path):
    python = tmp_path / "python"
    python.write_text(SUITE.format(python=sys.executable, folder=str(tmp_path)))
    python.chmod(0o755)
    main = MAIN.format(tools=str(ROOT / "tools"), python=str(python))
    variables = {name: value for name, value in os.environ.items() if name != "PASTICHE_TEST_DEVICE"}
    running = subprocess.Popen(
        [sys.executable, "-c", main], stdout=subprocess.PIPE, text=True, env=variables, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        wait_for(lambda: all((tmp_path / name).exists() and (tmp_path / name).read_text() for name in ("cpu", "simulated")))
        os.killpg(running.pid, signal.SIGINT)
        said, _ = running.communicate(timeout=120)
    finally:
        if running.returncode is None:
            os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 2
    assert "cpu was interrupted" in said and said.index("simulated CUDA device:") < said.index("simulated was interrupted")


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the device is for Linux")
def test_a_missing_or_failing_compiler_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="needs g\\+\\+"):
        build.build(tmp_path / "cache")
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho no such header >&2\nexit 1\n")
    compiler.chmod(0o755)
    with pytest.raises(build.BuildError, match="could not compile.*\n.*no such header"):
        build.build(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the device is for Linux")
def test_the_library_is_compiled_once(tmp_path, monkeypatch):
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho made > "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    made = build.build(tmp_path / "cache")
    compiler.unlink()
    assert build.build(tmp_path / "cache") == made and made.read_text() == "made\n"


def test_the_device_comes_before_torch():
    if "torch" not in sys.modules:
        pytest.skip("torch is not imported")
    with pytest.raises(ImportError, match="before torch"):
        build.load(Path("device.so"))
