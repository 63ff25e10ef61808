"""Small YOLOv8-seg networks and checkpoint files of every kind that Load FastSAM may meet.

They need ultralytics: call `require_ultralytics()` first.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def require_ultralytics() -> None:
    """Skips the calling test module where the optional package is not installed."""
    if importlib.util.find_spec("ultralytics") is None:
        pytest.skip("needs ultralytics: pip install --no-deps ultralytics opencv-python-headless", allow_module_level=True)


def scenes():
    """The module tools/fastsam_scenes.py."""
    if "fastsam_scenes" not in sys.modules:
        spec = importlib.util.spec_from_file_location("fastsam_scenes", ROOT / "tools" / "fastsam_scenes.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["fastsam_scenes"] = module
        spec.loader.exec_module(module)
    return sys.modules["fastsam_scenes"]


def random_network(classes: int = 1, width: float = 0.0625, kind: str = "segment") -> torch.nn.Module:
    """An untrained YOLOv8 as ultralytics makes and pickles it; kind: segment or detect."""
    from pastiche.nodes.host.fastsam.checkpoint import SegmenterWeights
    from pastiche.nodes.host.fastsam.network import _segmentation_model

    SegmentationModel = _segmentation_model()
    from ultralytics.nn.tasks import DetectionModel

    layout = {**SegmenterWeights(0.33, width, 1024, 64, {}).layout(), "nc": classes}
    torch.manual_seed(0)
    if kind == "detect":
        layout["head"] = [*layout["head"][:-1], [[15, 18, 21], 1, "Detect", ["nc"]]]
        return DetectionModel(layout, ch=3, nc=classes, verbose=False)
    return SegmentationModel(layout, ch=3, nc=classes, verbose=False)


def save_checkpoint(path, model: torch.nn.Module, **notes) -> None:
    """A .pt as ultralytics' trainer leaves it: the module itself, in half precision, with notes."""
    model.args = {"imgsz": 64, "task": "segment"}
    content = {
        "epoch": -1,
        "best_fitness": None,
        "model": model.half(),
        "ema": None,
        "updates": None,
        "optimizer": None,
        "train_args": {"imgsz": 64, "task": "segment", "data": "scenes.yaml"},
        "date": "2026-01-01T00:00:00",
        "version": "8.0.120",
        **notes,
    }
    torch.save(content, path)
