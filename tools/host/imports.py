"""Makes ComfyUI and the pack importable in this process. Before torch, comfy or pastiche is imported."""

import os
import sys
import types
from pathlib import Path

from .environment import ROOT


def make_importable(cpu: bool) -> None:
    """ComfyUI is the folder named by COMFYUI_PATH, else .environment/ComfyUI; the pack is imported as `pastiche`."""
    comfyui = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".environment" / "ComfyUI")
    if not (comfyui / "comfy" / "sd.py").is_file():
        raise SystemExit("Set COMFYUI_PATH to a ComfyUI folder, or run tools/test.py once.")
    package = types.ModuleType("pastiche")
    package.__path__ = [str(ROOT)]
    sys.modules["pastiche"] = package
    sys.path[:0] = [str(comfyui), str(ROOT / "tools" / "host" / "torchvision_fix")]
    import torchvision_fix

    torchvision_fix.install()
    from comfy.cli_args import args

    args.cpu = cpu
    args.use_pytorch_cross_attention = True
    args.cache_none = True  # what is measured is computing, not finding what was computed before
