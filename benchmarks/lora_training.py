"""Train Style LoRA against ComfyUI's own TrainLoraNode: seconds a step and added peak memory.

Same model (SD1.5's full size, random weights), same latent, conditioning, rank and number of steps, one process,
interleaved. Seconds a step are taken between the first and the last progress report of a run, so loading, core's
copy of the model and setup do not count; processor seconds (both cores together) do not depend on what else the
machine does. Memory is the process's peak (CUDA: the allocator's) over what it was with the model loaded.

    COMFYUI_PATH=... python benchmarks/lora_training.py --work /somewhere --latent 16 --steps 3 --rounds 2
"""

import argparse
import ctypes
import gc
import statistics
import threading
import time
from pathlib import Path

import setup_host  # noqa: F401  first: it makes the others importable
import comfy.model_management
import comfy.sd
import comfy.utils
import psutil
import torch
from comfy_extras.nodes_train import TrainLoraNode
from report import add_outputs, publish

from pastiche.nodes.host.training.loop import TrainingSettings, train_style_lora
from pastiche.nodes.host.training.images import TrainingImages
from support.models import tiny_unet


class PeakMemory:
    """Peak memory over the level at the start, in bytes."""

    def __enter__(self):
        self.cuda = not comfy.model_management.cpu_mode()
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return self
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.process = psutil.Process()
        self.start = self.peak = self.process.memory_info().rss
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while not self.done.wait(0.01):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def __exit__(self, *error):
        if self.cuda:
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated()
        else:
            self.done.set()
            self.thread.join()
        self.added = self.peak - self.start


def measure(run, steps):
    """Wall-clock and processor seconds a step, and added bytes, of one training."""
    reports = []

    def hook(value, total, preview, node_id=None):
        reports.append((value, time.perf_counter(), time.process_time()))

    comfy.utils.set_progress_bar_global_hook(hook)
    with torch.inference_mode(), PeakMemory() as memory:
        run()
    comfy.utils.set_progress_bar_global_hook(None)
    reports = [report for report in reports if report[0] > 0]
    (first, wall, processor), (last, wall_end, processor_end) = reports[0], reports[-1]
    assert last == steps and last > first, reports
    return (wall_end - wall) / (last - first), (processor_end - processor) / (last - first), memory.added


def load(options):
    """The model that is trained: SD1.5's full size from a file, or a small one."""
    if options.width != 320:
        return tiny_unet(channels=options.width, channel_mult=(1, 2, 4, 4), context_dim=768, heads=8)
    path = options.work / "random_sd15.safetensors"
    if not path.exists():
        setup_host.full_size_sd15(path)
    return comfy.sd.load_diffusion_model(str(path))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True, help="folder for the 3.4 GB random checkpoint")
    parser.add_argument("--latent", type=int, nargs="+", default=[16], help="sides of the square latent")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--only", default="", help="run only variants whose name holds one of these (comma-separated)")
    parser.add_argument("--width", type=int, default=320, help="base width of the U-Net; others than 320 are no SD1.5, to try the script")
    add_outputs(parser)
    options = parser.parse_args()

    with torch.inference_mode():
        model = load(options)
        comfy.model_management.load_models_gpu([model])
        generator = torch.Generator().manual_seed(0)
        positive = [[torch.randn(1, 77, 768, generator=generator), {}]]

    def core(latent, dtype, checkpointing, bypass=False):
        TrainLoraNode.execute(model=[model], latents=[{"samples": latent}], positive=[positive], **{
            name: [value] for name, value in dict(
                batch_size=1, steps=options.steps, grad_accumulation_steps=1, learning_rate=2e-4, rank=options.rank,
                optimizer="AdamW", loss_function="MSE", seed=0, training_dtype=dtype, lora_dtype=dtype,
                quantized_backward=False, algorithm="LoRA", gradient_checkpointing=checkpointing, checkpoint_depth=1,
                offloading=False, existing_lora="[None]", bucket_mode=False, bypass_mode=bypass,
            ).items()
        })

    def ours(latent, checkpointing=False, targets="qkv"):
        bar = comfy.utils.ProgressBar(options.steps)
        settings = TrainingSettings(
            steps=options.steps, rank=options.rank, targets=targets, gradient_checkpointing=checkpointing
        )
        train_style_lora(model, TrainingImages(latent[None]), positive, settings, lambda step, *_: bar.update_absolute(step))

    variants = {
        "Train Style LoRA (defaults: qkv, fp32 model)": lambda latent: ours(latent),
        "Train Style LoRA, gradient checkpointing": lambda latent: ours(latent, True),
        "Train Style LoRA, all linear layers": lambda latent: ours(latent, targets="all"),
        "TrainLoraNode, its defaults (bf16, checkpointing)": lambda latent: core(latent, "bf16", True),
        "TrainLoraNode, fp32, checkpointing (its default)": lambda latent: core(latent, "fp32", True),
        "TrainLoraNode, fp32, no checkpointing": lambda latent: core(latent, "fp32", False),
        "TrainLoraNode, fp32, no checkpointing, bypass": lambda latent: core(latent, "fp32", False, True),
    }
    wanted = [word for word in options.only.split(",") if word]
    variants = {name: run for name, run in variants.items() if not wanted or any(word in name for word in wanted)}
    size = "SD1.5's full size" if options.width == 320 else f"base width {options.width}"
    lines = [
        "# LoRA training: Train Style LoRA and core's TrainLoraNode", "",
        f"{setup_host.hardware()}. U-Net of {size} with "
        f"random weights, fp32; rank {options.rank}, batch 1, "
        f"{options.steps} steps a run, {options.rounds} interleaved rounds in one process (medians). "
        "Made by `benchmarks/lora_training.py`.", "",
    ]
    for side in options.latent:
        latent = torch.randn(1, 4, side, side, generator=generator)
        results = {name: [] for name in variants}
        for _ in range(options.rounds):
            for name, run in variants.items():
                results[name].append(measure(lambda: run(latent), options.steps))
                print(side, name, "%.2f s, %.2f cpu s a step, +%.2e bytes" % results[name][-1], flush=True)
        medians = {name: [statistics.median(column) for column in zip(*runs)] for name, runs in results.items()}
        ours_now = medians[next(iter(variants))]
        lines += [f"## {side * 8}x{side * 8} pixels ({side}x{side} latent)", "",
                  "| trainer | s/step | processor s/step | added peak memory, GB | times our s/step | times our processor s | "
                  "times our memory |", "|---|---|---|---|---|---|---|"]
        for name, own in medians.items():
            ratios = " | ".join(f"{value / reference:.1f}" for value, reference in zip(own, ours_now))
            lines.append(f"| {name} | {own[0]:.2f} | {own[1]:.2f} | {own[2] / 1e9:.2f} | {ratios} |")
        lines.append("")
    publish(lines, options.table)


main()
