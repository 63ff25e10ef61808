"""State of one sampling run: which features belong to the step being predicted."""

from __future__ import annotations

import logging
import uuid
from typing import Any, Callable, Iterable

import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import comfy.sampler_helpers
import torch
from comfy.model_patcher import ModelPatcher

from ...sockets import FeatureBank, FeatureKey
from ..features.capture import feature_shapes, record, storage_dtype
from ..features.stores import MemoryStore, readable_size
from ..networks.adapter import RUN, NetworkAdapter
from ..networks.families import find_adapter
from ..networks.neighbours import plain_pass, why_other_size
from .beside import obstacle
from .schedule import SAME_SIGMA, Schedule, nearest

CONDITIONAL = 0  # core's number of the positive condition in `cond_or_uncond`, where nothing else is known


class SamplingRun:
    """Lives in a guider's transformer_options while it samples, and nowhere else.

    Patches find it through `current_run(extra_options)` and ask `feature(...)`.
    """

    def __init__(self, guider: comfy.samplers.CFGGuider):
        self._guider = guider
        self.sampler: comfy.samplers.Sampler | None = None
        self._banks: dict[int, _BankReader] = {}
        self._memo: dict[Any, Any] = {}
        self._conditions: dict[Any, str] = {}

    @property
    def guider(self) -> comfy.samplers.CFGGuider:
        return self._guider

    def memo(self, key: Any, compute: Callable[[], Any]) -> Any:
        """What `compute` returns, computed once a run: for values that no step changes."""
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    def name_conditions(self) -> None:
        """Learns, once a run, which of the guider's conditions each uuid is; they are there when prediction begins.

        Core gives a condition and the one of the same area that it makes for another prompt one uuid: they get two.
        """
        if self._conditions:
            return
        for name, conds in self._guider.conds.items():
            for position, cond in enumerate(conds):
                if self._conditions.setdefault(cond.get("uuid"), name) != name:
                    conds[position] = {**cond, "uuid": uuid.uuid4()}
                    self._conditions[conds[position]["uuid"]] = name

    def alias(self, condition: Any, known: Any) -> None:
        """Makes uuid `condition` another name of `known`, one of the guider's."""
        if known in self._conditions:
            self._conditions[condition] = self._conditions[known]

    def conditional(self, condition: Any, number: int) -> bool:
        """Whether a prediction follows a prompt, and is not the one that guidance leads away from.

        condition: its uuid; number: its place among the predictions, which only some guiders count alike: core's
        CFGGuider asks for [positive, negative], its DualCFGGuider for [negative, cond2, cond1].
        """
        name = self._conditions.get(condition)
        return number == CONDITIONAL if name is None else not ("negative" in name or "uncond" in name)

    def use(
        self, bank: FeatureBank, keys: Iterable[FeatureKey], due: Callable[[float], bool] | None = None, beside: bool = False
    ) -> None:
        """due: noise levels at which they are asked for, None for all; beside: whether the user takes them from rows of
        the sample's own forward, where they are not stored."""
        reader = self._banks.setdefault(id(bank), _BankReader(bank))
        reader.keys.update(keys)
        reader.due.append(due)
        reader.users_take_rows &= beside

    def prepare(self, shape: tuple[int, ...]) -> None:
        """shape: of the sampled latent (B, C, ...)."""
        of_one_size = all(reader.size == shape[1:] for reader in self._banks.values())
        for reader in self._banks.values():
            reader.users_take_rows &= of_one_size  # an attention has one number of keys for all of its rows
            reader.prepare(self._guider)

    def waiting(self) -> list[_BankReader]:
        """Readers whose features of this step are to come from rows of the next forward."""
        return [reader for reader in self._banks.values() if reader.waits]

    def apart(self) -> None:
        """Evaluates for those readers now, and from now on, in forwards of their own."""
        for reader in self.waiting():
            reader.give_up(self._guider)

    def advance(self, sigma: float) -> None:
        for reader in self._banks.values():
            reader.advance(self._guider, sigma)

    def feature(self, bank: FeatureBank, key: FeatureKey, sigma: float, like: torch.Tensor) -> torch.Tensor:
        """(Bf, ...) features of the step at `sigma`, on `like`'s device and dtype; Bf is the bank's batch."""
        return self._banks[id(bank)].read(self._guider, key, sigma, like)

    def replaced_attention(self, kind: str, place: tuple) -> Callable | None:
        """Another node's attn1/attn2 replacement for (block, number, depth), if there is one."""
        slots = self._guider.model_options["transformer_options"].get("patches_replace", {}).get(kind, {})
        return slots.get(place, slots.get(place[:2]))

    def why_other_size(self, what: str) -> str:
        """For a refusal: why the network sees another number of tokens, and what to do."""
        return why_other_size(self.model_options, what)

    @property
    def model_options(self) -> dict:
        return self._guider.model_options

    @property
    def adapter(self) -> NetworkAdapter:
        return self.memo("adapter", lambda: find_adapter(self._guider.model_patcher))

    def schedule(self, options: dict) -> Schedule:
        """The sampling's own schedule, whole or split; a forward's transformer_options carry it."""
        return self.memo("schedule", lambda: Schedule(options["sample_sigmas"]))

    @property
    def model_sampling(self) -> Any:
        return self._guider.inner_model.model_sampling


class _BankReader:
    """One bank during one run: the step's tensors, read, recomputed once, or taken from rows beside the sample."""

    def __init__(self, bank: FeatureBank):
        self.bank = bank
        self.keys: set[FeatureKey] = set()
        self.due: list[Callable[[float], bool] | None] = []
        self.users_take_rows = True
        self.waits = False
        self._store = bank.store
        self._step = 0
        self._tensors: dict[FeatureKey, torch.Tensor] = {}
        self._conds: list | None = None
        self._plain: ModelPatcher | None = None
        self._warned = False
        self._beside = False

    def prepare(self, guider: comfy.samplers.CFGGuider) -> None:
        """Features of a MODEL with other weights than the sampled one cannot be made beside it without swapping
        weights at every step: they are made once now, for this run only."""
        bank = self.bank
        if self._store is not None:
            return
        if same_weights(bank.model, guider.model_patcher):
            reason = obstacle(guider, self.plain, bank.trajectory) if self.users_take_rows else ""
            self._beside = self.users_take_rows and not reason
            if reason:
                logging.info("Pastiche: reference features are evaluated apart from the sample: %s.", reason)
            return
        shapes = feature_shapes(find_adapter(bank.model), self.keys, bank.trajectory)
        store = MemoryStore(shapes, bank.trajectory.steps, storage_dtype(bank.model, "half"), torch.device("cpu"))
        logging.info(
            "Pastiche: the reference model's weights differ from the sampled one's, "
            "so its features are computed once for this run (%s of RAM).", readable_size(store.nbytes),
        )
        record(bank.model, bank.trajectory, self.keys, store.write)
        self._store = store

    @property
    def plain(self) -> ModelPatcher:
        self._plain = self._plain or plain_pass(self.bank.model)
        return self._plain

    @property
    def size(self) -> tuple[int, ...]:
        """(C, H, W) of a latent."""
        return tuple(self.bank.trajectory.latents.shape[2:])

    @property
    def latents(self) -> torch.Tensor:
        """(B, C, ...) of this step, in model space."""
        return self.bank.trajectory.latents[self._step]

    @property
    def sigma(self) -> torch.Tensor:
        return self.bank.trajectory.sigmas[self._step]

    def advance(self, guider: comfy.samplers.CFGGuider, sigma: float) -> None:
        step = self._nearest(sigma)
        if step != self._step:
            self._step, self._tensors, self.waits = step, {}, False
        if self._store is None and not self._tensors and any(due is None or due(sigma) for due in self.due):
            self.waits = self._beside
            if not self._beside:
                self._recompute(guider)

    def give_up(self, guider: comfy.samplers.CFGGuider) -> None:
        self._beside = self.waits = False
        self._recompute(guider)

    def keep(self, key: FeatureKey, tensor: torch.Tensor) -> None:
        """Takes a tensor (B, ...) of this step that a forward made beside the sample."""
        if key in self.keys and key not in self._tensors:
            self._tensors[key] = tensor.clone()

    def read(self, guider: comfy.samplers.CFGGuider, key: FeatureKey, sigma: float, like: torch.Tensor) -> torch.Tensor:
        self.advance(guider, sigma)
        if key not in self._tensors and self._store is None:
            self.give_up(guider)
        if key not in self._tensors:
            self._tensors[key] = self._store.read(key, self._step, like.device)
        tensor = self._tensors[key]
        return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)

    def _nearest(self, sigma: float) -> int:
        captured = self.bank.trajectory.sigmas[1:]
        step = 1 + nearest(captured, sigma)
        found = float(captured[step - 1])
        if not self._warned and abs(found - sigma) > SAME_SIGMA * sigma:
            self._warned = True
            logging.info("Pastiche: no features at sigma %.4f; using the nearest captured step (%.4f).", sigma, found)
        return step

    def _recompute(self, guider: comfy.samplers.CFGGuider) -> None:
        """Runs the reference latent of this step through the model being sampled, with the bank's own options."""
        trajectory, model = self.bank.trajectory, self.plain
        device = guider.model_patcher.load_device
        latent = self.latents.to(device)
        sigma = self.sigma.to(device).expand(trajectory.batch)
        if self._conds is None:
            conds = {"positive": comfy.sampler_helpers.convert_cond(trajectory.conditioning)}
            self._conds = comfy.samplers.process_conds(guider.inner_model, latent, conds, device)["positive"]
        options = comfy.model_patcher.create_model_options_clone(model.model_options)
        transformer_options = options.setdefault("transformer_options", {})
        wrappers = transformer_options.setdefault("wrappers", {})
        comfy.patcher_extension.merge_nested_dicts(wrappers, model.wrappers, copy_dict1=False)
        transformer_options["sample_sigmas"] = trajectory.schedule.to(device)

        def emit(key: FeatureKey, tensor: torch.Tensor) -> None:
            self._tensors[key] = tensor[: trajectory.batch].clone()

        find_adapter(guider.model_patcher).capture(transformer_options, self.keys, emit)
        comfy.samplers.calc_cond_batch(guider.inner_model, [self._conds], latent, sigma, options)


def same_weights(a: ModelPatcher, b: ModelPatcher) -> bool:
    """Whether two MODELs share their weights and weight patches, so that one may run for the other."""
    return a.model is b.model and a.patches_uuid == b.patches_uuid and a.injections.keys() == b.injections.keys()


def current_run(options: dict) -> SamplingRun | None:
    """The run of the forward that a patch's options belong to; None outside a sampling (training, another node)."""
    return options.get(RUN)


def rows_of(features: torch.Tensor, rows: int, options: dict) -> torch.Tensor:
    """(Bf, ...) -> (rows, ...): every condition's chunk of the batch gets the features of its own samples.

    rows = chunks * B with the chunks of `cond_or_uncond` one after another; Bf is 1 or B.
    """
    if features.shape[0] == 1:
        return features.expand(rows, *features.shape[1:])
    chunks = len(options["cond_or_uncond"])
    return features.repeat(chunks, *[1] * (features.ndim - 1))
