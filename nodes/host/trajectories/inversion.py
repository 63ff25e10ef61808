"""DDIM inversion and reconstruction through ComfyUI's own guider and sampler machinery."""

from __future__ import annotations

import logging
from typing import Any, Callable

import comfy.model_management
import comfy.sample
import comfy.samplers
import latent_preview
import torch

from ...algorithms.inversion import SCHEMES, Predict, ddim_step, step_current, step_fixed_point
from ...sockets import Trajectory
from ..networks.conditioning import inversion_conditioning
from ..networks.fingerprint import fingerprint

Walk = Callable[[Predict, torch.Tensor, Callable], torch.Tensor]
"""(predict, x (B, C, H, W) in model space, report(i, x, denoised)) -> x."""


def walk_latent(model: Any, samples: torch.Tensor, conditioning: list, sigmas: torch.Tensor, walk: Walk) -> torch.Tensor:
    """Runs `walk` inside a real sampling of `model` without guidance, so that loading, offloading, wrappers,
    previews, progress and Cancel are ComfyUI's own. `samples` is a LATENT's (B, C, H, W); returns the like.

    `report(i, x, denoised)` moves the progress bar and preview; predictions check for Cancel by themselves.
    """
    guider = comfy.samplers.CFGGuider(model)
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
    shown = [round(float(sigma), 3) for sigma in values[:4]]
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
    samples = latent["samples"]
    if samples.is_nested or samples.ndim != 4:
        raise ValueError(f"{what}: expected an image latent (B, C, H, W), got {tuple(samples.shape)}.")
    if not bool(torch.isfinite(samples).all()):
        raise ValueError(
            f"{what}: holds NaN or infinite values. The usual cause is a VAE in half precision: "
            "use a fp16-fixed VAE or start ComfyUI with --fp32-vae."
        )
    return samples


def invert(
    model: Any,
    latent: dict,
    sigmas: torch.Tensor,
    positive: list | None = None,
    scheme: str = "fixed_point",
    iterations: int = 5,
    substeps: int = 1,
) -> tuple[dict, Trajectory]:
    """DDIM inversion of a LATENT along a sampling schedule.

    sigmas: (S + 1,) descending to 0. substeps: forward steps per sampling step; only the schedule's own
    levels are kept (the papers' 1000-step inversion with 50 kept is 50 sigmas and 20 substeps).
    Returns the LATENT at sigmas[0] and the Trajectory. Raises ValueError on bad schedules and latents.
    """
    if scheme not in SCHEMES:
        raise ValueError(f'scheme: got "{scheme}", choose among {", ".join(SCHEMES)}.')
    ascending = check_schedule(sigmas)
    samples = check_latent(latent)
    samples = comfy.sample.fix_empty_latent_channels(model, samples)
    conditioning = inversion_conditioning(model, positive)
    path = _refine(model, ascending, substeps)
    kept: list[torch.Tensor] = []
    strays: list[int] = []

    def walk(predict: Predict, x: torch.Tensor, report: Callable) -> torch.Tensor:
        levels = path.to(x.device)
        sampling = model.get_model_object("model_sampling")
        smallest = sampling.sigma_min.to(x)
        kept.append(x.float().cpu())
        for i in range(len(levels) - 1):
            sigma, sigma_next = levels[i], levels[i + 1]
            if scheme == "current":
                x, denoised = step_current(predict, x, torch.maximum(sigma, smallest), sigma_next)
            else:
                x, denoised, diverged = step_fixed_point(
                    predict, x, sigma, sigma_next, iterations if scheme == "fixed_point" else 0,
                    _input_scale(sampling, sigma) / _input_scale(sampling, sigma_next),
                )
                if bool(diverged.any()):
                    strays.append(i)
            if (i + 1) % substeps == 0:
                kept.append(x.float().cpu())
            report(i, x, denoised)
        return x

    walk_latent(model, samples, conditioning, path, walk)
    if strays:
        logging.warning(
            "Pastiche: the fixed-point inversion diverged at %d of %d steps (first at sigma %.3f) and kept its best "
            "iterate there. More steps or no guidance make it converge.",
            len(strays), len(path) - 1, float(path[strays[0] + 1]),
        )
    trajectory = Trajectory(ascending, torch.stack(kept), conditioning, scheme, fingerprint(model))
    out = {name: value for name, value in latent.items() if name not in ("noise_mask", "downscale_ratio_spacial")}
    out["samples"] = noise_latent(model, trajectory)
    return out, trajectory


def noise_latent(model: Any, trajectory: Trajectory) -> torch.Tensor:
    """The trajectory's last latent as a LATENT's samples: (B, C, H, W), what the sampler continues from."""
    samples = model.model.process_latent_out(trajectory.latents[-1])
    return samples.to(comfy.model_management.intermediate_device())


def reconstruct(model: Any, trajectory: Trajectory) -> torch.Tensor:
    """Samples the trajectory back with plain DDIM steps; (B, C, H, W) clean latent in LATENT space, float32 CPU."""
    levels = trajectory.schedule

    def walk(predict: Predict, x: torch.Tensor, report: Callable) -> torch.Tensor:
        sigmas = levels.to(x.device)
        x = trajectory.latents[-1].to(x)
        for i in range(len(sigmas) - 1):
            denoised = predict(x, sigmas[i])
            x = ddim_step(x, denoised, sigmas[i], sigmas[i + 1])
            report(i, x, denoised)
        return x

    return walk_latent(model, noise_latent(model, trajectory), trajectory.conditioning, levels, walk).float().cpu()


def _input_scale(model_sampling: Any, sigma: torch.Tensor) -> torch.Tensor:
    """c_in(sigma): what the model multiplies a latent with before its network sees it."""
    return model_sampling.calculate_input(sigma, torch.ones_like(sigma))


def _refine(model: Any, ascending: torch.Tensor, substeps: int) -> torch.Tensor:
    """Puts `substeps` - 1 levels between neighbours, evenly in the model's timestep."""
    if substeps <= 1:
        return ascending
    sampling = model.get_model_object("model_sampling")
    levels = [ascending[:1]]
    for low, high in zip(ascending[:-1], ascending[1:]):
        begin, end = (float(sampling.timestep(sigma.view(1))) for sigma in (low.clamp_min(sampling.sigma_min), high))
        if begin < end:
            inner = sampling.sigma(torch.linspace(begin, end, substeps + 1)[1:])
        else:  # from the clean latent to the model's smallest sigma there is no timestep between
            inner = torch.linspace(float(low), float(high), substeps + 1)[1:]
        levels.append(torch.cat([inner[:-1].float(), high.view(1)]))
    refined = torch.cat(levels)
    if not bool((refined[1:] > refined[:-1]).all()):
        raise ValueError(
            f"substeps: {substeps} forward steps per sampling step do not fit between the schedule's levels "
            f"({len(ascending) - 1} steps of a model with 1000 timesteps); use at most {1000 // (len(ascending) - 1)}."
        )
    return refined
