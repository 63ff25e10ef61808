"""What other nodes have put on a MODEL, and whether it minds how we order the batch."""

from __future__ import annotations

from typing import Any, Iterator

from comfy.patcher_extension import WrappersMP

OURS = __name__.rpartition(".networks")[0].rpartition(".host")[0]  # "<package>.nodes"
FORWARD_WRAPPERS = (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)


def is_ours(patch: Any) -> bool:
    """Whether a patch, wrapper or function belongs to this pack."""
    module = getattr(patch, "__module__", None) or type(patch).__module__
    return module == OURS or module.startswith(OURS + ".")


def foreign_patches(model_options: dict) -> Iterator[tuple[str, Any]]:
    """(hook's name, function) of everything inside the network's forward that other nodes brought."""
    options = model_options.get("transformer_options", {})
    for kind, patches in options.get("patches", {}).items():
        yield from ((kind, patch) for patch in patches if not is_ours(patch))
    for kind, slots in options.get("patches_replace", {}).items():
        yield from ((f"{kind} replacement", patch) for patch in slots.values() if not is_ours(patch))
    for kind in FORWARD_WRAPPERS:
        for wrappers in options.get("wrappers", {}).get(kind, {}).values():
            yield from ((kind, wrapper) for wrapper in wrappers if not is_ours(wrapper))
    for place, key in ((model_options, "model_function_wrapper"), (options, "optimized_attention_override")):
        if place.get(key) is not None and not is_ours(place[key]):
            yield key, place[key]


def reads_whole_batch(model_options: dict) -> bool:
    """Whether some other node may look at more of a batch than its own row.

    Such patches expect one conditional and one unconditional chunk, tell chunks by their first number, cut the
    latent into tiles or change the number of rows: none of that can be seen from outside, so everything foreign counts.
    """
    return next(foreign_patches(model_options), None) is not None
