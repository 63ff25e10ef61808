"""Digests of what a result depends on, so that the same computation is known again; a refusal where that cannot be told."""

from __future__ import annotations

import enum
import functools
import hashlib
import itertools
import logging
import types
import uuid
import weakref
from typing import Any

import comfy.ldm.modules.attention
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from torch import nn

from .fingerprint import fingerprint, tensors_of

SIMPLE = (type(None), bool, int, float, complex, str, bytes)
NAMED = (torch.dtype, torch.device, torch.layout, torch.memory_format, uuid.UUID, range, slice)  # wholly told by their repr
PLAIN_SIZE = type("Plain", (), {}).__basicsize__  # of objects whose whole state is their __dict__
SKIPPED = ("__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__annotations__", "__firstlineno__", "__static_attributes__")
MOST_OBJECTS, MOST_BYTES = 50_000, 2 << 30  # that are looked through for one digest
READ_WHOLE = 1 << 20  # bytes of weights up to which a module is told by its content, beyond by which object it is (loading changes those)
PATCHES_WHOLE = 512 << 20  # bytes of weight patches, likewise

_numbers = itertools.count(1)
_serials: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


class Unknown(Exception):
    """Something whose state cannot be told from outside."""


def digest(*values: Any) -> str | None:
    """One text for all that `values` hold; None where part of it cannot be told.

    Equal texts mean that a computation from them gives the same bits. The converse does not hold: models are told apart by
    which object they are, so that the same file loaded twice is two. Reads a MODEL with everything that is on it.
    """
    content = _Content()
    try:
        for value in (*values, *_numerics()):
            content.add(value)
    except Unknown as unknown:
        logging.debug("Pastiche: not kept to be found again: %s", unknown)
        return None
    except Exception as error:  # objects of other nodes may do anything when they are looked at
        logging.debug("Pastiche: not kept to be found again: %s: %s", type(error).__name__, error)
        return None
    return content.text()


def serial(module: nn.Module) -> int:
    """A number of this very object, which no other gets while the process lives."""
    if module not in _serials:
        _serials[module] = next(_numbers)
    return _serials[module]


def _numerics() -> list[Any]:
    """Switches of the whole process that results depend on, and that nodes may turn."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    switches = [
        (matmul, "allow_tf32"), (matmul, "allow_fp16_reduced_precision_reduction"), (matmul, "allow_bf16_reduced_precision_reduction"),
        (matmul, "allow_fp16_accumulation"), (cudnn, "allow_tf32"), (cudnn, "benchmark"), (cudnn, "deterministic"), (cudnn, "enabled"),
    ]
    states: list[Any] = [torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(), comfy.ldm.modules.attention.optimized_attention]
    for place, name in switches:
        try:
            states.append(getattr(place, name, None))
        except RuntimeError:  # PyTorch's old and new names for it were mixed
            states.append(name)
    return states


def _globals_of(function: types.FunctionType) -> dict[str, Any]:
    """The plain values among the module's names that a function's code speaks of; its functions and classes are taken for fixed."""
    names, codes = set(), [function.__code__]
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [part for part in code.co_consts if isinstance(part, types.CodeType)]
    found = {name: function.__globals__[name] for name in sorted(names) if name in function.__globals__}
    return {name: value for name, value in found.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    """A value, a tensor, or a collection of values."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    parts = value if isinstance(value, (list, tuple, set, frozenset)) else [value]
    return all(type(part) in SIMPLE or isinstance(part, torch.Tensor) for part in parts)


class _Content:
    """Walks values and writes down what they are. An object met again is written as the number it had the first time."""

    def __init__(self):
        self._hash = hashlib.blake2b(digest_size=20)
        self._met: dict[int, int] = {}
        self._held: list[Any] = []  # so that no id comes twice
        self._bytes = 0

    def text(self) -> str:
        return self._hash.hexdigest()

    def _write(self, *parts: Any) -> None:
        for part in parts:
            data = part if isinstance(part, bytes) else str(part).encode()
            self._hash.update(len(data).to_bytes(8, "little") + data)

    def add(self, value: Any) -> None:
        if type(value) in SIMPLE or isinstance(value, NAMED):
            self._write(type(value).__name__, repr(value))
        elif isinstance(value, enum.Enum):
            self._write("enum", type(value).__qualname__, value.name)
        elif id(value) in self._met:
            self._write("again", self._met[id(value)])
        else:
            self._met[id(value)] = len(self._held)
            self._held.append(value)
            if len(self._held) > MOST_OBJECTS:
                raise Unknown(f"more than {MOST_OBJECTS} objects")
            self._look_into(value)

    def _look_into(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._tensor(value)
        elif isinstance(value, ModelPatcher):
            self._model(value)
        elif isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, (dict, types.MappingProxyType)):
            self._items(value, [part for pair in value.items() for part in pair])
        elif isinstance(value, (list, tuple)):
            self._items(value, list(value))
        elif isinstance(value, (set, frozenset)):
            if not all(type(part) in SIMPLE for part in value):
                raise Unknown("a set of objects")
            self._items(value, sorted(value, key=repr))
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, types.ModuleType):
            self._write("module", value.__name__)
        else:
            self._callable_or_object(value)

    def _items(self, value: Any, parts: list[Any]) -> None:
        self._write(type(value).__qualname__, len(parts))
        for part in parts:
            self.add(part)
        if getattr(value, "__dict__", None):
            self.add(vars(value))

    def _callable_or_object(self, value: Any) -> None:
        if isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._write("method")
            self.add(value.__func__)
            self.add(value.__self__)
        elif isinstance(value, functools.partial):
            self._items(value, [value.func, value.args, value.keywords])
        elif isinstance(value, property):
            self._items(value, [value.fget, value.fset, value.fdel])
        elif isinstance(value, (staticmethod, classmethod)):
            self._items(value, [value.__func__])
        elif isinstance(value, types.BuiltinFunctionType) and isinstance(value.__self__, (types.ModuleType, type(None))):
            self._write("builtin", value.__module__, value.__qualname__)
        elif hasattr(value, "__dict__") and type(value).__basicsize__ == PLAIN_SIZE:
            self._write("object")
            self.add(type(value))
            self.add(vars(value))
        else:
            raise Unknown(f"a {type(value).__module__}.{type(value).__qualname__}")

    def _function(self, function: types.FunctionType) -> None:
        """By its code and all that it carries, so that a node that ran again with the same settings gives the same."""
        code = function.__code__
        self._write("function", function.__module__, function.__qualname__, code.co_filename, code.co_firstlineno)
        self._write(code.co_code, repr(code.co_consts), repr(code.co_names))
        cells = [cell.cell_contents for cell in function.__closure__ or ()]  # an empty cell is a ValueError
        for part in (function.__defaults__, function.__kwdefaults__, cells, vars(function), _globals_of(function)):
            self.add(part)

    def _class(self, kind: type) -> None:
        """By its name; one that a function made, by what it holds too."""
        for base in kind.__mro__:
            self._write("class", base.__module__, base.__qualname__)
            if "<locals>" in base.__qualname__:
                self.add({name: part for name, part in vars(base).items() if name not in SKIPPED})

    def _tensor(self, tensor: torch.Tensor) -> None:
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.is_nested or tensor.layout != torch.strided or tensor.is_meta:
            raise Unknown(f"a {type(tensor).__name__} without plain numbers")
        self._bytes += tensor.nbytes
        if self._bytes > MOST_BYTES:
            raise Unknown(f"tensors of more than {MOST_BYTES} bytes")
        self._write("tensor", tensor.dtype, tuple(tensor.shape), tensor.stride())  # convolutions may go another way on other strides
        data = tensor.detach().cpu().contiguous().reshape(-1)
        self._hash.update((torch.view_as_real(data.resolve_conj()) if data.is_complex() else data).view(torch.uint8).numpy().data)

    def _module(self, module: nn.Module) -> None:
        size = sum(tensor.nbytes for tensor in itertools.chain(module.parameters(), module.buffers()))
        if isinstance(module, BaseModel) or size > READ_WHOLE:
            self._write("network", serial(module), serial(getattr(module, "diffusion_model", module)))
            self._changes_in_place(module)
        else:
            self._write("small network")
            self.add(type(module))
            self.add(vars(module))

    def _changes_in_place(self, module: nn.Module) -> None:
        """Some nodes replace methods of a network, or hook into it, without a patch on the MODEL."""
        for name, part in module.named_modules():
            own = vars(part)
            found = {key: own[key] for key in ("forward", "_forward_hooks", "_forward_pre_hooks") if own.get(key)}
            if found:
                self._write(name)
                self.add(found)

    def _model(self, model: ModelPatcher) -> None:
        """A MODEL: its weights, and all that ComfyUI lets nodes put on it."""
        self.add(model.model)
        self.add(model.load_device)
        if isinstance(model.model, BaseModel):
            self.add(tuple(fingerprint(model)))
            self.add(model.model.get_dtype())
            for name in ("manual_cast_dtype", "model_sampling"):  # not those that a clone has put into the loaded model
                self.add(model.get_model_object(name))
        size = sum(tensor.nbytes for patches in model.patches.values() for patch in patches for tensor in tensors_of(patch[1]))
        self.add(model.patches if size <= PATCHES_WHOLE else str(model.patches_uuid))
        for name in (
            "model_options", "object_patches", "weight_wrapper_patches", "force_cast_weights", "attachments", "additional_models",
            "callbacks", "wrappers", "injections", "hook_patches", "current_hooks", "forced_hooks",
        ):
            self._write(name)
            self.add(getattr(model, name, None))
