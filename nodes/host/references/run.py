"""References beside the sample: a sampling run with rows appended to every forward, and their output cut off."""

from __future__ import annotations

import logging
from typing import Any, Callable

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...algorithms.masks import as_batch
from ...algorithms.references import sampling_progress
from ..injections.style_rows import STYLE_PLAN
from ..networks.neighbours import leave_out, owner_of
from ..networks.rows import condition_rows, lengthen, own_conditions, without_control
from .layout import SLOT, Layout, Probe, small_shape
from .settings import Reference, Source
from .sharing import Part, Sharing
from .sources import TrajectorySource, seeded_noise

KEY = "pastiche_references"
BY_ROWS = {"easycache": "EasyCache"}  # keeps outputs by condition and decides by the mean of all rows; LazyCache sees the sample's alone


class ReferenceRun:
    """What belongs to one sampling run: layouts found, noise made, conditions encoded. Lives in the run's options."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape  # of the sampled latent (B, C, ...)
        self._memo: dict[Any, Any] = {}
        self.told: set[str] = set()
        self.expected: set[tuple] = set()  # signatures whose layout comes from a small latent, not yet seen at full size

    def memo(self, key: Any, compute: Callable[[], Any]) -> Any:
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    def forget(self, key: Any) -> None:
        self._memo.pop(key, None)

    def tell(self, sentence: str, *values: Any) -> None:
        """Logs a sentence once a run."""
        if sentence not in self.told:
            self.told.add(sentence)
            logging.info("Pastiche: " + sentence, *values)


class StyleReferences:
    """Wrappers of all Style Reference nodes of a MODEL; settings only."""

    def __init__(self, references: tuple[Reference, ...]):
        self.references = references

    def install(self, model: Any) -> None:
        for kind, wrapper in (
            (WrappersMP.OUTER_SAMPLE, self.outer_sample),
            (WrappersMP.PREPARE_SAMPLING, self.prepare_sampling),
            (WrappersMP.APPLY_MODEL, self.apply_model),
        ):
            model.remove_wrappers_with_key(kind, KEY)
            model.add_wrapper_with_key(kind, KEY, wrapper)

    def outer_sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        self._check(noise, sigmas)
        if leave_out(executor.class_obj.model_options, BY_ROWS):
            logging.warning("Pastiche: EasyCache skips no steps in a run with Style Reference, whose rows it would take for the sample's.")
        options = executor.class_obj.model_options["transformer_options"]
        options[KEY] = ReferenceRun(tuple(noise.shape))
        try:
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            del options[KEY]

    def prepare_sampling(self, executor, model, noise_shape, *args, **kwargs):
        """Asks ComfyUI for the memory of the longer batch."""
        rows = 1 + sum(len(reference.sources) for reference in self.references)
        return executor(model, [noise_shape[0] * rows, *noise_shape[1:]], *args, **kwargs)

    def apply_model(self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
        run = transformer_options.get(KEY)
        sigma = float(t.flatten()[0])
        active = [reference for reference in self.references if reference.sigmas.holds(sigma)]
        if run is None or not active:
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        if not isinstance(x, torch.Tensor) or "latent_shapes" in kwargs:
            raise ValueError(f"{active[0].family}: Style Reference serves models with one picture or video latent, not several packed into one.")
        forward = _Forward(executor, run, x, t, {"c_concat": c_concat, "c_crossattn": c_crossattn, **kwargs}, control, transformer_options)
        return forward.run(active)

    def _check(self, noise: Tensor, sigmas: Tensor) -> None:
        batch = noise.shape[0]
        for reference in self.references:
            for source in reference.sources:
                if isinstance(source, TrajectorySource):
                    source.check(reference.content_input if source is reference.content else "style_trajectory", sigmas, reference.sigmas)
            if reference.mask is not None and len(as_batch(reference.mask)) not in (1, batch):
                raise ValueError(f"mask: {len(as_batch(reference.mask))} masks for {batch} samples; connect one mask or {batch}.")
            if reference.content is None:
                continue
            trajectory = reference.content.trajectory
            if trajectory.batch not in (1, batch):
                raise ValueError(
                    f"{reference.content_input}: {trajectory.batch} inverted images cannot be shared among {batch} samples; "
                    "invert one image, or as many as the sampled latent holds."
                )
            own, size = trajectory.latents.shape[3:], noise.shape[2:]
            if own != size:
                raise ValueError(
                    f"{reference.content_input}: its latent is {'x'.join(map(str, own))} (height x width), the sampled one "
                    f"{'x'.join(map(str, size))}. Invert and sample the content at one size (the style may differ)."
                )


class _Forward:
    """One call of apply_model: the sample's rows, to be run with references beside them."""

    def __init__(self, executor: Any, run: ReferenceRun, x: Tensor, t: Tensor, conditions: dict, control: Any, options: dict):
        self.executor, self.run_state, self.x, self.t = executor, run, x, t
        self.conditions, self.control, self.options = conditions, control, options
        self.rows = x.shape[0]
        self.chunks = list(options.get("cond_or_uncond") or [0])
        self.samples = self.rows // len(self.chunks)
        self.plan = options.get(STYLE_PLAN)
        self.model = executor.class_obj
        self.previous = options.get(SLOT)

    def run(self, active: list[Reference]) -> Tensor:
        key = "layout", self._signature()
        layout = self.run_state.memo(key, lambda: self._find_layout(active[0].family))
        out, fits = self._with_references(active, layout)
        if not fits and key[1] in self.run_state.expected:
            # the small latent told something else than this forward
            self.run_state.expected.discard(key[1])
            self.run_state.forget(key)
            layout = self.run_state.memo(key, lambda: self._probed(self.x, active[0].family))
            out, fits = self._with_references(active, layout)
        if not fits:
            self.run_state.tell(
                "%s made other attention calls than the %d expected: another node skips blocks or changes tokens, and the "
                "references were left out of what did not fit.", active[0].family, len(layout.calls),
            )
        return out

    def _with_references(self, active: list[Reference], layout: Layout) -> tuple[Tensor, bool]:
        """The forward's output, and whether its attention calls were those of `layout`."""
        parts, added = [], _Added(self.rows, self.samples)
        for reference in active:
            calls, chunks = chosen_calls(reference, layout, float(self.t.flatten()[0])), self._chunks_of(reference)
            if not calls or not chunks:
                continue
            places = [added.place(source, reference.noise_seed, chunks) for source in reference.sources]
            content = places.pop() if reference.content is not None else None
            if content is not None and self.x.shape[2:] != self.run_state.shape[2:]:
                raise ValueError(
                    f"{reference.content_input}: a condition with an area shows a part of the picture and the content's row all of it: "
                    "use masks for conditions, or leave the content out."
                )
            rows = None if len(chunks) == len(self.chunks) else added.rows_of(chunks)
            kinds = tuple(self._kind(self.chunks[chunk]) for chunk in chunks)
            borrowed = borrowed_calls(reference, layout, float(self.t.flatten()[0]))
            parts.append(Part(reference, rows, kinds, tuple(places), content, calls, *borrowed))
        if not parts:
            return self._execute(self.x, self.t, self.conditions, self.control, self.options), True
        shape = tuple(self.x.shape[2:])
        sharing = Sharing(
            layout, parts, self.rows, shape, shape == self.run_state.shape[2:], self._progress(), self.previous, self.run_state.memo
        )
        return self._run_rows(added, sharing), sharing.count == len(layout.calls) and not sharing.strayed

    def _chunks_of(self, reference: Reference) -> tuple[int, ...]:
        """Positions of the chunks of the batch that a reference acts on."""
        if reference.row_style is None:
            return tuple(range(len(self.chunks)))
        return tuple(i for i, chunk in enumerate(self.chunks) if self.plan is not None and self.plan[chunk][0] == reference.row_style)

    def _kind(self, chunk: int) -> int:
        return chunk if self.plan is None else self.plan[chunk][1]

    def _run_rows(self, added: "_Added", sharing: Sharing) -> Tensor:
        sigma = self.t.flatten()[0]
        batches, conditions = [self.x], []
        for (source, seed, chunks), place in added.places.items():
            source = added.sources[source]
            latent = source.at(sigma.to(self.x), self._noise(seed), self.model.model_sampling).to(self.x)
            batches.append(latent.repeat(len(chunks) * self.samples // latent.shape[0], *[1] * (latent.ndim - 1)))
            if source.conditioning is not None:
                own = self.run_state.memo(
                    ("conditions", id(source), tuple(self.x.shape)), lambda: condition_rows(self.model, source.conditioning, self.x[:1])
                )
                conditions.append((place, own))
        longer = {name: lengthen(value, self.rows, added.copied) for name, value in self.conditions.items()}
        uuids = list(self.options.get("uuids") or [])
        options = {
            **self.options,
            SLOT: sharing,
            "cond_or_uncond": self.chunks + [self.chunks[chunk] for chunk in added.chunks],
            "uuids": uuids + [uuids[chunk] for chunk in added.chunks] if uuids else uuids,
        }
        out = self._execute(
            torch.cat(batches), lengthen(self.t, self.rows, added.copied), own_conditions(longer, self.rows, conditions),
            without_control(self.control, self.rows, len(added.copied)), options,
        )
        return out[: self.rows]

    def _find_layout(self, family: str) -> Layout:
        """From a small part of the latent where that tells, which costs next to nothing, else from all of it."""
        shape = tuple(self.x.shape[2:])
        small = small_shape(shape)
        if small is not None:
            try:
                found = self._probed(self.x[..., : small[-2], : small[-1]], family, alone=True).grown(small, shape)
            except Exception:  # a network, or what others put into it, that wants this size; the look at the whole says what else is wrong
                found = None
            if found is not None:
                self.run_state.expected.add(self._signature())
                return found
        return self._probed(self.x, family)

    def _probed(self, x: Tensor, family: str, alone: bool = False) -> Layout:
        """The layout of a latent: the first sample's row runs beside one with other noise; what comes out is thrown away.

        alone: without the wrappers of others, which may keep what they see for the next step.
        """
        x = x[:1]
        other = seeded_noise(tuple(x.shape[1:]), 1).to(x) * self.t.flatten()[0].clamp_min(1.0)
        probe = Probe(1, self.previous)
        sides = self.x.shape[-2:], x.shape[-2:]
        conditions = {name: _cropped(_first_rows(value, self.rows, 1), *sides) for name, value in self.conditions.items()}
        options = {
            **self.options, SLOT: probe, "cond_or_uncond": self.chunks[:1] * 2, "uuids": list(self.options.get("uuids") or [])[:1] * 2,
        }
        execute = self.executor
        if alone:
            execute = self.executor.original
            options["wrappers"] = {}
        self._execute(
            torch.cat([x, other]), lengthen(self.t[:1], 1, [0]), {name: lengthen(value, 1, [0]) for name, value in conditions.items()},
            None, options, execute,
        )
        layout = probe.layout
        if not layout.numbers:
            raise ValueError(
                f"{family}: Style Reference cannot reach this model. Its attention does not go through ComfyUI's "
                f"optimized_attention_override ({len(layout.calls)} calls seen, none about the picture). "
                "It works on U-Nets and on transformers such as Flux, SD3, Qwen-Image, Z-Image, Chroma and Wan."
            )
        self.run_state.tell("%s has %d attention layers about the picture.", family, len(layout.numbers))
        return layout

    def _execute(
        self, x: Tensor, t: Tensor, conditions: dict, control: Any, options: dict, execute: Callable[..., Tensor] | None = None
    ) -> Tensor:
        conditions = dict(conditions)
        return (execute or self.executor)(x, t, conditions.pop("c_concat"), conditions.pop("c_crossattn"), control, options, **conditions)

    def _signature(self) -> tuple:
        """What the layout depends on: the latent's size, the sizes of all conditions, and which attention others replace:
        guidance's extra passes replace some that the run's own pass asks for."""
        replaced = tuple(
            (kind, slot, owner_of(patch)) for kind, slots in sorted(self.options.get("patches_replace", {}).items()) for slot, patch in slots.items()
        )
        return tuple(self.x.shape[1:]), tuple((name, _shapes(value)) for name, value in sorted(self.conditions.items())), replaced

    def _progress(self) -> float:
        sigmas = self.options.get("sample_sigmas")
        return 0.0 if sigmas is None else sampling_progress(float(self.t.flatten()[0]), sigmas.tolist())

    def _noise(self, seed: int) -> Tensor:
        shape = tuple(self.x.shape[1:])
        return self.run_state.memo(("noise", seed, shape), lambda: seeded_noise(shape, seed).to(self.x))


class _Added:
    """The rows that references add to a forward of `rows` rows, `samples` to a chunk; one block for each source."""

    def __init__(self, rows: int, samples: int):
        self._rows, self._samples = rows, samples
        self.sources: dict[int, Source] = {}
        self.places: dict[tuple[int, int, tuple[int, ...]], slice] = {}  # by source, noise seed and the chunks it stands beside
        self.chunks: list[int] = []
        self.copied: list[int] = []  # the sample's row whose conditions each added row takes

    def rows_of(self, chunks: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(chunk * self._samples + sample for chunk in chunks for sample in range(self._samples))

    def place(self, source: Source, seed: int, chunks: tuple[int, ...]) -> slice:
        """Where the rows of a source stand in the longer batch."""
        key = id(source), seed, chunks
        if key not in self.places:
            first = self._rows + len(self.copied)
            self.sources[id(source)] = source
            self.chunks.extend(chunks)
            self.copied.extend(self.rows_of(chunks))
            self.places[key] = slice(first, self._rows + len(self.copied))
        return self.places[key]


def borrowed_calls(reference: Reference, layout: Layout, sigma: float) -> tuple[frozenset[int], frozenset[int]]:
    """Indices of the calls where the content's queries and keys are borrowed, and of those where its outputs are."""
    if reference.borrow is None:
        return frozenset(), frozenset()
    numbers = layout.numbers
    attention, features = reference.borrow.layers(sigma, len(numbers))
    _require_layers(reference, attention | features, len(numbers))
    return tuple(frozenset(index for index, number in numbers.items() if number in chosen) for chosen in (attention, features))


def chosen_calls(reference: Reference, layout: Layout, sigma: float = 0.0) -> frozenset[int]:
    """Indices of the attention calls that `reference` acts in. Raises ValueError for layers that the model lacks."""
    numbers = layout.numbers
    if reference.borrow is not None:
        return frozenset().union(*borrowed_calls(reference, layout, sigma))
    if reference.places is not None:
        return frozenset(index for index in numbers if layout.calls[index].place in reference.places)
    if reference.layers is None:
        return frozenset(index for index, number in numbers.items() if 3 * number >= len(numbers))
    _require_layers(reference, reference.layers, len(numbers))
    return frozenset(index for index, number in numbers.items() if number in reference.layers)


def _require_layers(reference: Reference, layers: frozenset[int], count: int) -> None:
    missing = [number for number in layers if number >= count]
    if missing:
        raise ValueError(f"layers: {reference.family} has {count} attention layers about the picture, 0-{count - 1}; got {max(missing)}.")


def _first_rows(value: Any, rows: int, wanted: int) -> Any:
    if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == rows:
        return value[:wanted]
    if isinstance(value, list):
        return [_first_rows(part, rows, wanted) for part in value]
    return value


def _shapes(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape[1:])
    if isinstance(value, list):
        return tuple(_shapes(part) for part in value)
    return None


def _cropped(value: Any, sides: tuple[int, ...], wanted: tuple[int, ...]) -> Any:
    """A condition that lies over a picture of `sides` (H, W), as a mask or a second latent does, cut to its first `wanted`."""
    if isinstance(value, torch.Tensor) and value.ndim > 3 and value.shape[-2:] == sides:
        return value[..., : wanted[0], : wanted[1]]
    return value
