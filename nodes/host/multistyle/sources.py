"""What a Style Entry's model or LoRA adds to the guider's MODEL, and what it has that one shared forward cannot give it."""

from __future__ import annotations

import logging
from typing import Any, Iterator

import comfy.lora
import comfy.lora_convert
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..injections.base import Injection
from ..injections.content import ContentPatches
from ..networks.marks import MARK, injected_by
from ..networks.neighbours import is_ours, owner_of

Patches = dict[str, list[tuple]]
"""Weight patches of a style by key, in ModelPatcher's form (strength, patch, strength_model, offset, function)."""

TEXT_ENCODERS = ("lora_te", "text_encoder", "lora_prior_te", "te1_", "te2_", "te_", "clip_l.", "clip_g.", "cond_stage_model.", "conditioner.")


def style_patches(model: Any, styled: Any, name: str) -> Patches:
    """What `styled`, a MODEL with LoRAs, adds to `model`'s weights.

    Raises ValueError when it is not `model` with LoRAs, and at most a Feature Injection (see `content_of`), on top.
    """
    _require_clone(model, styled, name)
    extras = list(dict.fromkeys(_extras(model, styled)))
    if extras:
        raise ValueError(
            f"{name}: its model carries more than LoRAs: {', '.join(extras)}. All styles run in one model, which would leave that "
            "out: connect such nodes to the guider's model, where they act on every style, and give the Style Entry LoRAs only (and Feature "
            "Injection, where its content features are this style's own)."
        )
    added: Patches = {}
    for key in {**model.patches, **styled.patches}:
        patches, shared = styled.patches.get(key, []), model.patches.get(key, [])
        if [_identity(patch) for patch in patches[: len(shared)]] != [_identity(patch) for patch in shared]:
            raise ValueError(
                f"{name}: its model and the guider's carry different LoRAs below the style's own. "
                "Load the shared LoRAs first, give that model to the guider, and put the style's LoRA on top of it."
            )
        if len(patches) > len(shared):
            added[key] = patches[len(shared) :]
    return added


def content_of(model: Any, styled: Any, name: str) -> list[ContentPatches]:
    """The Feature Injections that `styled` has and `model` has not: content features of this style alone.

    Raises ValueError for another checkpoint.
    """
    _require_clone(model, styled, name)
    shared = _injections(model)
    return [injection for injection in _injections(styled) if isinstance(injection, ContentPatches) and injection not in shared]


def _injections(model: Any) -> list[Injection]:
    """Our injections on a MODEL, in the order they were installed."""
    wrappers = [wrapper for group in model.wrappers.get(WrappersMP.OUTER_SAMPLE, {}).values() for wrapper in group]
    owners = [getattr(wrapper, "__self__", None) for wrapper in wrappers]
    return [owner for owner in owners if isinstance(owner, Injection)]


def _require_clone(model: Any, styled: Any, name: str) -> None:
    if not styled.is_clone(model):
        raise ValueError(
            f"{name}: its model comes from another checkpoint than the guider's. One forward cannot run both: "
            "load the LoRA on the guider's own model."
        )


def lora_patches(model: Any, lora: dict[str, Tensor], name: str) -> Patches:
    """A LORA_MODEL or LoRA file as weight patches; logs which of its tensors have no place here.

    Raises ValueError when it fits no layer of this model.
    """
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    tensors = comfy.lora_convert.convert_lora(lora)
    loaded = comfy.lora.load_lora(tensors, known, log_missing=False)
    clone = model.clone()
    clone.add_patches(loaded, 1.0)
    added = style_patches(model, clone, name)
    if not added:
        raise ValueError(
            f"{name}: none of the LoRA's {len(lora)} tensors (for example {min(lora, default='none')}) belongs to a layer "
            f"of this model ({type(model.model.model_config).__name__}). It was made for another architecture."
        )
    _report_left_out(tensors, known, name)
    return added


def _report_left_out(tensors: dict[str, Tensor], known: dict, name: str) -> None:
    left = [key for key in tensors if not _belongs(key, known)]
    text = [key for key in left if key.startswith(TEXT_ENCODERS)]
    foreign = [key for key in left if not key.startswith(TEXT_ENCODERS)]
    if text:
        logging.warning(
            "Pastiche: %s: %d of the LoRA's %d tensors change the text encoder (for example %s). A Style Entry has none: load the "
            "LoRA on the CLIP that encodes this style's prompt.", name, len(text), len(tensors), text[0],
        )
    if foreign:
        logging.warning(
            "Pastiche: %s: %d of the LoRA's %d tensors fit no layer of this model and are left out: %s%s.", name, len(foreign),
            len(tensors), ", ".join(foreign[:4]), " and others" if len(foreign) > 4 else "",
        )


def _belongs(key: str, known: dict) -> bool:
    """Whether a LoRA tensor's name is that of a known layer and one of a LoRA's parts."""
    stems = [key[:position] for position, letter in enumerate(key) if letter == "."]
    return any(stem in known or stem.rpartition("_lora")[0] in known for stem in stems)


def _identity(patch: tuple) -> tuple:
    """Two weight patches are the same when tensors and strengths are."""
    strength, adapter, strength_model, offset, function = patch
    return strength, id(adapter), strength_model, offset, id(function)


def _extras(model: Any, styled: Any) -> Iterator[str]:
    """What `styled` has beside weight patches and `model` has not, in words; our own nodes by their names."""
    known = {ContentPatches.name, *injected_by(model)}
    yield from (node for node in injected_by(styled) if node not in known)
    shared = _injections(model)
    yield from (own.name for own in _injections(styled) if own not in shared and not isinstance(own, ContentPatches))
    yield from _options(model.model_options, styled.model_options)
    for kind in ("wrappers", "callbacks"):
        for hook, groups in getattr(styled, kind).items():
            own = [entry for group in getattr(model, kind).get(hook, {}).values() for entry in group]
            yield from (f"{hook} of {owner_of(entry)}" for group in groups.values() for entry in group if not _among(entry, own) and not is_ours(entry))
    for kind in ("object_patches", "injections", "hook_patches", "additional_models", "weight_wrapper_patches"):
        ours = getattr(model, kind)
        yield from (
            f"{kind.replace('_', ' ').removesuffix('es').removesuffix('s')} {key}" for key, value in getattr(styled, kind).items()
            if key not in ours or not _same(ours[key], value)
        )


def _options(ours: Any, theirs: dict) -> Iterator[str]:
    ours = ours if isinstance(ours, dict) else {}
    for key, value in theirs.items():
        own = ours.get(key)
        if key == MARK or is_ours(value):
            continue
        if isinstance(value, dict):
            yield from _options(own, value)
        elif isinstance(value, (list, tuple)):
            yield from (f"{key} of {owner_of(entry)}" for entry in value if not _among(entry, own or ()) and not is_ours(entry))
        elif not _same(own, value):
            yield f"{key} of {owner_of(value)}" if callable(value) else str(key)


def _among(entry: Any, others: Any) -> bool:
    return any(_same(entry, other) for other in others)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    simple = (str, int, float, bool, type(None))
    return a is b or (isinstance(a, simple) and isinstance(b, simple) and a == b)
