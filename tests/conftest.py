"""Puts ComfyUI and the pack where tests can import them.

ComfyUI is the folder named by COMFYUI_PATH, else the one tools/test.py makes in .environment/.
The pack is imported as `pastiche`: a bare module whose __path__ is the repository, so that its
`nodes/` never meets ComfyUI's own `nodes` module. Test files need names unique in the whole suite.
Without ComfyUI only tests/algorithms runs; under CI a missing ComfyUI is an error.

PASTICHE_TEST_DEVICE: cpu (default), simulated (support/simulated_cuda; tests/host and tests/nodes, as in CI) or cuda,
a real GPU. support/devices.py has the memory modes in which tests marked `device` run there.
"""

import atexit
import os
import shutil
import sys
import tempfile
import types
from pathlib import Path

import pytest

from support.devices import MODES, ON_CPU, SIMULATED, TEST_DEVICE, available_modes, memory_mode, own_tensors

ROOT = Path(__file__).resolve().parents[1]
# tests that share a ComfyUI server, and a browser: beginning of the path -> what they are together
LIVE = {"server/": "server", "tools/test_client.py": "server", "tools/test_restyle_live.py": "server", "browser/": "browser"}
NEEDS_COMFYUI = ("host", "nodes", "neighbours", "server", "browser")


def _find_comfyui() -> Path | None:
    named = os.environ.get("COMFYUI_PATH")
    path = Path(named).expanduser().resolve() if named else ROOT / ".environment" / "ComfyUI"
    if (path / "comfy" / "sd.py").is_file():
        return path
    if named:
        raise pytest.UsageError(f"COMFYUI_PATH is {named}, which is no ComfyUI folder (it has no comfy/sd.py)")
    return None


def _make_device() -> None:
    if TEST_DEVICE not in ("cpu", "simulated", "cuda"):
        raise pytest.UsageError(f"PASTICHE_TEST_DEVICE is {TEST_DEVICE}; it can be cpu, simulated or cuda")
    if SIMULATED:
        from support import simulated_cuda
        from support.simulated_cuda.build import BuildError

        try:
            simulated_cuda.install()
        except (BuildError, ImportError) as error:
            raise pytest.UsageError(str(error)) from error


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

    args.cpu = ON_CPU
    args.use_pytorch_cross_attention = True
    args.cache_none = True  # every test computes for itself; test_found_again_cache.py switches on what finds results again
    base = tempfile.mkdtemp(prefix="pastiche-base-")
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    for name in ("custom_nodes", "input", "models", "output", "temp", "user"):
        os.makedirs(os.path.join(base, name))
    args.base_directory = base


_make_device()
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

    # Tiny tensors gain nothing from many threads, and beside another busy process they wait for each other at every operation.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """In several processes a file stays in one, for its fixtures; so do all files of LIVE that share what takes long to start."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            shared = next((scope for start, scope in LIVE.items() if nodeid.startswith(start)), None)
            return shared or super()._split_scope(nodeid)

    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Fixtures that tests share draw the same numbers whichever test makes them."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, whatever ran before it."""
    import torch

    torch.manual_seed(0)


def pytest_generate_tests(metafunc):
    marker = metafunc.definition.get_closest_marker("device")
    if marker is None or ON_CPU:
        return
    unknown = set(marker.args) - set(MODES)
    if unknown:
        raise pytest.UsageError(f"{metafunc.definition.nodeid}: memory modes {sorted(unknown)} are none of {', '.join(MODES)}")
    metafunc.parametrize("memory", [mode for mode in available_modes() if mode in (marker.args or MODES)], indirect=True)


@pytest.fixture(autouse=not ON_CPU)  # a name only added to a test's fixtures while they are generated is dropped again
def memory(request):
    """The memory mode a test marked `device` runs in; its name."""
    name = getattr(request, "param", "default")
    with memory_mode(name):
        yield name


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    """What a test and its fixtures do themselves may mix devices, unless it is marked `strict`."""
    if ON_CPU or COMFYUI is None or item.get_closest_marker("strict"):
        yield
        return
    with own_tensors():
        yield


@pytest.fixture(autouse=SIMULATED)
def no_races():
    """Fails a test in which pinned memory changed before the simulated device had read it."""
    if not SIMULATED:
        yield
        return
    from support.simulated_cuda import device

    device.clear_races()
    yield
    found = device.races()
    assert not found, "asynchronous copies raced: " + "; ".join(sorted(set(found)))


def pytest_report_header(config):
    import torch

    lines = [f"torch {torch.__version__}, {torch.get_num_threads()} threads, device {TEST_DEVICE}"]
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
