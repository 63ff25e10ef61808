"""What a StyleID picture costs with the mini model: network evaluations, CPU seconds, peak memory, interleaved.

    python benchmarks/evaluations.py ASSETS [--size 256] [--steps 20] [--rounds 2] [--pairs 2] [--quick] [--table FILE]

An evaluation is one row (one image) through the network once, a forward one call of the network. The authors' code
takes 24 at 8 steps and 150 at 50: two inversions with the features taken on the way, and the sampling. Then the round
trip of the inversion, how near the picture with features kept on the way is to the one with features captured at the
latents themselves, and what the authors' codes store, computed from the layers' shapes.
"""

import argparse
import ctypes
import statistics
import sys
import tempfile
import threading
import time

import setup_host  # before torch and comfy
import folder_paths
import psutil
import torch
from pastiche.nodes.algorithms.metrics import psnr
from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.features.library import load_bank, register_folder, save_bank
from pastiche.nodes.host.features.on_the_way import invert_and_capture, invert_several
from pastiche.nodes.host.features.stores import readable_size
from pastiche.nodes.host.injections.style import inject_style
from pastiche.nodes.host.networks.families import find_adapter
from pastiche.nodes.host.networks.mini import load_mini
from pastiche.nodes.host.trajectories.inversion import invert, noise_latent, reconstruct
from pastiche.nodes.host.trajectories.latent_adain import latent_adain
from report import add_outputs, add_pictures, pictures, publish
from support.sampling import sample, schedule

LAYERS = "6-11"


class Studio:
    """The mini model with a counter of its evaluations, one content and one style."""

    def __init__(self, content, style):
        self.model, self.vae, kinds = load_mini()
        self.empty, self.evaluations, self.forwards = kinds["empty"], 0, 0
        self.model.model.diffusion_model.register_forward_pre_hook(self._count)
        self.content, self.style = ({"samples": self.vae.encode(image[None])} for image in (content, style))
        self.saved = {}

    def _count(self, network, args):
        self.evaluations += args[0].shape[0]
        self.forwards += 1

    def invert(self, latent, steps, scheme="predicted", memory="ram"):
        return invert_and_capture(
            self.model, latent, schedule(self.model, steps), "self_attention", LAYERS, memory, positive=self.empty, scheme=scheme
        )

    def together(self, steps, memory="ram"):
        """Content and style by one DDIM Inversion, in one batch."""
        return invert_several(
            self.model, [self.content, self.style], schedule(self.model, steps), "self_attention", LAYERS, memory, positive=self.empty,
            scheme="predicted",
        )

    def save_style(self, steps):
        self.saved[steps] = save_bank(self.invert(self.style, steps)[2], f"benchmark_{steps}").name

    def finish(self, content, style, steps, decode=False):
        """Samples with (LATENT, trajectory, bank) of the content and of the style; a picture, or its latent."""
        start = latent_adain(content[0], style[0], 1.0, None, None)
        model = inject_style(self.model, style[2], content[2], 0.75, 1.5, 1.0, LAYERS, 0.0, 1.0, None)
        latent = sample(model, start["samples"], schedule(self.model, steps), self.empty)
        return self.vae.decode(latent).cpu() if decode else latent

    def plain(self, steps):
        noise = torch.randn(self.content["samples"].shape, generator=torch.Generator().manual_seed(0))
        return sample(self.model, 14.6 * noise, schedule(self.model, steps), self.empty)

    def picture(self, steps, scheme="predicted", memory="ram"):
        return self.finish(self.invert(self.content, steps, scheme, memory), self.invert(self.style, steps, scheme, memory), steps)

    def picture_together(self, steps, memory="ram"):
        return self.finish(*self.together(steps, memory), steps)

    def picture_of_a_saved_style(self, steps):
        bank = load_bank(self.saved[steps], "disk", self.model)
        style = {"samples": noise_latent(self.model, bank.trajectory)}, bank.trajectory, bank
        return self.finish(self.invert(self.content, steps), style, steps)

    def picture_captured_apart(self, steps, scheme):
        """As before features could be kept on the way: every latent evaluated once more."""
        parts = []
        for latent in (self.content, self.style):
            noise, trajectory = invert(self.model, latent, schedule(self.model, steps), self.empty, scheme)
            parts.append((noise, trajectory, capture(self.model, trajectory, "self_attention", LAYERS, "ram")))
        return self.finish(*parts, steps)


class Peak:
    """The largest growth of this process's resident memory (or of the GPU's) while it runs, in bytes."""

    def __enter__(self):
        self._cuda = torch.cuda.is_available() and torch.cuda.memory_allocated() > 0
        self._process, self._running, self.bytes = psutil.Process(), True, 0
        if sys.platform == "linux":  # otherwise freed memory still counts as used, and growth is not seen
            ctypes.CDLL(None).malloc_trim(0)
        self._before = torch.cuda.memory_allocated() if self._cuda else self._process.memory_info().rss
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while self._running:
            self.bytes = max(self.bytes, self._process.memory_info().rss - self._before)
            time.sleep(0.005)

    def __exit__(self, *_):
        self._running = False
        self._thread.join()
        if self._cuda:
            self.bytes = torch.cuda.max_memory_allocated() - self._before


def stored_features(studio, side):
    """Lines of a table: bytes of features that the authors' codes keep for one picture, and ours, from the layers' shapes.

    Both codes keep q, k and v of every chosen layer at every step of content and style. CompVis: float32 (its inversion
    runs outside of autocast), layers 6-11, 50 steps; a copy for each of the two beside the list that they were made in,
    which then holds the merged ones. diffusers: half precision, layers 7-11, 20 steps; a copy for each, and the hooks' own.
    Ours keeps the hidden state before the projections, in half precision, for each of the two.
    """
    sd15 = {number: (32 * 32, 640) if number < 9 else (64 * 64, 320) for number in range(6, 12)}  # at 512 px
    adapter = find_adapter(studio.model)
    mini = {key.number: adapter.shape(key, side, side) for key in adapter.keys("self_attention", LAYERS)}
    lines = [
        "", "Features kept for one picture, content and style, in bytes from the layers' shapes (see the script); with `recompute` ours are "
        "the two trajectories alone.", "", "| settings | the authors' code | ours, `ram` | ratio |", "|---|---|---|---|",
    ]
    for model, layers in (("SD1.5, 512 px", sd15), (f"mini model, {8 * side} px", mini)):
        for code, first, steps, width, copies in (("CompVis", 6, 50, 4, 2), ("diffusers", 7, 20, 2, 3)):
            values = sum(tokens * channels for number, (tokens, channels) in layers.items() if number >= first) * steps
            theirs, ours = 3 * values * width * copies, values * 2 * 2
            lines.append(
                f"| {model}, {code}, layers {first}-11, {steps} steps | {readable_size(theirs)} | {readable_size(ours)} | {ours / theirs:.2f} |"
            )
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_pictures(parser, 20, 256, 2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="without `fixed_point` and the pictures' quality")
    parser.add_argument("--only", help="rows whose names hold one of these words, with | between")
    add_outputs(parser)
    options = parser.parse_args()
    folder_paths.set_output_directory(tempfile.mkdtemp(prefix="pastiche-benchmark-"))
    register_folder()
    steps = options.steps
    photos, paintings = (images.movedim(1, -1) for images in pictures(options.assets, options.size, max(options.pairs, 1)))  # BCHW -> BHWC
    studio = Studio(photos[0], paintings[0])
    studio.save_style(steps)
    rows = {
        f"plain sampling, {steps} steps": lambda: studio.plain(steps),
        f"one picture, {steps} steps": lambda: studio.picture(steps),
        f"one picture, its style saved, {steps} steps": lambda: studio.picture_of_a_saved_style(steps),
        f"one picture, content and style in one batch, {steps} steps": lambda: studio.picture_together(steps),
        f"the same with recompute, {steps} steps": lambda: studio.picture_together(steps, "recompute"),
        f"one picture, `fixed_point`, captured apart, {steps} steps": lambda: studio.picture_captured_apart(steps, "fixed_point"),
        "the authors' settings: `next`, 8 steps (theirs: 24)": lambda: studio.picture(8, "next"),
        "ours, 8 steps": lambda: studio.picture(8),
        "the authors' settings: `current`, 50 steps (theirs: 150)": lambda: studio.picture(50, "current"),
    }
    if options.quick:
        rows = {name: work for name, work in rows.items() if "fixed_point" not in name}
    if options.only:
        rows = {name: work for name, work in rows.items() if any(word in name for word in options.only.split("|"))}
    rounds = {name: 1 if "50 steps" in name or "fixed_point" in name else options.rounds for name in rows}
    found = {name: [] for name in rows}
    for number in range(options.rounds):
        for name, work in rows.items():
            if number >= rounds[name]:
                continue
            studio.evaluations = studio.forwards = 0
            started = time.process_time()
            with Peak() as peak:
                work()
            found[name].append((studio.evaluations, studio.forwards, time.process_time() - started, peak.bytes))
            print(name, found[name][-1], flush=True)
    text = [
        f"# Evaluations for a StyleID picture, mini model, {options.size} px",
        "",
        f"Median of {options.rounds} interleaved rounds (one of `fixed_point` and of 50 steps); peak: growth of the process, without the "
        f"VAE's decoding. "
        f"{setup_host.hardware()}. An evaluation is one row through the network once, a forward one call of it; the authors' code takes "
        "24 evaluations at 8 steps and 150 at 50.",
        "",
        "| what | evaluations | forwards | CPU, s | peak |",
        "|---|---|---|---|---|",
    ]
    for name, values in found.items():
        evaluations, forwards, seconds, size = (statistics.median(column) for column in zip(*values))
        text.append(f"| {name} | {evaluations:.0f} | {forwards:.0f} | {seconds:.1f} | {readable_size(int(size))} |")
    text += stored_features(studio, options.size // 8)
    if options.quick:
        return publish(text, options.table)
    text += ["", "| pair | steps | round trip of the content, dB | picture against exact features, dB |", "|---|---|---|---|"]
    for i in range(options.pairs):
        studio = Studio(photos[i], paintings[i])
        for count in (10, steps):
            content, style = studio.invert(studio.content, count), studio.invert(studio.style, count)
            exact = [(*part[:2], capture(studio.model, part[1], "self_attention", LAYERS, "ram", "full")) for part in (content, style)]
            near = psnr(studio.finish(content, style, count, True), studio.finish(*exact, count, True), 1.0)
            decoded = (studio.vae.decode(latent).cpu() for latent in (reconstruct(studio.model, content[1]), studio.content["samples"]))
            text.append(f"| {i + 1} | {count} | {psnr(*decoded, 1.0):.1f} | {near:.1f} |")
            print(text[-1], flush=True)
    publish(text, options.table)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
