"""DDIM inversion and reconstruction through ComfyUI's own guider and sampler machinery."""

from __future__ import annotations

import logging
from typing import Any, Callable, Hashable, Protocol

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher

from ...algorithms.inversion import SCHEMES, Landing, Leg, Predict
from ...sockets import Trajectory
from ..checks import is_finite, unlike_shapes_told
from ..networks.conditioning import inversion_conditioning
from ..networks.content import digest
from ..networks.fingerprint import fingerprint
from ..networks.marks import require_plain
from ..networks.neighbours import plain_pass
from .clean_level import SAME, clean_sigma, input_scale
from .found_again import RESULTS
from .noise import InvertedNoise

Walk = Callable[[Predict, torch.Tensor, Callable], torch.Tensor]
"""(predict, x (B, C, ...) in model space, report(i, x, denoised)) -> x."""

DEFAULT_SCHEME = "predicted"
TOLERANCE = 1e-4


class Witness(Protocol):
    """Sees an inversion's evaluations as they happen."""

    def begin(self, model: ModelPatcher, start: Trajectory) -> None:
        """Puts its patches on `model` (a clone); `start` has the schedule and, as its only latents, the clean ones."""

    def at(self, step: int) -> None:
        """The next evaluation is about this step of the trajectory; 0: about none."""

    def missing(self) -> list[int]:
        """Steps that no evaluation was about yet."""

    def recall(self, key: Hashable, model: ModelPatcher) -> bool:
        """Takes what was kept when the inversion of this key was seen before; False where it must be seen again."""

    def keep(self, key: Hashable | None, model: ModelPatcher) -> None:
        """The inversion is done: what was seen is whole, and is kept under its key."""


def walk_latent(model: ModelPatcher, samples: torch.Tensor, conditioning: list, sigmas: torch.Tensor, walk: Walk) -> torch.Tensor:
    """Runs `walk` inside a real sampling of `model` without guidance, so that loading, offloading, wrappers,
    previews, progress and Cancel are ComfyUI's own. `samples` is a LATENT's (B, C, ...); returns the like.

    `report(i, x, denoised)` moves the progress bar and preview; predictions check for Cancel by themselves.
    """
    guider = comfy.samplers.CFGGuider(plain_pass(model))
    guider.inner_set_conds({"positive": conditioning})
    guider.set_cfg(1.0)

    def sampler_function(model_wrap, x, sigmas, extra_args=None, callback=None, disable=None):
        def predict(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            comfy.model_management.throw_exception_if_processing_interrupted()
            return model_wrap(x, sigma * x.new_ones([x.shape[0]]), **extra_args)

        def report(i: int, x: torch.Tensor, denoised: torch.Tensor) -> None:
            if callback is not None:
                callback({"i": i, "x": x, "denoised": denoised, "sigma": sigmas[i], "sigma_hat": sigmas[i]})

        # Flow models rescale the latent at the first sigma; starting from the given one keeps every model alike.
        return walk(predict, x, report)

    with unlike_shapes_told("positive"):
        return guider.sample(
            torch.zeros_like(samples),
            samples,
            comfy.samplers.KSAMPLER(sampler_function),
            sigmas,
            callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
            disable_pbar=True,
            seed=0,
        )


def check_schedule(sigmas: torch.Tensor) -> torch.Tensor:
    """Validates a sampling schedule (descending, ends in 0) and returns it ascending as float32 on the CPU."""
    values = sigmas.detach().float().cpu()
    shown = [round(float(sigma), 3) for sigma in values.flatten()[:4]]
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"sigmas: need at least one step, got shape {tuple(values.shape)}. Connect a Basic Scheduler.")
    if not bool(torch.isfinite(values).all()) or not bool((values[:-1] > values[1:]).all()):
        raise ValueError(
            f"sigmas: the sampling schedule must descend at every step, got {shown} ... {float(values[-1]):.3f}. "
            "Connect the SIGMAS that the sampler gets, not flipped ones."
        )
    if values[-1] != 0:
        raise ValueError(
            f"sigmas: inversion starts from the clean latent, so the schedule must end in 0, got {float(values[-1]):.4f}. "
            "Connect the whole schedule (denoise below 1 is fine, a split schedule's high part is not)."
        )
    return values.flip(0)


def check_latent(latent: dict, what: str = "latent") -> torch.Tensor:
    """A LATENT's samples, (B, C, H, W) or (B, C, T, H, W); ValueError for other shapes and for NaN."""
    samples = latent["samples"]
    if samples.is_nested or samples.ndim not in (4, 5):
        shape = "several latents of different kinds" if samples.is_nested else tuple(samples.shape)
        raise ValueError(f"{what}: expected a latent (B, C, H, W) or (B, C, T, H, W), got {shape}.")
    if not bool(torch.isfinite(samples).all()):
        raise ValueError(
            f"{what}: holds NaN or infinite values. The usual cause is a VAE in half precision: "
            "use a fp16-fixed VAE or start ComfyUI with --fp32-vae."
        )
    return samples


def require_channels(model: ModelPatcher, samples: torch.Tensor, name: str) -> None:
    """Raises ValueError for a latent of another kind of model; empty ones get the right channels from core."""
    wanted = model.get_model_object("latent_format").latent_channels
    if samples.shape[1] != wanted and bool(samples.any()):
        raise ValueError(
            f"{name}: got {samples.shape[1]} channels, but {type(model.model).__name__} works on latents of {wanted}. "
            "Encode the image with the VAE of this model."
        )


def invert(
    model: ModelPatcher,
    latent: dict,
    sigmas: torch.Tensor,
    positive: list | None = None,
    scheme: str = DEFAULT_SCHEME,
    iterations: int = 5,
    substeps: int = 1,
    tolerance: float = TOLERANCE,
    witness: Witness | None = None,
    clean_level: str = "sigma 0",
    remember: bool = True,
) -> tuple[dict, Trajectory]:
    """DDIM inversion of a LATENT along a sampling schedule.

    sigmas: (S + 1,) descending to 0. substeps: forward steps per sampling step; only the schedule's own
    levels are kept (the papers' 1000-step inversion with 50 kept is 50 sigmas and 20 substeps).
    tolerance: residual over |x'| at which `fixed_point` stops, at the latest after `iterations`.
    witness: sees every evaluation; levels that the scheme did not ask about are evaluated once more for it.
    clean_level: the noise level that the latent counts as, see CLEAN_LEVELS; where the schedule's last level is that
    one, the first step is none. The trajectory keeps the latent as it was given, at sigma 0.
    remember: False for what will hardly be asked for again and would push other results out, as a film's frames.
    Returns the LATENT at sigmas[0] (see `noise_latent`) and the Trajectory, found again where the same was inverted
    before (see found_again.py). Raises ValueError on bad schedules and latents, and for a MODEL with an injection.
    """
    if scheme not in SCHEMES:
        raise ValueError(f'scheme: got "{scheme}", choose among {", ".join(SCHEMES)}.')
    require_plain(model, "would change the inversion")
    ascending = check_schedule(sigmas)
    samples = check_latent(latent)
    require_channels(model, samples, "latent")
    samples = comfy.sample.fix_empty_latent_channels(model, samples)
    conditioning = inversion_conditioning(model, positive)
    sampling = model.get_model_object("model_sampling")
    start = torch.tensor(clean_sigma(sampling, clean_level))
    path, keep = _refine(sampling, ascending, substeps, start)
    steps, made_by = len(path) - 1, fingerprint(model)
    key = None
    if remember and RESULTS.limit:
        key = digest("inversion", model, samples, ascending, conditioning, scheme, iterations, substeps, float(tolerance), clean_level)
    found = _found_again(key, model, samples, steps, witness)
    if found is not None:
        latents, notes = found
        notes.tell(steps)
        trajectory = Trajectory(ascending, latents.clone(), conditioning, scheme, made_by)
        return inverted_latent(model, latent, trajectory), trajectory
    given = model
    kept: list[torch.Tensor] = []
    notes = _Notes(tolerance)
    if witness is not None:
        model = model.clone()
        witness.begin(model, Trajectory(ascending, samples.unsqueeze(0), conditioning, scheme, made_by))

    def walk(predict: Predict, x: torch.Tensor, report: Callable) -> torch.Tensor:
        levels, eps = path.to(x.device), None
        kept.append(x.float().cpu())
        x = x / input_scale(sampling, levels[0]) if start > 0 else x
        if witness is not None:
            predict = _witnessed(predict, ascending, witness)
        for i in range(len(levels) - 1):
            if levels[i + 1] <= levels[i] * (1 + SAME):  # the clean latent is one of this level
                kept.append(x.float().cpu())
                continue
            leg = Leg(
                levels[i], levels[i + 1], eps, sampling.sigma_min.to(x), lambda sigma: input_scale(sampling, sigma), iterations, tolerance
            )
            landing = SCHEMES[scheme](predict, x, leg)
            x, eps = landing.x, landing.eps
            if not is_finite(x):
                raise ValueError(
                    f"model: it predicts NaN at sigma {float(path[i + 1]):.3f}. Start ComfyUI with --force-fp32 or --bf16-unet; if it stays "
                    "so, the model's file, or a patch on it, is broken."
                )
            notes.take(landing, float(path[i + 1]))
            if keep[i + 1]:
                kept.append(x.float().cpu())
                if witness is not None and not landing.settled:
                    predict(x, levels[i + 1])  # the last evaluation was not at the iterate that was kept
            report(i, x, landing.denoised)
        if witness is not None:
            for step in witness.missing():
                predict(kept[step].to(x), ascending[step].to(x))
        return x

    walk_latent(model, samples, conditioning, torch.cat([ascending[:1], path[1:]]), walk)  # flow models rescale above sigma 0
    notes.tell(steps)
    trajectory = Trajectory(ascending, torch.stack(kept), conditioning, scheme, made_by)
    if key is not None and RESULTS.takes(trajectory.latents.nbytes):
        RESULTS.keep(key, given.model, (trajectory.latents.clone(), notes), trajectory.latents.nbytes)
    if witness is not None:
        witness.keep(key, given)
    return inverted_latent(given, latent, trajectory), trajectory


def _found_again(
    key: Hashable | None, model: ModelPatcher, samples: torch.Tensor, steps: int, witness: Witness | None
) -> tuple[torch.Tensor, "_Notes"] | None:
    """The latents and notes of the same inversion, if all of it is still there: what a witness is to see, too."""
    found = RESULTS.find(key)
    if found is None or (witness is not None and not witness.recall(key, model)):
        return None
    comfy.model_management.throw_exception_if_processing_interrupted()
    count, size = samples.shape[0], "x".join(map(str, samples.shape[:1:-1]))
    logging.info(
        "Pastiche: found again: the inversion of %d latent%s of %s in %d steps%s.", count, "" if count == 1 else "s", size, steps,
        "" if witness is None else ", with its features",
    )
    comfy.utils.ProgressBar(steps).update_absolute(steps, steps)
    return found


def _witnessed(predict: Predict, ascending: torch.Tensor, witness: Witness) -> Predict:
    """`predict` that tells first which step of the trajectory it is asked about, 0 for levels between."""
    steps = {sigma: step for step, sigma in enumerate(ascending.tolist())}

    def asked(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        witness.at(steps.get(float(sigma), 0))
        return predict(x, sigma)

    return asked


class _Notes:
    """What the log says about the fixed-point iteration: once an inversion."""

    def __init__(self, tolerance: float):
        self._tolerance = tolerance
        self._diverged: list[float] = []
        self._short: list[float] = []
        self._worst = 0.0

    def take(self, landing: Landing, sigma: float) -> None:
        if landing.residual is None:
            return
        if bool(landing.diverged.any()):
            self._diverged.append(sigma)
        if not bool((landing.residual <= self._tolerance).all()):
            self._short.append(sigma)
            self._worst = max(self._worst, float(landing.residual.max()))

    def tell(self, steps: int) -> None:
        if self._diverged:
            logging.warning(
                "Pastiche: the fixed-point inversion diverged at %d of %d steps (first at sigma %.3f) and kept its best "
                "iterate there. More steps or no guidance make it converge.",
                len(self._diverged), steps, self._diverged[0],
            )
        if self._short:
            logging.info(
                "Pastiche: the fixed-point inversion stopped above its tolerance (%.1e) at %d of %d steps; the largest "
                "residual is %.1e.", self._tolerance, len(self._short), steps, self._worst,
            )


def inverted_latent(model: ModelPatcher, latent: dict, trajectory: Trajectory) -> dict:
    """The LATENT that `latent` was inverted to: without its noise mask."""
    out = {name: value for name, value in latent.items() if not name.startswith(("noise_mask", "downscale_ratio"))}
    return out | {"samples": noise_latent(model, trajectory)}


def noise_latent(model: ModelPatcher, trajectory: Trajectory) -> torch.Tensor:
    """The trajectory's last latent as a LATENT's samples: (B, C, ...), what the sampler continues from."""
    return inverted_noise(model, trajectory).as_latent()


def inverted_noise(model: ModelPatcher, trajectory: Trajectory) -> InvertedNoise:
    """The trajectory's last latent as NOISE."""
    return InvertedNoise(model, trajectory.schedule, trajectory.latents[-1])


def reconstruct(model: ModelPatcher, trajectory: Trajectory, sampler: comfy.samplers.Sampler | None = None) -> torch.Tensor:
    """Samples the trajectory back as SamplerCustomAdvanced would: NOISE, an empty latent, no guidance; None is euler.

    Returns the (B, C, ...) clean latent in LATENT space, float32 on the CPU.
    """
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": trajectory.conditioning})
    guider.set_cfg(1.0)
    latent = torch.zeros_like(trajectory.latents[-1])
    return guider.sample(
        inverted_noise(model, trajectory).generate_noise({"samples": latent}),
        latent,
        sampler or comfy.samplers.sampler_object("euler"),
        trajectory.schedule,
        callback=latent_preview.prepare_callback(model, trajectory.steps),
        disable_pbar=True,
        seed=0,
    ).float().cpu()


def _refine(sampling: Any, ascending: torch.Tensor, substeps: int, start: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
    """The levels of an inversion that leaves from sigma `start`, and which of them are the schedule's own.

    `substeps` - 1 levels are put between neighbours, evenly in the model's timestep.
    """
    if start > ascending[1] * (1 + SAME):
        raise ValueError(
            f"clean_level: the latent would count as one of sigma {float(start):.4f}, above the schedule's last level "
            f"{float(ascending[1]):.4f}. Choose a lower one, or fewer steps."
        )
    ascending = torch.cat([start.view(1).to(ascending), ascending[1:]])
    if substeps <= 1:
        return ascending, [True] * len(ascending)
    levels, keep = [ascending[:1]], [True]
    for low, high in zip(ascending[:-1], ascending[1:]):
        begin, end = (float(sampling.timestep(sigma.view(1))) for sigma in (low.clamp_min(sampling.sigma_min), high))
        count = substeps if start == 0 else max(1, min(substeps, round(end - begin)))  # no steps within one of the model's
        if begin < end:
            inner = sampling.sigma(torch.linspace(begin, end, count + 1)[1:])
        else:  # from the clean latent to the model's smallest sigma there is no timestep between
            inner = torch.linspace(float(low), float(high), count + 1)[1:]
        levels.append(torch.cat([inner[:-1].float(), high.view(1)]))
        keep += [False] * (count - 1) + [True]
    refined = torch.cat(levels)
    rises = refined[1:] > refined[:-1]
    if not bool(rises[1:].all()) or not (bool(rises[0]) or start > 0):
        raise ValueError(
            f"substeps: {substeps} forward steps per sampling step do not fit between the schedule's levels "
            f"({len(ascending) - 1} steps of a model with 1000 timesteps); use at most {1000 // (len(ascending) - 1)}."
        )
    return refined, keep
