"""What other nodes have put on a MODEL, and whether it minds how we order the batch."""

from __future__ import annotations

import logging
from types import FunctionType
from typing import Any, Iterator

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

OURS = __name__.rpartition(".networks")[0].rpartition(".host")[0]  # "<package>.nodes"
FORWARD_WRAPPERS = (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
COMPILED = {"torch.compile": "torch.compile"}  # core's wrapper keys, and what users call them
CACHES = {"easycache": "EasyCache", "lazycache": "LazyCache"}
TOKEN_CHANGERS = {  # core's nodes by their class, which is in the name of the functions they make
    "TomePatchModel": "token merging", "HyperTile": "attention in tiles", "PatchModelAddDownscale": "Deep Shrink",
}
TILES, SHRINKS = "HyperTile", "PatchModelAddDownscale"
GUIDANCE = ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function", "sampler_calc_cond_batch_function")


def is_ours(patch: Any) -> bool:
    """Whether a patch, wrapper, function or (class, function) belongs to this pack."""
    if isinstance(patch, tuple) and patch:
        patch = patch[-1]
    module = getattr(patch, "__module__", None) or type(patch).__module__
    return module == OURS or module.startswith(OURS + ".")


def _foreign(patch: Any) -> Iterator[Any]:
    """The functions of other nodes that a hook runs: itself, or those that ours stands in front of (in its closure)."""
    if isinstance(patch, tuple):  # (class, handler)
        patch = patch[-1]
    if not is_ours(patch):
        yield patch
        return
    for cell in getattr(patch, "__closure__", None) or ():
        inner = cell.cell_contents
        if callable(inner) and not isinstance(inner, type) and (isinstance(inner, FunctionType) or not is_ours(inner)):
            yield from _foreign(inner)


def foreign_patches(model_options: dict) -> Iterator[tuple[str, Any]]:
    """(hook's name, function) of everything inside the network's forward that other nodes brought."""
    options = model_options.get("transformer_options", {})
    for kind, patches in options.get("patches", {}).items():
        yield from ((kind, other) for patch in patches for other in _foreign(patch))
    for kind, slots in options.get("patches_replace", {}).items():
        yield from ((f"{kind} replacement", other) for patch in slots.values() for other in _foreign(patch))
    for kind in FORWARD_WRAPPERS:
        for wrappers in options.get("wrappers", {}).get(kind, {}).values():
            yield from ((kind, other) for wrapper in wrappers for other in _foreign(wrapper))
    for place, key in ((model_options, "model_function_wrapper"), (options, "optimized_attention_override")):
        yield from ((key, other) for other in (_foreign(place[key]) if place.get(key) is not None else ()))


def reads_whole_batch(model_options: dict) -> bool:
    """Whether some other node may look at more of a batch than its own row.

    Such patches expect one conditional and one unconditional chunk, tell chunks by their first number, cut the
    latent into tiles or change the number of rows: none of that can be seen from outside, so everything foreign counts.
    """
    return next(foreign_patches(model_options), None) is not None


def leave_out(model_options: dict, keys: dict[str, str]) -> list[str]:
    """Takes wrappers with these keys out of a run's own options; the names of those that were there."""
    options = model_options.get("transformer_options", {})
    wrappers = options.get("wrappers", {})
    found = [name for key, name in keys.items() if any(key in groups for groups in wrappers.values())]
    if found:
        options["wrappers"] = {
            kind: {key: group for key, group in groups.items() if key not in keys} for kind, groups in wrappers.items()
        }
    return found


def run_uncompiled(model: ModelPatcher, model_options: dict) -> None:
    """Has a run of `model`, whose own options these are, see its patches: compiled code keeps those of its first run.

    Core's TorchCompileModel is stepped over, with a line in the log. Raises ValueError for parts of the network that
    were compiled in place.
    """
    compiled = [name for name, patch in model.object_patches.items() if hasattr(patch, "_orig_mod")]
    if compiled:
        raise ValueError(
            f"model: {compiled[0]} is compiled, and compiled code does not run patches that it was not compiled with. "
            "Take the compiling node off this MODEL."
        )
    if leave_out(model_options, COMPILED):
        logging.warning(
            "Pastiche: TorchCompileModel is left out of this run, which is slower: ComfyUI compiles without looking at patches, "
            "and would run those of an earlier run, or none."
        )


def plain_pass(model: ModelPatcher) -> ModelPatcher:
    """A clone for a pass of our own (inversion, capture), one condition without guidance: no guidance of other nodes,
    no caches, nothing compiled."""
    plain = model.clone()
    left = [name for name in GUIDANCE if plain.model_options.pop(name, None)]
    for keys in (CACHES, COMPILED):
        for key, name in keys.items():
            groups = [kind for kind, named in plain.wrappers.items() if key in named]
            for kind in groups:
                plain.remove_wrappers_with_key(kind, key)
            left += [name] if groups else []
    plain.model_options.get("transformer_options", {}).pop("easycache", None)
    if left:
        logging.info("Pastiche: a pass of its own leaves out %s.", ", ".join(left))
    return plain


def shrinks(model_options: dict) -> bool:
    """Whether Deep Shrink is on a MODEL: some levels then run on a smaller grid in some steps, whoever the pass belongs to."""
    return any(owner_of(patch) == SHRINKS for _, patch in foreign_patches(model_options))


def has_tiles(model_options: dict) -> bool:
    """Whether HyperTile is on a MODEL."""
    return any(owner_of(patch) == TILES for _, patch in foreign_patches(model_options))


def before_tiles(patches: list, patch: Any) -> list:
    """An attn1_patch list with `patch` added: last, but before HyperTile, which hands its queries on in tiles."""
    at = next((number for number, other in enumerate(patches) if owner_of(other) == TILES), len(patches))
    return [*patches[:at], patch, *patches[at:]]


def size_changers(model_options: dict) -> list[str]:
    """What on a MODEL lets the network see another number of tokens than the latent has, in words."""
    found = {}
    for hook, patch in foreign_patches(model_options):
        owner = owner_of(patch)
        if owner in TOKEN_CHANGERS:
            found[f"{owner} ({TOKEN_CHANGERS[owner]})"] = None
        elif hook == "model_function_wrapper":
            found[f"{owner}, which evaluates the latent in its own way,"] = None
    return list(found)


def why_other_size(model_options: dict, what: str) -> str:
    """The sentence after "... has 64 tokens, the sample 16.": what is the cause, and what to do. what: cannot be combined with it."""
    changers = size_changers(model_options)
    if changers:
        advice = "take it off this MODEL"
        if shrinks(model_options):
            advice += ", or put the same node on the MODEL of DDIM Inversion and Capture Features, whose grids then are the same"
        return f"{' and '.join(changers)} cannot be combined with {what}: {advice}."
    return f"Conditions with an area cannot be combined with {what}: use masks."


def owner_of(patch: Any) -> str:
    """Which node a function belongs to, as well as its code tells: "PerturbedAttentionGuidance"."""
    return getattr(patch, "__qualname__", type(patch).__qualname__).split(".")[0]
