"""Puts ComfyUI and the pack where tests can import them.

ComfyUI is the folder named by COMFYUI_PATH, else the one tools/test.py makes in .environment/.
The pack is imported as `pastiche`: a bare module whose __path__ is the repository, so that its
`nodes/` never meets ComfyUI's own `nodes` module. Test files need names unique in the whole suite.
Without ComfyUI only tests/algorithms runs; under CI a missing ComfyUI is an error.

PASTICHE_TEST_DEVICE=cuda runs the ComfyUI tests on the GPU (default: CPU, as in CI).
"""

import atexit
import os
import shutil
import sys
import tempfile
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NEEDS_COMFYUI = ("host", "nodes", "server", "browser")


def _find_comfyui() -> Path | None:
    named = os.environ.get("COMFYUI_PATH")
    path = Path(named).expanduser().resolve() if named else ROOT / ".environment" / "ComfyUI"
    if (path / "comfy" / "sd.py").is_file():
        return path
    if named:
        raise pytest.UsageError(f"COMFYUI_PATH is {named}, which is no ComfyUI folder (it has no comfy/sd.py)")
    return None


def _register_pack() -> None:
    package = types.ModuleType("pastiche")
    package.__path__ = [str(ROOT)]
    sys.modules["pastiche"] = package


def _prepare_comfyui(path: Path) -> None:
    # torchvision's import hook; it does nothing where torchvision works
    sys.path.append(str(ROOT / "tools" / "host" / "torchvision_fix"))
    import torchvision_fix

    torchvision_fix.install()

    sys.path.append(str(path))
    # comfy reads its options when first imported, so they are set before anything else of it is
    from comfy.cli_args import args

    args.cpu = os.environ.get("PASTICHE_TEST_DEVICE", "cpu") == "cpu"
    args.use_pytorch_cross_attention = True
    base = tempfile.mkdtemp(prefix="pastiche-base-")
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    for name in ("custom_nodes", "input", "models", "output", "temp", "user"):
        os.makedirs(os.path.join(base, name))
    args.base_directory = base


COMFYUI = _find_comfyui()
_register_pack()
sys.path.append(str(ROOT / "tools"))  # `host`: environment, server, browser
pytest_plugins = ["support.live"]
if COMFYUI is not None:
    _prepare_comfyui(COMFYUI)
    collect_ignore = []
elif os.environ.get("CI"):
    raise pytest.UsageError("no ComfyUI: set COMFYUI_PATH or run tools/test.py")
else:
    collect_ignore = list(NEEDS_COMFYUI)


def pytest_configure(config):
    import torch

    # Tiny tensors gain nothing from many threads, and lose much.
    torch.set_num_threads(min(torch.get_num_threads(), 4))


def pytest_report_header(config):
    import torch

    lines = [f"torch {torch.__version__}, {torch.get_num_threads()} threads"]
    if COMFYUI is None:
        lines.append("ComfyUI: not found, so only tests that do not need it (set COMFYUI_PATH or use tools/test.py)")
    else:
        from comfyui_version import __version__

        lines.append(f"ComfyUI {__version__}: {COMFYUI}")
    return lines


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The ComfyUI folder under test."""
    if COMFYUI is None:
        pytest.skip("needs ComfyUI: set COMFYUI_PATH or run tools/test.py")
    return COMFYUI


@pytest.fixture
def generator():
    """A CPU torch.Generator with a fixed seed."""
    import torch

    return torch.Generator().manual_seed(0)
