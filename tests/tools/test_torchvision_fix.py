"""The import hook: right where torchvision's library does not load, absent where it does."""

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

FIX = Path(__file__).resolve().parents[2] / "tools" / "host" / "torchvision_fix"
sys.path.append(str(FIX))
import torchvision_fix  # noqa: E402


def slow_nms(boxes, scores, threshold):
    """Suppression as its definition says, one pair at a time."""
    kept = []
    for i in scores.argsort(descending=True).tolist():
        ok = True
        for j in kept:
            (a, b, c, d), (e, f, g, h) = boxes[i].tolist(), boxes[j].tolist()
            inner = max(0, min(c, g) - max(a, e)) * max(0, min(d, h) - max(b, f))
            ok &= inner / ((c - a) * (d - b) + (g - e) * (h - f) - inner) <= threshold
        if ok:
            kept.append(i)
    return kept


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_nms_is_its_definition(threshold):
    generator = torch.Generator().manual_seed(0)
    corner, size = torch.rand(60, 2, generator=generator) * 50, torch.rand(60, 2, generator=generator) * 30 + 1
    boxes, scores = torch.cat([corner, corner + size], 1), torch.rand(60, generator=generator)
    assert torchvision_fix.nms(boxes, scores, threshold).tolist() == slow_nms(boxes, scores, threshold)


def test_nms_of_nothing():
    assert torchvision_fix.nms(torch.zeros(0, 4), torch.zeros(0), 0.5).tolist() == []


def test_working_torchvision_is_left_alone():
    extension = types.SimpleNamespace(_has_ops=lambda: True, _assert_has_ops=lambda: "guard")
    torchvision_fix._fix_torchvision(extension)
    assert extension._assert_has_ops() == "guard" and not hasattr(extension, "_pastiche_library")


def test_torchaudio_library_that_loads_is_used_and_one_that_does_not_is_absent():
    def load(lib):
        if lib == "broken":
            raise OSError("libcudart.so not found")
        return lib == "there"

    utils = types.SimpleNamespace(_load_lib=load)
    torchvision_fix._fix_torchaudio(utils)
    assert [utils._load_lib(lib) for lib in ("there", "missing", "broken")] == [True, False, False]


def test_torchvision_and_torchaudio_import_in_a_new_interpreter():
    pytest.importorskip("torchvision")
    code = (
        "import torchvision_fix as f; f.install(); f.install(); import sys, torch, torchvision, torchaudio\n"
        "assert sum(x is f._Finder for x in sys.meta_path) <= 1\n"
        "boxes = torch.tensor([[0., 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]])\n"
        "print(torchvision.ops.nms(boxes, torch.tensor([.5, .9, .1]), .5).tolist())\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env={**__import__("os").environ, "PYTHONPATH": str(FIX)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "[1, 2]"
