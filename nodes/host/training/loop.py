"""Trains a style LoRA (DiffStyler, sec. 4) inside a real sampling run of the MODEL it is for.

Loading, offloading, other patches, conditioning and Cancel are ComfyUI's own; the "sampler" is the training loop.
"""

from __future__ import annotations

import logging
import math
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, Callable, Iterator

import comfy.model_management
import comfy.samplers
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...algorithms.inversion import ddim_step
from ...algorithms.training import loss_weight, output_gain, rate_share, signal_to_noise, step_generator, weighted_error
from ..checks import unlike_shapes_told
from ..networks.neighbours import plain_pass
from .adapters import Adapters
from .backward import (
    checkpointed,
    deterministic,
    differentiable,
    kernels_with_gradients,
    norm_weights_kept,
    norms_of_copies,
    recast_in_backward,
)
from .checks import check_conditioning, check_inputs
from .images import TrainingImages
from .state import TrainingState

INITIALISATION, PREVIEW, VALIDATION = -1, -2, -3  # steps of `step_generator` that are no training steps
ACTIVATION_FACTOR = 4  # a training step's memory over an inference step's, for ComfyUI's estimate
PREVIEW_STEPS = 12
VALIDATION_DRAWS = 8
LOSS_WINDOW = 20  # steps whose mean loss is told: one step's depends mostly on its timestep
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("model", *DTYPES)


@dataclass(frozen=True)
class TrainingSettings:
    """alpha 0 means alpha = rank; crop 1 means whole images; min_snr_gamma and clean_weight 0 mean the plain loss."""

    steps: int = 200
    rank: int = 16
    alpha: float = 0.0
    learning_rate: float = 2e-4
    targets: str = "qkv"
    seed: int = 0
    batch_size: int = 1
    flip: bool = False
    crop: float = 1.0
    min_snr_gamma: float = 0.0
    precision: str = "model"
    gradient_checkpointing: bool = False
    keep_on_cancel: bool = False
    preview_every: int = 0
    schedule: str = "constant"
    clean_weight: float = 0.0
    validation_every: int = 0


@dataclass
class TrainedLoRA:
    """lora: standard keys, float32, CPU. note: why training ended early, or "". trouble: what else went wrong, or "".

    validation: (steps done, held-out loss), where it was asked for.
    """

    lora: dict[str, Tensor]
    losses: list[float]
    steps: int
    note: str = ""
    trouble: str = ""
    validation: list[tuple[int, float]] = field(default_factory=list)

    def summary(self) -> str:
        tail = self.losses[-LOSS_WINDOW:]
        done = self.note or f"{self.steps} steps, mean loss of the last {len(tail)}: {sum(tail) / len(tail):.4f}"
        if self.validation:
            done += f", held-out loss {self.validation[0][1]:.4f} to {self.validation[-1][1]:.4f}"
        return f"{done} {self.trouble}".rstrip()


Report = Callable[[int, float, Tensor | None], None]
"""(steps done, loss, preview latent (1, C, H, W) in model space or None)"""


def train_style_lora(
    model: Any,
    images: TrainingImages,
    positive: list,
    settings: TrainingSettings,
    report: Report = lambda step, loss, preview: None,
    state: TrainingState | None = None,
) -> TrainedLoRA:
    """Trains until `settings.steps` steps are done, counting those that `state` brings along; `state` is updated.

    positive: one CONDITIONING entry, or one per image. Raises ValueError for inputs that do not fit, when no
    memory is left at batch 1, and when the first loss is not finite.
    """
    state = state or TrainingState()
    check_inputs(model, positive, images, settings)
    if state.step > settings.steps:
        raise ValueError(
            f"steps: got {settings.steps}, but the checkpoint has done {state.step} already, and steps cannot be taken "
            f"back. Set steps to {state.step} or more, or choose another checkpoint name."
        )
    with torch.inference_mode(False), torch.no_grad():
        patched = plain_pass(model)  # the model's own prediction is trained: guidance (SAG) takes no part in it
        _with_gradients(patched.model_options["transformer_options"])
        patched.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "pastiche", _reserve_activations)
        guider = comfy.samplers.CFGGuider(patched)
        guider.inner_set_conds({"positive": _ordinary(positive)})
        guider.set_cfg(1.0)
        loop = _TrainingLoop(images, settings, report, state)
        blank = torch.zeros(settings.batch_size, *images.shape[1:])
        sampling = patched.get_model_object("model_sampling")
        with unlike_shapes_told("positive"):
            guider.sample(blank, blank, loop, comfy.samplers.calculate_sigmas(sampling, "simple", PREVIEW_STEPS), seed=0)
        return loop.result


def _with_gradients(options: dict) -> None:
    """Attention is PyTorch's own while training: other kernels (sage, sub-quadratic) have no gradient or a slow one."""
    if options.get("optimized_attention_override") is not None:
        logging.info("Pastiche: training leaves out the attention override (optimized_attention_override) on MODEL.")
    options["optimized_attention_override"] = lambda function, *args, **kwargs: attention_pytorch(*args, **kwargs)


def _reserve_activations(executor, model, noise_shape, *args, **kwargs):
    return executor(model, [noise_shape[0] * ACTIVATION_FACTOR, *noise_shape[1:]], *args, **kwargs)


def _ordinary(value: Any) -> Any:
    """A copy of a CONDITIONING whose tensors autograd may save."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, (list, tuple)):
        return [_ordinary(part) for part in value]
    if type(value) is dict:
        return {name: _ordinary(part) for name, part in value.items()}
    return value


class _TrainingLoop(comfy.samplers.Sampler):
    def __init__(self, images: TrainingImages, settings: TrainingSettings, report: Report, state: TrainingState):
        self._images, self._settings, self._report, self._state = images, settings, report, state
        self._micro = settings.batch_size
        self._failed = False
        self.result: TrainedLoRA | None = None

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        settings, state = self._settings, self._state
        self._guider, self._extra_args, self._sigmas = model_wrap, extra_args, sigmas
        self._conds = model_wrap.conds["positive"]
        check_conditioning(self._conds, settings.crop)
        self._model = model = model_wrap.inner_model
        self._device = model_wrap.model_patcher.load_device
        self._adapters = Adapters(
            model.diffusion_model, settings.targets, settings.rank, settings.alpha or settings.rank,
            step_generator(settings.seed, INITIALISATION),
        ).to(self._device)
        parameters = self._adapters.parameters()
        optimizer = torch.optim.AdamW(
            parameters, lr=settings.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2,
            fused=self._device.type in ("cpu", "cuda"),
        )
        scaler = torch.amp.GradScaler(self._device.type, enabled=self._compute_dtype() == torch.float16)
        state.restore(self._adapters, optimizer, scaler)
        state.check(self._adapters)
        note = f"Nothing left to do: the checkpoint has all {state.step} steps." if state.step == settings.steps else ""
        with ExitStack() as self._stack:
            self._stack.enter_context(deterministic(self._device))
            self._stack.enter_context(kernels_with_gradients())
            self._stack.enter_context(differentiable(model))
            self._stack.enter_context(recast_in_backward(model.diffusion_model, settings.precision in DTYPES))
            self._stack.enter_context(norm_weights_kept(model.diffusion_model))
            self._stack.enter_context(norms_of_copies(model.diffusion_model))
            self._stack.enter_context(self._adapters.attached())
            self._checkpointing = settings.gradient_checkpointing
            if self._checkpointing:
                self._stack.enter_context(checkpointed(model.diffusion_model))
            try:
                note = self._train(parameters, optimizer, scaler) or note
            except comfy.model_management.InterruptProcessingException:
                state.save(self._adapters, optimizer, scaler, force=True)
                if not settings.keep_on_cancel or state.step == 0:
                    raise
                note = f"Cancelled after {state.step} of {settings.steps} steps; what was learned so far is kept."
                logging.info("Pastiche: %s", note)
            else:
                if not self._failed:
                    state.save(self._adapters, optimizer, scaler, force=True)
            losses = list(state.losses)
            if len(losses) == 1:  # core's loss graph needs two points: the same draw after the step
                losses.append(self._step(0, None))
        self.result = TrainedLoRA(self._adapters.state_dict(), losses, state.step, note, state.trouble, list(state.validation))
        return latent_image

    def _train(self, parameters: list, optimizer: Any, scaler: Any) -> str:
        """Steps until all are done; why they ended early, or "". Where one ruins the LoRA, the last good one is kept."""
        settings, state = self._settings, self._state
        first = state.step
        good = [parameter.detach().clone() for parameter in parameters]
        if settings.validation_every and not state.validation:
            state.validation.append((first, self._held_out()))
        while state.step < settings.steps:
            comfy.model_management.throw_exception_if_processing_interrupted()
            loss = self._step(state.step, scaler)
            if not math.isfinite(loss):
                return self._ruined(parameters, good, f"The loss became {loss}", state.step)
            torch._foreach_copy_(good, [parameter.data for parameter in parameters])
            if state.step == first:
                self._adapters.report_idle()
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * rate_share(settings.schedule, state.step, settings.steps)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if not _finite(parameters):
                return self._ruined(parameters, good, "The LoRA became NaN", state.step)
            state.advance(loss)
            if settings.validation_every and (state.step % settings.validation_every == 0 or state.step == settings.steps):
                state.validation.append((state.step, self._held_out()))
            due = settings.preview_every and state.step % settings.preview_every == 0
            self._report(state.step, loss, self._preview() if due else None)
            state.save(self._adapters, optimizer, scaler)
        return ""

    def _ruined(self, parameters: list, good: list[Tensor], what: str, step: int) -> str:
        reason = f"{what} at step {step + 1}: {self._cause(step)}"
        for parameter in parameters:
            parameter.grad = None
        if step == 0:
            raise ValueError(reason)
        torch._foreach_copy_([parameter.data for parameter in parameters], good)
        self._failed = True
        logging.warning("Pastiche: %s The weights of the last good step are kept.", reason)
        return reason

    def _step(self, step: int, scaler: Any) -> float:
        """Loss of one training step; leaves its gradients. Where memory runs out, splits the batch and tries again."""
        batch = self._draw(step)
        while True:
            try:
                return self._accumulate(*batch, scaler)
            except Exception as error:
                if not _out_of_memory(error):
                    raise
            for parameter in self._adapters.parameters():
                parameter.grad = None
            comfy.model_management.soft_empty_cache()
            if self._micro > 1:
                self._micro = (self._micro + 1) // 2
                logging.warning("Pastiche: out of memory, going on with %d image(s) at a time.", self._micro)
            elif not self._checkpointing:
                self._checkpointing = True
                self._stack.enter_context(checkpointed(self._model.diffusion_model))
                logging.warning("Pastiche: out of memory, going on with gradient checkpointing.")
            else:
                height, width = self._images.shape[-2:]
                raise ValueError(
                    f"Out of memory training on a {height}x{width} latent, one image at a time with gradient "
                    "checkpointing. Use a smaller image, a crop below 1, or precision bf16."
                )

    def _draw(self, step: int) -> tuple[list[int], Tensor, Tensor, Tensor]:
        """(image numbers, clean latents, sigmas, noise), all from this step's own generator."""
        settings, sampling = self._settings, self._model.model_sampling
        generator = step_generator(settings.seed, step)
        count = len(self._images)
        indices = [(step * settings.batch_size + row) % count for row in range(settings.batch_size)]
        latents = self._images.draw(indices, generator, settings.flip, settings.crop)
        level = (torch.rand(len(indices), generator=generator) * len(sampling.sigmas)).long()
        noise = torch.randn(latents.shape, generator=generator)
        latents = self._model.process_latent_in(latents.to(self._device))
        return indices, latents, sampling.sigmas[level.to(sampling.sigmas.device)].to(latents), noise.to(self._device)

    def _held_out(self) -> float:
        """Mean loss of draws that training never uses, the same for every seed: whole images, evenly spaced levels."""
        generator, sampling = step_generator(0, VALIDATION), self._model.model_sampling
        total = 0.0
        for number in range(VALIDATION_DRAWS):
            indices = [number % len(self._images)]
            latents = self._images.draw(indices, generator, False, 1.0)
            noise = torch.randn(latents.shape, generator=generator).to(self._device)
            level = sampling.sigmas[int((number + 0.5) / VALIDATION_DRAWS * len(sampling.sigmas))]
            latents = self._model.process_latent_in(latents.to(self._device))
            total += self._accumulate(indices, latents, level.reshape(1).to(latents), noise, None)
        return total / VALIDATION_DRAWS

    def _accumulate(self, indices: list[int], latents: Tensor, sigma: Tensor, noise: Tensor, scaler: Any) -> float:
        """Mean loss of a batch. With a scaler its gradients are added up, without one nothing is differentiated."""
        total = 0.0
        for rows in self._micro_batches(indices):
            with torch.set_grad_enabled(scaler is not None):
                losses = self._losses(self._conds_of(indices[rows[0]]), latents[rows], sigma[rows], noise[rows])
                loss = losses.sum() / len(indices)
                if scaler is not None:
                    self._backward(scaler.scale(loss))
            total += float(loss.detach())
        return total

    def _backward(self, loss: Tensor) -> None:
        """Raises ValueError where a patch on MODEL stops the gradient or cannot be differentiated."""
        what = "model: it, or a patch of another node on it, cannot be trained through"
        if not loss.requires_grad:
            raise ValueError(f"{what}: no layer with a LoRA reaches the prediction. Connect the model from before the patch.")
        try:
            loss.backward()
        except RuntimeError as error:
            if _out_of_memory(error) or not any(word in str(error) for word in ("gradient", "inplace", "backward")):
                raise
            raise ValueError(f"{what}; connect the model from before the patch, if it has one. ({error})") from error

    def _micro_batches(self, indices: list[int]) -> Iterator[list[int]]:
        """Rows that can share a forward: at most `micro` of them, of one caption."""
        captions = [index if len(self._conds) > 1 else 0 for index in indices]
        for caption in dict.fromkeys(captions):
            rows = [row for row, own in enumerate(captions) if own == caption]
            for start in range(0, len(rows), self._micro):
                yield rows[start : start + self._micro]

    def _losses(self, conds: list, latents: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        sampling = self._model.model_sampling
        gain = output_gain(sampling.calculate_denoised, sigma)
        snr = signal_to_noise(sampling.noise_scaling, sigma)
        weight = loss_weight(gain, snr, self._settings.min_snr_gamma, self._settings.clean_weight)
        denoised = self._denoise(sampling.noise_scaling(sigma, noise, latents), sigma, conds)
        return weighted_error(denoised, latents, weight)

    def _denoise(self, x: Tensor, sigma: Tensor, conds: list) -> Tensor:
        self._guider.conds["positive"] = conds
        dtype = DTYPES.get(self._settings.precision)
        with torch.autocast(self._device.type, dtype=dtype) if dtype else nullcontext():
            return self._guider(x, sigma, **self._extra_args).float()

    def _conds_of(self, image: int) -> list:
        return [self._conds[image]] if len(self._conds) > 1 else self._conds

    def _compute_dtype(self) -> torch.dtype:
        return DTYPES.get(self._settings.precision) or self._model.get_dtype_inference()

    def _preview(self) -> Tensor:
        """A sample of the LoRA so far, always from the same noise: (1, C, H, W) in model space."""
        sampling, sigmas = self._model.model_sampling, self._sigmas
        noise = torch.randn(self._images.shape, generator=step_generator(self._settings.seed, PREVIEW)).to(self._device)
        x = sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(noise), True)
        for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
            x = ddim_step(x, self._denoise(x, sigma.expand(1), self._conds_of(0)), sigma, sigma_next)
        return x

    def _cause(self, step: int) -> str:
        """Why the loss of a step is not finite: asks the model without the LoRA."""
        indices, latents, sigma, noise = self._draw(step)
        with self._adapters.detached():
            plain = self._accumulate(indices, latents, sigma, noise, None)
        if plain == plain and abs(plain) != float("inf"):
            return f"the LoRA diverged. Use a learning_rate below {self._settings.learning_rate:g}, or min_snr_gamma 5."
        kind = str(self._compute_dtype()).removeprefix("torch.")
        return (
            f"the model itself predicts NaN at sigma {float(sigma.max()):.3f} in {kind}, even without the LoRA. "
            "Choose precision bf16, or start ComfyUI with --force-fp32."
        )


def _finite(parameters: list) -> bool:
    return bool(torch.stack(torch._foreach_norm([parameter.data for parameter in parameters])).isfinite().all())


def _out_of_memory(error: Exception) -> bool:
    return (
        comfy.model_management.is_oom(error)
        or isinstance(error, MemoryError)
        or (isinstance(error, RuntimeError) and "not enough memory" in str(error))
    )
