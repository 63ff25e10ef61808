"""tools/test.py: what it hands to pytest, and the simulated device that needs a compiler."""

import importlib.util
import sys
from pathlib import Path

import pytest
from host import environment
from support.simulated_cuda import build

ROOT = environment.ROOT


@pytest.fixture
def runner(monkeypatch):
    spec = importlib.util.spec_from_file_location("tools_test", ROOT / "tools" / "test.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    host = environment.Host(Path("ComfyUI"), Path(sys.executable), True)
    monkeypatch.setattr(environment, "prepare", lambda tests: host)
    monkeypatch.setattr(environment, "lacks_simulated_device", lambda host: "")
    monkeypatch.delenv("PASTICHE_TEST_DEVICE", raising=False)
    module.runs, module.codes = [], [0, 0]

    def run(host, arguments, variables={}):
        module.runs.append((arguments, variables))
        return module.codes[len(module.runs) - 1]

    monkeypatch.setattr(module, "run_pytest", run)
    return module


@pytest.mark.parametrize("codes, expected", [([0, 0], 0), ([1, 0], 1), ([0, 1], 1), ([2, 1], 2)])
def test_without_arguments_both_devices_run_and_either_failure_counts(runner, codes, expected):
    runner.codes[:] = codes
    assert runner.main([]) == expected
    chosen = [str(path) for path in runner.ON_DEVICE]
    assert runner.runs == [([str(ROOT / "tests")], {}), (chosen, {"PASTICHE_TEST_DEVICE": "simulated"})]
    assert chosen and all(Path(path).is_file() for path in chosen)


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
