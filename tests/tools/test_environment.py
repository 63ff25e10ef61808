"""Finding a host, and the step by step making of one: stamps, resuming, locking."""

import subprocess
import sys
import threading
import time

import pytest
from host import environment, pins
from host.environment import SetupError


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "HOME", tmp_path)
    monkeypatch.setattr(environment, "LOG", tmp_path / "setup.log")
    return tmp_path


def test_a_step_runs_once_per_key_and_again_after_failing(home, capsys):
    calls = []

    def make():
        calls.append(1)
        if len(calls) == 1:
            raise SetupError("network gone")

    with pytest.raises(SetupError):
        environment._step("thing", "thing", ["1.0"], make)
    assert environment._step("thing", "thing", ["1.0"], make) is True
    assert environment._step("thing", "thing", ["1.0"], make) is False
    assert environment._step("thing", "thing", ["2.0"], make) is True, "another pin makes it anew"
    assert len(calls) == 3 and "done in" in capsys.readouterr().out


def test_changing_the_torch_pin_changes_every_key_but_comfyuis_source(monkeypatch):
    def keys():
        return {arguments[1]: repr(arguments[2]) for _, arguments in environment._steps(tests=True) if arguments[1] != "chromium"}

    before = keys()
    monkeypatch.setattr(pins, "TORCH", "torch==9.9")
    after = keys()
    assert {name for name in before if before[name] == after[name]} == {"comfyui"}


def test_making_the_venv_anew_keeps_comfyui_and_forgets_the_rest(home, monkeypatch):
    for name in ("venv", "torch", "comfyui", "tests"):
        (home / "stamps").mkdir(exist_ok=True)
        (home / "stamps" / name).write_text("x")
    (home / "venv").mkdir()
    monkeypatch.setattr(environment, "_run", lambda *_: None)
    environment._make_venv()
    assert [path.name for path in (home / "stamps").iterdir()] == ["comfyui"] and not (home / "venv").exists()


def test_our_own_host_keeps_compiled_files_and_another_is_left_as_it_is(home, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    ours, other = (environment.Host(home, home / "python", own).variables() for own in (True, False))
    assert "PYTHONDONTWRITEBYTECODE" not in ours and ours["PYTHONPYCACHEPREFIX"] == str(home / "pycache")
    assert other["PYTHONDONTWRITEBYTECODE"] == "1" and "PYTHONPYCACHEPREFIX" not in other


def test_a_failing_command_shows_the_end_of_its_output(home):
    code = "print('start'); print('\\n'.join(map(str, range(100)))); print('no space left'); raise SystemExit(3)"
    with pytest.raises(SetupError, match=r"(?s)fetching failed \(exit status 3\).*no space left") as caught:
        environment._run([sys.executable, "-c", code], "fetching")
    assert "start" not in str(caught.value) and "start" in environment.LOG.read_text()


def test_two_set_ups_take_turns(home, capsys):
    order = []

    def second():
        with environment._lock(home / "lock"):
            order.append("second")

    with environment._lock(home / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"] and "waiting" in capsys.readouterr().out


def comfyui_folder(path):
    (path / "comfy").mkdir(parents=True)
    (path / "main.py").touch()
    return path


def test_comfyui_path_that_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(SetupError, match="no ComfyUI folder"):
        environment.prepare()


@pytest.mark.parametrize("place", ["venv", ".venv", "../venv"])
@pytest.mark.skipif(environment.WINDOWS, reason="makes links")
def test_an_installations_own_python_is_found(tmp_path, monkeypatch, place):
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    comfyui = comfyui_folder(tmp_path / "ComfyUI")
    python = comfyui / place / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    assert environment._python_of(comfyui).resolve() == python.resolve()
    assert environment._python_of(comfyui).parent.samefile(python.parent)
    monkeypatch.setenv("COMFYUI_PYTHON", "/somewhere/python")
    assert str(environment._python_of(comfyui)) == "/somewhere/python"


@pytest.mark.skipif(environment.WINDOWS, reason="POSIX virtual environment")
def test_missing_packages_are_named_and_nothing_is_installed(tmp_path, monkeypatch):
    comfyui = comfyui_folder(tmp_path / "ComfyUI")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(comfyui / "venv")], check=True)
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    with pytest.raises(SetupError, match="lacks: torch aiohttp pillow safetensors pytest diffusers.*Nothing was changed"):
        environment.prepare(tests=True)
    monkeypatch.setenv("COMFYUI_PYTHON", str(tmp_path / "no-python"))
    with pytest.raises(SetupError, match="COMFYUI_PYTHON"):
        environment.prepare()
