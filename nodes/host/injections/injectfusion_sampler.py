"""InjectFusion's sampler: DDIM that knows two predictions of a step, with and without h-space injection."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from tqdm.auto import trange

from ...algorithms.injectfusion import asymmetric_step, calibrate
from ..networks.neighbours import reads_whole_batch
from .hspace import INJECT, HSpacePatches, due_injections, installed, sigma_of_timestep
from .run import SamplingRun, current_run

SCALED_FROM = 950  # timestep from which dt_lambda scales the direction
SEED_OFFSET = 0x1F0C5EED  # keeps the boost's noise apart from a RandomNoise of the same seed


def injectfusion_sampler(omega: float, t_boost: float, seed: int, dt_lambda: float = 1.0) -> comfy.samplers.KSAMPLER:
    """SAMPLER of the paper's reverse process. Without an h-space Slerp on the MODEL it is core's `ddim` exactly."""
    options = {"omega": omega, "t_boost": t_boost, "boost_seed": seed, "dt_lambda": dt_lambda}
    return comfy.samplers.KSAMPLER(sample_injectfusion, options)


@torch.no_grad()
def sample_injectfusion(
    model, x, sigmas, extra_args=None, callback=None, disable=None, *,
    omega: float = 0.3, t_boost: float = 200, boost_seed: int = 0, dt_lambda: float = 1.0,
):
    """x: (B, C, H, W) at sigmas[0]; sigmas: (S + 1,) descending. Signature of k-diffusion's samplers.

    While an h-space Slerp is due: omega > 0 calibrates the latent and steps from there without injection,
    omega 0 takes the asymmetric step, whose direction dt_lambda scales at timesteps >= 950 (the authors' code, too,
    leaves it out after a calibration). On models with one, steps at timesteps <= t_boost are stochastic (eta 1), row i
    of the batch with noise of `boost_seed` + i.
    """
    extra_args = dict(extra_args or {})
    model_options = extra_args.pop("model_options", {})
    sampling = model.inner_model.inner_model.model_sampling
    patched = bool(installed(model_options.get("transformer_options", {})))
    boosts = patched and not isinstance(sampling, comfy.model_sampling.CONST)
    boosted_to = sigma_of_timestep(sampling, t_boost) * (1 + 1e-5) if boosts else 0.0
    scaled_from = sigma_of_timestep(sampling, SCALED_FROM) * (1 - 1e-5)
    noise = RowNoise(boost_seed, x.shape[0])
    if patched and dt_lambda != 1 and omega > 0:
        logging.info("Pastiche: dt_lambda %s has no effect with omega %s, as in the paper's code; it belongs to omega 0.", dt_lambda, omega)
    plain_options = _with(model_options, {INJECT: False}) if patched else model_options

    def predict(x, sigma, options):
        return model(x, sigma * x.new_ones([x.shape[0]]), model_options=options, **extra_args)

    for i in trange(len(sigmas) - 1, disable=disable):
        comfy.model_management.throw_exception_if_processing_interrupted()
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        due = due_injections(model_options["transformer_options"], sigma) if patched else []
        scale = dt_lambda if due and omega == 0 and sigma >= scaled_from else 1.0
        if due:
            pair = PredictionPair(due, current_run(model_options["transformer_options"]))
            clean = predict(x, sigma, pair.first(model_options))
            injected = predict(x, sigma, pair.second(model_options))
            if omega > 0:
                x = calibrate(x, clean, injected, omega)
                clean = injected = predict(x, sigma, plain_options)
        else:
            clean = injected = predict(x, sigma, plain_options)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": injected})
        stochastic = sigma <= boosted_to and sigma_next > 0
        x = asymmetric_step(x, clean, injected, sigma, sigma_next, scale, noise.like(x) if stochastic else None)
    return x


class RowNoise:
    """Standard normal noise in which row i depends on seed + i and the draw only: a batch equals single runs."""

    def __init__(self, seed: int, rows: int):
        self._generators = [torch.Generator().manual_seed((seed + row + SEED_OFFSET) % 2**63) for row in range(rows)]

    def like(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.randn(x.shape[1:], generator=generator) for generator in self._generators]).to(x)


class PredictionPair:
    """Makes two predictions of one step in one batch, through whatever guider, CFG functions and masks there are.

    `first` options make core's calc_cond_batch evaluate the conditions that inject a second time, marked by
    condition numbers past the real ones; core packs them into one batch as memory allows. Their outputs wait here
    until the same latent is asked for again with the `second` options, which hand them out instead of running the
    model. Everything behind calc_cond_batch thus sees two ordinary predictions; wrappers nearer to the model (the
    Multi-Style Guider's) see one more condition. Where a patch of another node may look at the whole batch, it would
    be told condition numbers that it does not know: there the second prediction is a run of its own.
    """

    def __init__(self, injections: list[HSpacePatches], run: SamplingRun):
        self._run = run
        self._both = any(injection.branch == "both" for injection in injections)
        self._waiting: list[tuple] = []

    def first(self, model_options: dict) -> dict:
        if reads_whole_batch(model_options):
            return _with(model_options, {INJECT: False})
        return _with(model_options, {INJECT: False}, {WrappersMP.CALC_COND_BATCH: self._double}, outermost=True)

    def second(self, model_options: dict) -> dict:
        return _with(model_options, {}, {WrappersMP.CALC_COND_BATCH: self._hand_out}, outermost=True)

    def _double(self, executor, model, conds, x, timestep, model_options):
        if reads_whole_batch(model_options):  # a pass of another node's, with its own patches
            return executor(model, conds, x, timestep, model_options)
        count = len(conds)
        again = [i for i, cond in enumerate(conds) if cond is not None and (self._both or self._conditional(cond, i))]
        sources = [*range(count), *again]

        def mark(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
            numbers = transformer_options["cond_or_uncond"]
            marked = {
                **transformer_options,
                "cond_or_uncond": [sources[number] for number in numbers],
                INJECT: tuple(number >= count for number in numbers),
            }
            return executor(x, t, c_concat, c_crossattn, control, marked, **kwargs)

        marking = _with(model_options, {}, {WrappersMP.APPLY_MODEL: mark}, outermost=True)
        outputs = executor(model, [*conds, *(conds[i] for i in again)], x, timestep, marking)
        injected = [output.clone() for output in outputs[:count]]
        for i, output in zip(again, outputs[count:]):
            injected[i] = output
        self._waiting.append((_signature(conds), x.clone(), injected))
        return outputs[:count]

    def _conditional(self, cond: list[dict], number: int) -> bool:
        return any(self._run.conditional(part.get("uuid"), number) for part in cond)

    def _hand_out(self, executor, model, conds, x, timestep, model_options):
        if not reads_whole_batch(model_options):
            for number, (asked, latent, injected) in enumerate(self._waiting):
                if asked == _signature(conds) and torch.equal(latent, x):
                    del self._waiting[number]
                    return injected
        return executor(model, conds, x, timestep, model_options)


def _signature(conds: list) -> tuple:
    """Which conditions are asked for: the ids that core gives every condition."""
    return tuple(None if cond is None else tuple(entry.get("uuid") for entry in cond) for cond in conds)


def _with(model_options: dict, transformer_options: dict, wrappers: dict | None = None, outermost: bool = False) -> dict:
    """A copy of model_options with more transformer_options and wrappers (type -> function)."""
    options = comfy.model_patcher.create_model_options_clone(model_options)
    inner = options.setdefault("transformer_options", {})
    inner.update(transformer_options)
    known = inner.setdefault("wrappers", {})
    for kind, wrapper in (wrappers or {}).items():
        ours = {"pastiche_injectfusion": [wrapper]}
        known[kind] = {**ours, **known.get(kind, {})} if outermost else {**known.get(kind, {}), **ours}
    return options
