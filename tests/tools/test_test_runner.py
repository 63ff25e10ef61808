"""tools/test.py: what it hands to pytest, how tests spread over processes, and the simulated device that needs a compiler."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from host import environment
from support.simulated_cuda import build

ROOT = environment.ROOT
TESTS = str(ROOT / "tests")
SPREAD = ["-n", "2", "--dist", "loadfile"]


def load_runner():
    spec = importlib.util.spec_from_file_location("tools_test", ROOT / "tools" / "test.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def runner(monkeypatch):
    """tools/test.py on a machine with two cores, where pytest notes how it was called and returns `codes`."""
    module = load_runner()
    host = environment.Host(Path("ComfyUI"), Path(sys.executable), True)
    monkeypatch.setattr(environment, "prepare", lambda tests: host)
    monkeypatch.setattr(environment, "lacks_simulated_device", lambda host: "")
    monkeypatch.setattr(environment, "has_package", lambda host, name: name == "xdist")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {4, 7}, raising=False)
    for name in ("PASTICHE_TEST_DEVICE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    module.runs, module.codes = [], {"cpu": 0, "simulated": 0}

    def run(host, arguments, variables={}):
        module.runs.append((arguments, variables))
        return module.codes[variables.get("PASTICHE_TEST_DEVICE", "cpu")]

    monkeypatch.setattr(module, "run_pytest", run)
    return module


@pytest.mark.parametrize("cpu, simulated, expected", [(0, 0, 0), (1, 0, 1), (0, 1, 1), (0, 5, 5), (1, 3, 1)])
def test_without_arguments_both_devices_have_their_turn_and_either_failure_counts(runner, capsys, cpu, simulated, expected):
    runner.codes.update(cpu=cpu, simulated=simulated)
    assert runner.main([]) == expected
    everything, (device, variables) = runner.runs
    assert everything == ([TESTS, *SPREAD], {"OMP_NUM_THREADS": "1"})
    assert device[:2] == [str(ROOT / "tests" / "host"), str(ROOT / "tests" / "nodes")] and device[-4:] == SPREAD
    assert variables == {"OMP_NUM_THREADS": "1", "PASTICHE_TEST_DEVICE": "simulated"}
    assert "simulated CUDA device:" in capsys.readouterr().out


@pytest.mark.parametrize("code", [2, 3, 4, -9])
def test_what_was_interrupted_or_could_not_start_ends_all(runner, code):
    runner.codes["cpu"] = code
    assert runner.main([]) == code and len(runner.runs) == 1


def test_what_the_device_leaves_out_exists_and_has_a_reason(runner):
    runner.main([])
    ignored = [Path(part.partition("=")[2]) for part in runner.runs[1][0] if part.startswith("--ignore=")]
    assert len(ignored) == len(runner.WITHOUT_DEVICE) and all(path.is_file() for path in ignored)
    assert all(runner.WITHOUT_DEVICE.values())
    # files with tests for memory modes of a device belong on it
    assert not [path.name for path in ignored if "mark.device" in path.read_text()]


def test_threads_that_were_asked_for_stay(runner, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    runner.main([])
    assert [variables["OMP_NUM_THREADS"] for _, variables in runner.runs] == ["3", "3"]


@pytest.mark.parametrize("cores, processes", [(1, []), (3, ["-n", "3", "--dist", "loadfile"]), (64, ["-n", "4", "--dist", "loadfile"])])
def test_a_process_a_core_and_four_at_most(runner, monkeypatch, cores, processes):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    assert runner.main([]) == 0
    assert runner.runs[0][0] == [TESTS, *processes]


def test_an_installation_without_xdist_is_tested_in_one_process(runner, monkeypatch):
    monkeypatch.setattr(environment, "has_package", lambda host, name: False)
    assert runner.main([]) == 0
    assert runner.runs[0][0] == [TESTS] and len(runner.runs) == 2


def test_packages_are_looked_for_in_the_hosts_python():
    host = environment.Host(Path("ComfyUI"), Path(sys.executable), True)
    assert environment.has_package(host, "pytest") and not environment.has_package(host, "no_such_package")


@pytest.mark.parametrize("arguments, expected", [(["-x"], [TESTS, "-x"]), ([__file__, "-x"], [__file__, "-x"])])
def test_with_arguments_pytest_runs_once(runner, arguments, expected):
    assert runner.main(arguments) == 0
    assert runner.runs == [(expected, {})]


def test_a_chosen_device_runs_everything_once(runner, monkeypatch):
    monkeypatch.setenv("PASTICHE_TEST_DEVICE", "cuda")
    assert runner.main([]) == 0
    assert runner.runs == [([TESTS], {})]


@pytest.mark.parametrize("in_ci, expected", [(False, 0), (True, 1)])
def test_a_missing_device_is_said_and_fails_only_under_ci(runner, monkeypatch, capsys, in_ci, expected):
    monkeypatch.setattr(environment, "lacks_simulated_device", lambda host: "it needs g++")
    monkeypatch.setattr(environment, "IN_CI", in_ci)
    assert runner.main([]) == expected
    assert len(runner.runs) == 1 and "simulated CUDA device: not run, it needs g++" in capsys.readouterr().out


def test_files_that_share_a_server_stay_in_one_process(request):
    scheduling = pytest.importorskip("xdist.scheduler").LoadFileScheduling
    conftest = next(plugin for plugin in request.config.pluginmanager.get_plugins() if hasattr(plugin, "pytest_xdist_make_scheduler"))
    found = conftest.pytest_xdist_make_scheduler(types.SimpleNamespace(getvalue=lambda name: ["popen"]), None)
    assert isinstance(found, scheduling)
    tests = ("server/test_a.py::test", "browser/test_b.py::test[x::y]", "tools/test_client.py::test", "host/test_c.py::test[a]")
    assert [found._split_scope(test) for test in tests] == ["server", "browser", "server", "host/test_c.py"]
    assert all((ROOT / "tests" / place).exists() for place in conftest.LIVE)


SUITE = """#!{python}
import os, sys, time
device = os.environ.get("PASTICHE_TEST_DEVICE", "cpu")
try:
    with open(os.path.join({folder!r}, device), "w") as file:  # an interrupt while a file without a name is closed would be ignored
        file.write("running")
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
environment.has_package = lambda host, name: False
sys.exit(runner.main([]))
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_is_pytests_and_nothing_comes_after_it(tmp_path):
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
        wait_for(lambda: (tmp_path / "cpu").exists() and (tmp_path / "cpu").read_text())
        os.killpg(running.pid, signal.SIGINT)
        said, _ = running.communicate(timeout=120)
    finally:
        if running.returncode is None:
            os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 2
    assert "cpu was interrupted" in said and not (tmp_path / "simulated").exists()


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
