"""Features that are not stored, from reference rows in the sample's own forward in place of a forward of their own.

The reference's latent stands behind the sample's rows, with its own noise level and prompt. Only where nothing but
Style Injection tells the two passes apart, so that its rows compute what they would compute alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterator

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...sockets import FeatureKey, Trajectory
from ..networks.adapter import RUN
from ..networks.marks import injected_by
from ..networks.rows import condition_rows, lengthen, own_conditions
from ..networks.unet_hidden import HiddenPatch
from .style_marks import STYLE_INJECTION, STYLE_ROWS

BESIDE = "pastiche_beside"  # in a forward's transformer_options: a `Beside`, where reference rows follow the sample's
HOOKS = (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL, WrappersMP.CALC_COND_BATCH)
ROOM = 1.5  # core batches conditions while free memory is this many times what they need


@dataclass(frozen=True)
class Beside:
    """rows: of the sample; places: (reader, where its rows are) of each bank."""

    rows: int
    places: tuple[tuple[Any, slice], ...]

    def keep(self, key: FeatureKey, hidden: Tensor) -> None:
        """Hands every bank its rows of `hidden`, (rows and reference rows, T, C)."""
        for reader, place in self.places:
            reader.keep(key, hidden[place])

    def joined(self, changed: Tensor, before: Tensor) -> Tensor:
        """The sample's changed rows, followed by the references' as they were."""
        return torch.cat([changed, before[self.rows :]])


def obstacle(guider: Any, plain: ModelPatcher, trajectory: Trajectory) -> str:
    """Why a trajectory's rows, of the sample's size, cannot run in the sample's forwards of this run; "" where they can.

    plain: the MODEL that they would run in alone.
    """
    context = trajectory.conditioning[0][0]
    if context is not None and context.shape[0] != 1:
        return "its images have prompts of their own"
    others = [name for name in injected_by(guider.model_patcher) if name != STYLE_INJECTION]
    if others:
        return f"{others[0]} is on the same model"
    options = guider.model_options
    if any(o.get(name) is not None for o in (options, plain.model_options) for name in ("model_function_wrapper", "context_handler", "multigpu_clones")):
        return "another node evaluates the model in its own way"
    ours, theirs = (list(_hooks(o, w)) for o, w in (
        (options["transformer_options"], options["transformer_options"].get("wrappers", {})),
        (plain.model_options.get("transformer_options", {}), plain.wrappers),
    ))
    if ours != theirs:
        return "another node changes the sampled model alone"
    entries = [entry for conds in guider.conds.values() for entry in conds]
    special = {name for entry in entries for name in ("control", "hooks", "gligen", "area") if entry.get(name) is not None}
    return f"the sample's prompt has {min(special)}" if special else ""


def _hooks(options: dict, wrappers: dict) -> Iterator[tuple]:
    """What runs in a network's forward, except for Style Injection."""
    for kind, patches in sorted(options.get("patches", {}).items()):
        yield from ((kind, id(patch)) for patch in patches if not isinstance(getattr(patch, "__self__", patch), HiddenPatch))
    for kind, slots in sorted(options.get("patches_replace", {}).items()):
        yield from ((kind, slot, id(patch)) for slot, patch in slots.items())
    for kind in HOOKS:
        for key, group in sorted(wrappers.get(kind, {}).items(), key=lambda item: str(item[0])):
            yield from ((kind, key, id(wrapper)) for wrapper in group if not isinstance(getattr(wrapper, "__self__", None), RowsBeside))
    yield "attention", id(options.get("optimized_attention_override"))


class RowsBeside:
    """APPLY_MODEL wrapper of an injection that takes rows beside the sample: the first of a step's forwards carries them."""

    def apply_model(self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
        run = transformer_options.get(RUN)
        readers = [] if run is None else run.waiting()
        conditions = {"c_concat": c_concat, "c_crossattn": c_crossattn, **kwargs}
        if readers:
            longer = self._lengthened(executor.class_obj, readers, x, t, conditions, control, transformer_options)
            if longer is not None:
                x_rows, t_rows, conditions, options = longer
                for reader in readers:
                    reader.waits = False
                out = executor(x_rows, t_rows, conditions.pop("c_concat"), conditions.pop("c_crossattn"), None, options, **conditions)
                return out[: x.shape[0]]
            run.apart()
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    def _lengthened(
        self, model: Any, readers: list, x: Tensor, t: Tensor, conditions: dict, control: Any, options: dict
    ) -> tuple[Tensor, Tensor, dict, dict] | None:
        """The forward's arguments with the references' rows, None where it cannot take them."""
        if control is not None or options.get(STYLE_ROWS) or any(reader.latents.shape[1:] != x.shape[1:] for reader in readers):
            return None
        rows, latents, sigmas, places = x.shape[0], [x], [t], []
        for reader in readers:
            first = sum(map(len, latents))
            latents.append(reader.latents.to(x))
            sigmas.append(reader.sigma.to(t).expand(len(latents[-1])))
            places.append(slice(first, first + len(latents[-1])))
        longer = torch.cat(latents)
        needed = model.memory_required([len(longer), *x.shape[1:]])
        if needed * ROOM >= model.current_patcher.get_free_memory(x.device):
            return None
        own = [options[RUN].memo(("conditions", id(reader)), lambda: self._conditions(model, reader, x)) for reader in readers]
        copied = [0] * (len(longer) - rows)
        lengthened = own_conditions({k: lengthen(v, rows, copied) for k, v in conditions.items()}, rows, list(zip(places, own)))
        if not all(_has_its_own(lengthened, place, wanted) for place, wanted in zip(places, own)):
            return None
        return longer, torch.cat(sigmas), lengthened, {**options, BESIDE: Beside(rows, tuple(zip(readers, places)))}

    @staticmethod
    def _conditions(model: Any, reader: Any, x: Tensor) -> dict[str, tuple[Any, bool]]:
        return condition_rows(model, reader.bank.trajectory.conditioning, x[:1])

    def prepare_sampling(self, executor, model, noise_shape, *args, **kwargs):
        """Asks ComfyUI for the memory of the longer batch."""
        return executor(model, [noise_shape[0] + self.rows_beside, *noise_shape[1:]], *args, **kwargs)

    rows_beside = 0


def _has_its_own(conditions: dict, place: slice, wanted: dict[str, tuple[Any, bool]]) -> bool:
    """Whether the rows `place` of a forward have the conditions `wanted`, no more and no less."""
    given = {name for name, value in conditions.items() if value is not None}
    if given != {name for name, (value, _) in wanted.items() if value is not None}:
        return False
    return all(_same(conditions[name], place, value, repeatable) for name, (value, repeatable) in wanted.items() if value is not None)


def _same(batch: Any, place: slice, value: Any, repeatable: bool) -> bool:
    """Whether `own_conditions` could put `value` there: whole, or repeated along the tokens."""
    if not isinstance(value, Tensor) or not isinstance(batch, Tensor) or batch.ndim != value.ndim or batch.shape[0] < place.stop:
        return False
    wanted = list(value.shape[1:])
    if value.ndim == 3 and repeatable and batch.shape[1] % value.shape[1] == 0:
        wanted[0] = batch.shape[1]
    return list(batch.shape[1:]) == wanted
