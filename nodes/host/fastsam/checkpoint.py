"""Reads FastSAM checkpoints without running anything that is in them.

FastSAM is YOLOv8-seg with one class: FastSAM-s has depth 0.33 and width 0.5, FastSAM-x depth 1 and
width 1.25 with at most 512 channels. Accepted files:

.pt            an ultralytics checkpoint. It is a pickle, so torch's weights_only reader takes it, and
               each class it may name (`_NAMED`) is read as an inert `Record`: no code of the file, nor
               of ultralytics, runs, and file layouts of all its versions are the same to us.
.safetensors   the same tensors, with `FORMAT` and the layout's numbers in the metadata.

Tensors: `model.<0..21>.*` backbone and neck, `model.22.cv2.<0..2>.*` boxes (64 = 4 x 16 bins),
`cv3` class score (1), `cv4` mask coefficients (32), `model.22.proto.*` prototypes (32).
Source: Zhao et al., Fast Segment Anything, arXiv 2306.12156.
"""

from __future__ import annotations

import copy
import math
import os
import pickletools
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Iterator

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checks import is_finite, kind_of_tensor
from ..files import atomic_write, refuse_web_page
from ..safe_pickles import only_these

FORMAT = "yolov8-seg"
MASKS = 32  # prototypes, and mask coefficients per detection

# from, repeats, module, arguments: the YOLOv8 layout that all sizes share
_BACKBONE = [
    [-1, 1, "Conv", [64, 3, 2]],
    [-1, 1, "Conv", [128, 3, 2]],
    [-1, 3, "C2f", [128, True]],
    [-1, 1, "Conv", [256, 3, 2]],
    [-1, 6, "C2f", [256, True]],
    [-1, 1, "Conv", [512, 3, 2]],
    [-1, 6, "C2f", [512, True]],
    [-1, 1, "Conv", [1024, 3, 2]],
    [-1, 3, "C2f", [1024, True]],
    [-1, 1, "SPPF", [1024, 5]],
]
_HEAD = [
    [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
    [[-1, 6], 1, "Concat", [1]],
    [-1, 3, "C2f", [512]],
    [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
    [[-1, 4], 1, "Concat", [1]],
    [-1, 3, "C2f", [256]],
    [-1, 1, "Conv", [256, 3, 2]],
    [[-1, 12], 1, "Concat", [1]],
    [-1, 3, "C2f", [512]],
    [-1, 1, "Conv", [512, 3, 2]],
    [[-1, 9], 1, "Concat", [1]],
    [-1, 3, "C2f", [1024]],
    [[15, 18, 21], 1, "Segment", ["nc", MASKS, 256]],
]

_ULTRALYTICS = {  # class: modules it has lived in, over ultralytics' versions
    "SegmentationModel": ["nn.tasks"],
    "DetectionModel": ["nn.tasks"],
    "Conv": ["nn.modules", "nn.modules.conv"],
    "Concat": ["nn.modules", "nn.modules.conv"],
    "C2f": ["nn.modules", "nn.modules.block"],
    "Bottleneck": ["nn.modules", "nn.modules.block"],
    "SPPF": ["nn.modules", "nn.modules.block"],
    "DFL": ["nn.modules", "nn.modules.block"],
    "Proto": ["nn.modules", "nn.modules.block"],
    "Segment": ["nn.modules", "nn.modules.head"],
    "Detect": ["nn.modules", "nn.modules.head"],
    "IterableSimpleNamespace": ["utils", "yolo.utils"],
}
_TORCH = {
    "Sequential": "container",
    "ModuleList": "container",
    "Conv2d": "conv",
    "ConvTranspose2d": "conv",
    "BatchNorm2d": "batchnorm",
    "SiLU": "activation",
    "MaxPool2d": "pooling",
    "Upsample": "upsampling",
    "Identity": "linear",
}
_PLAIN = [  # training notes beside the weights
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "numpy.dtype",
    "numpy.dtypes.Float64DType",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
]


# torch's own: what tensors and their containers are made of. Its reader knows more, such as bytearray(n)
_TENSORS = {
    "collections.OrderedDict", "collections.defaultdict", "_codecs.encode", "torch.Size", "torch.device", "builtins.set", "__builtin__.set",
    "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch.nn.parameter.Parameter",
    "torch._utils._rebuild_parameter_with_state", "torch._tensor._rebuild_from_type_v2", "torch.Tensor", "collections.Counter",
    "torch.storage.UntypedStorage", "torch.storage.TypedStorage", "torch.UntypedStorage", "builtins.complex", "__builtin__.complex",
    *(f"torch.{kind}Storage" for kind in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")),
    *(f"torch.{kind}" for kind in ("float32", "float16", "bfloat16", "float64", "int64")),
}
LARGEST_NOTES = 64 << 20  # bytes of a checkpoint's pickle, which holds names and sizes but no weights


class Record:
    """Stands for an object of a checkpoint: keeps its state, has no behaviour."""

    def __init__(self, *_):
        pass

    def __new__(cls, *_):
        return super().__new__(cls)

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)


def _named_records() -> list[tuple[type, str]]:
    names = [f"ultralytics.{module}.{name}" for name, modules in _ULTRALYTICS.items() for module in modules]
    names += [f"torch.nn.modules.{module}.{name}" for name, module in _TORCH.items()]
    return [(type(name.rpartition(".")[2], (Record,), {}), name) for name in names + _PLAIN]


@dataclass
class SegmenterWeights:
    """What a YOLOv8-seg network is built from.

    depth, width, max_channels: the numbers that scale YOLOv8's layout; size: pixels of the longer
    side it was trained with; state: tensors by name, floating point.
    """

    depth: float
    width: float
    max_channels: int
    size: int
    state: dict[str, Tensor]

    def layout(self) -> dict:
        """The network as ultralytics' builder wants it. Nothing in it is text from a checkpoint."""
        scale = {"scale": "own", "scales": {"own": [self.depth, self.width, self.max_channels]}}
        return {"nc": 1, **scale, "backbone": copy.deepcopy(_BACKBONE), "head": copy.deepcopy(_HEAD)}


def read_checkpoint(path: str) -> SegmenterWeights:
    """Weights of a one-class YOLOv8-seg file. Raises ValueError with a sentence for anything else."""
    name = os.path.basename(path)
    refuse_web_page(path)
    extension = os.path.splitext(path)[1].lower()
    if extension == ".safetensors":
        weights = _read_safetensors(path, name)
    elif extension == ".pt":
        weights = _read_pt(path, name)
    else:
        raise ValueError(f"{name}: FastSAM is read from .pt, .safetensors or .onnx files, not '{extension}'.")
    _check_tensors(weights, name)
    return weights


def save_safetensors(weights: SegmenterWeights, path: str) -> None:
    """Write weights in half precision, whole or not at all."""
    numbers = {key: str(value) for key, value in asdict(weights).items() if key != "state"}
    halves = {key: _shrink(tensor) for key, tensor in weights.state.items()}
    with atomic_write(Path(path)) as partial:
        save_file(halves, str(partial), metadata={"format": FORMAT, **numbers})


def _shrink(tensor: Tensor) -> Tensor:
    return (tensor.half() if tensor.is_floating_point() else tensor).contiguous()


def _read_safetensors(path: str, name: str) -> SegmenterWeights:
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{name} cannot be read; it may be truncated. Download it again. ({error})") from error
    if notes.get("format") != FORMAT:
        raise ValueError(
            f"{name} is no FastSAM file: its metadata has format '{notes.get('format')}', expected '{FORMAT}'."
        )
    try:
        numbers = float(notes["depth"]), float(notes["width"]), int(notes["max_channels"]), int(notes["size"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{name}: metadata lacks a valid depth, width, max_channels or size ({error}).") from error
    return SegmenterWeights(*_sane(*numbers, name), state)


def _examine_pt(path: str, name: str, allowed: set[str]) -> None:
    """Raises ValueError for what would take memory or name foreign objects, before anything is unpickled."""
    with zipfile.ZipFile(path) as file:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()):
            raise ValueError(f"{name} is a compressed archive, which PyTorch never writes. Use FastSAM-s.pt or FastSAM-x.pt.")
        pickles = [entry for entry in file.infolist() if entry.filename.endswith("data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > LARGEST_NOTES:
            raise ValueError(f"{name} is no checkpoint that PyTorch wrote. Use FastSAM-s.pt or FastSAM-x.pt.")
        notes = file.read(pickles[0])
    for operation, argument, _ in _operations(notes, name):
        if operation.name != "GLOBAL":  # the one way to name an object that torch's reader knows
            continue
        found = argument.replace(" ", ".")
        if found not in allowed:
            raise ValueError(
                f"{name} was refused, and nothing in it was run: it names {found[:200]}, which a YOLOv8-seg checkpoint does "
                "not need. Use FastSAM-s.pt or FastSAM-x.pt."
            )


def _operations(notes: bytes, name: str) -> Iterator[tuple]:
    try:
        yield from pickletools.genops(notes)
    except ValueError as error:  # its sentences do not name the file
        raise ValueError(f"{name} cannot be read; it may be damaged. Download it again. ({error})") from error


def _read_pt(path: str, name: str) -> SegmenterWeights:
    records = _named_records()
    try:
        _examine_pt(path, name, {record for _, record in records} | _TENSORS)
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be read; it may be truncated, or a web page. Download it again. ({error})") from error
    try:
        with only_these(records):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different type for each way a file is broken
        if type(error).__name__ == "UnpicklingError":
            raise ValueError(
                f"{name} was refused, and nothing in it was run: it names objects that a YOLOv8-seg checkpoint does "
                f"not need. Use FastSAM-s.pt or FastSAM-x.pt. ({_culprit(str(error))})"
            ) from error
        raise ValueError(f"{name} cannot be read; it may be truncated. Download it again. ({error})") from error
    model = None
    if isinstance(content, dict):
        model = next((content[key] for key in ("ema", "model") if isinstance(content.get(key), Record)), None)
    if model is None:
        raise ValueError(f"{name} holds no ultralytics model. Use FastSAM-s.pt or FastSAM-x.pt.")
    kind = type(model).__name__
    if kind != "SegmentationModel":
        raise ValueError(
            f"{name} is an ultralytics {kind}, which gives boxes but no masks; a SegmentationModel (-seg) is needed."
        )
    state: dict[str, Tensor] = {}
    _collect(model, state)
    layout = getattr(model, "yaml", None)
    depth, width, most = _scale(layout, name)
    train = content.get("train_args")
    size = train.get("imgsz", 640) if isinstance(train, dict) else 640
    sides = [side for side in (size if isinstance(size, (list, tuple)) else [size]) if isinstance(side, int)]
    return SegmenterWeights(*_sane(depth, width, most, max(sides, default=640), name), state)


def _culprit(message: str) -> str:
    line = next((part for part in message.splitlines() if "GLOBAL" in part or "Unsupported" in part), message)
    return line.strip()[:200]


def _collect(module: Record, state: dict[str, Tensor]) -> None:
    """Flatten a module's records into state-dict names; each record once, whatever refers to it or to itself."""
    waiting, seen = [("", module)], {id(module)}
    while waiting:
        prefix, record = waiting.pop()
        for group in ("_parameters", "_buffers"):
            for key, tensor in _entries(record, group):
                if isinstance(tensor, Tensor):
                    state[prefix + key] = tensor.detach()
        for key, child in _entries(record, "_modules"):
            if isinstance(child, Record) and id(child) not in seen:
                seen.add(id(child))
                waiting.append((f"{prefix}{key}.", child))


def _entries(record: Record, group: str) -> list[tuple[str, Any]]:
    found = getattr(record, group, None)
    return [(key, value) for key, value in found.items() if isinstance(key, str)] if isinstance(found, dict) else []


def _scale(layout, name: str) -> tuple[float, float, float]:
    """Depth, width and channel limit of a YOLOv8 layout, after checking that it is one."""

    def plain(rows):
        return [[f, n, m, [None if a == "None" else a for a in args]] for f, n, m, args in rows]

    try:
        backbone, head = plain(layout["backbone"]), plain(layout["head"])
        kind = head[-1][2]
        if kind == "Segment":
            head[-1][3][0] = "nc"  # written as a number by some versions; the tensors tell the count
        known = (backbone, head) == (_BACKBONE, _HEAD) and not layout.get("activation")
        if layout.get("scales"):
            depth, width, most = layout["scales"][layout["scale"]]
        else:
            depth, width, most = layout["depth_multiple"], layout["width_multiple"], layout.get("max_channels", 1 << 16)
        scale = float(depth), float(width), float(most)
    except (AttributeError, TypeError, KeyError, IndexError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} does not describe a YOLOv8-seg network ({error!r}).") from error
    if not known:
        raise ValueError(f"{name} is not laid out as YOLOv8-seg (its last module is {kind}); FastSAM-s and FastSAM-x are.")
    return scale


def _sane(depth: float, width: float, most: float, size: int, name: str) -> tuple[float, float, int, int]:
    sound = all(map(math.isfinite, (depth, width, most)))
    if not (sound and 0 < depth <= 4 and 0 < width <= 4 and 1 <= most <= 1 << 16 and 32 <= size <= 8192):
        raise ValueError(f"{name}: impossible YOLOv8 scale: depth {depth}, width {width}, channels {most}, size {size}.")
    return depth, width, int(most), size


def _check_tensors(weights: SegmenterWeights, name: str) -> None:
    """Class and prototype counts, and whether there are numbers in all of it; shapes are checked when the network is filled."""
    for key, tensor in weights.state.items():
        kind = kind_of_tensor(tensor)
        if kind or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise ValueError(f"{name}: {key[:80]} is a {kind or 'repeated'} tensor of shape {tuple(tensor.shape)}, not the weights themselves.")
        if not is_finite(tensor):
            raise ValueError(f"{name}: {key[:80]} holds NaN or infinite values; the file is damaged. Download it again.")
    scores = weights.state.get("model.22.cv3.0.2.weight")
    coefficients = weights.state.get("model.22.cv4.0.2.weight")
    prototypes = weights.state.get("model.22.proto.cv3.conv.weight")
    if scores is None:
        raise ValueError(f"{name} lacks model.22.cv3.0.2.weight, the class scores of a YOLOv8 head.")
    if coefficients is None or prototypes is None:
        raise ValueError(f"{name} has no mask head (model.22.cv4, model.22.proto): a detection model; use a -seg one.")
    if scores.shape[0] != 1:
        raise ValueError(f"{name} has {scores.shape[0]} classes; FastSAM has 1 ('object'). Use FastSAM-s or FastSAM-x.")
    if coefficients.shape[0] != MASKS or prototypes.shape[0] != MASKS:
        raise ValueError(
            f"{name} has {coefficients.shape[0]} mask coefficients and {prototypes.shape[0]} prototypes, expected {MASKS}."
        )
