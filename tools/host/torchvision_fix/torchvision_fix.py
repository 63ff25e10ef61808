"""Let a torchvision and torchaudio whose compiled parts do not fit the installed torch be imported.

A registry may serve CUDA builds of the two beside a CPU build of torch. Their Python code is fine,
their libraries do not load, and `import torchvision` dies with "operator torchvision::nms does not
exist". ComfyUI imports both at start. `install()` puts a finder in front of the import system which,
only when `torchvision.extension` reports that it has no operators, declares the two operators that
torchvision's own fake kernels are registered for, gives `nms` a CPU kernel, and lets torchaudio go
without its library. Where the libraries load nothing is changed.
"""

from __future__ import annotations

import importlib.machinery
import sys


def nms(boxes, scores, iou_threshold):
    """Indices of the boxes (N, 4: x1 y1 x2 y2) kept by greedy suppression, best score first."""
    import torch

    x1, y1, x2, y2 = boxes.unbind(1)
    area = (x2 - x1) * (y2 - y1)
    order = torch.argsort(scores, descending=True, stable=True)
    keep = []
    while order.numel():
        best, rest = order[0], order[1:]
        keep.append(best)
        width = (torch.minimum(x2[best], x2[rest]) - torch.maximum(x1[best], x1[rest])).clamp(min=0)
        height = (torch.minimum(y2[best], y2[rest]) - torch.maximum(y1[best], y1[rest])).clamp(min=0)
        overlap = width * height
        order = rest[overlap <= iou_threshold * (area[best] + area[rest] - overlap)]
    return torch.stack(keep) if keep else order


def _fix_torchvision(extension) -> None:
    if extension._has_ops():
        return
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", nms, "CPU")
    # The guard in front of every operator cannot tell nms from the others; those then fail by name.
    extension._assert_has_ops = lambda: None
    extension._pastiche_library = library  # the registration lives as long as this object


def _fix_torchaudio(utils) -> None:
    load = utils._load_lib

    def load_or_absent(lib: str) -> bool:
        try:
            return load(lib)
        except OSError:
            return False

    utils._load_lib = load_or_absent


_FIXES = {"torchvision.extension": _fix_torchvision, "torchaudio._extension.utils": _fix_torchaudio}


class _Finder:
    """Finds the modules of `_FIXES` as usual and runs the fix after each has been executed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        fix = _FIXES.get(name)
        if fix is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_and_fix(module):
            execute(module)
            fix(module)

        spec.loader.exec_module = exec_and_fix
        return spec


def install() -> None:
    """Activate the fix for imports to come; calling it again does nothing."""
    if not any(getattr(finder, "_pastiche_torchvision_fix", False) for finder in sys.meta_path):
        _Finder._pastiche_torchvision_fix = True
        sys.meta_path.insert(0, _Finder)
