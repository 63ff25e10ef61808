"""Compiles device.cpp with g++ and the headers that PyTorch's wheel carries; does not import torch."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
CACHE = FOLDER.parents[2] / ".environment" / "simulated_cuda"


class BuildError(Exception):
    """Why there is no device, in a sentence."""


def build(cache: Path = CACHE) -> Path:
    """Path of the library: made once for each state of the sources and version of PyTorch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("the simulated CUDA device needs torch")
    torch = Path(spec.origin).parent
    sources = sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")])
    key = hashlib.sha256(b"".join(path.read_bytes() for path in [*sources, torch / "version.py"]) + str(torch).encode())
    library = cache / f"device_{key.hexdigest()[:16]}.so"
    if library.is_file():
        return library
    if not sys.platform.startswith("linux"):
        raise BuildError(f"the simulated CUDA device is for Linux, this is {sys.platform}")
    compiler = shutil.which("g++")
    if compiler is None:
        raise BuildError("the simulated CUDA device needs g++ (tools/test.py installs it with apt-get as root)")
    cache.mkdir(parents=True, exist_ok=True)
    partial = library.with_suffix(f".{os.getpid()}.partial")
    include = torch / "include"
    command = [
        compiler, "-O1", "-g0", "-shared", "-fPIC", "-std=c++20", f"-I{include}", f"-I{include}/torch/csrc/api/include",
        str(FOLDER / "device.cpp"), "-o", str(partial), f"-L{torch}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch}/lib",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BuildError("g++ could not compile the simulated CUDA device:\n" + done.stderr[-3000:])
        partial.replace(library)
    finally:
        partial.unlink(missing_ok=True)
    return library


def load(library: Path) -> None:
    """PyTorch asks once, while it is imported, who knows CUDA: the library has to be there before."""
    if "torch" in sys.modules:
        raise ImportError("the simulated CUDA device has to be made before torch is imported")
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
