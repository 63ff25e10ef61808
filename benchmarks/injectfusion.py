"""InjectFusion on ten held-out pairs with the mini model: what gamma moves, and what each way of mixing h costs.

    python benchmarks/injectfusion.py ASSETS [--steps 20] [--size 256] [--pairs 10] [--table FILE] [--sheet FILE]
        [--gammas 0.2 0.4 0.6 0.8 1.0] [--omegas 0 0.3]

ASSETS holds content/, style/ (images that the mini model never saw) and metrics/. The painting is the original,
the photo the content.
  h to content, h to original: cosine between the h that the decoder gets while sampling and the two images' own h
    at that step, mean over the injecting steps.
  result to content, result to original: cosine between the finished result's own h and the content's, the
    reconstruction's; all three are noised with the same noise to the timesteps 50, 150 and 300, nothing is injected.
  Gram: VGG16 Gram distance to the original's reconstruction (the paper's measure of kept appearance).
  statistics: distance of the latent's channel means and deviations to the reconstruction's, in its deviations.
Lower is better in the last two.
"""

import argparse
import time
from pathlib import Path

import setup_host  # noqa: F401  (before torch and comfy)
import comfy.model_patcher
import comfy.samplers
import comfy.sampler_helpers
import torch
from metrics import Metrics
from report import add_outputs, add_pictures, pictures, publish, save_sheet

from pastiche.nodes.algorithms.slerp import lerp
from pastiche.nodes.host.features.capture import capture
from pastiche.nodes.host.injections.hspace import H_SPACE, INJECT, HSpacePatches
from pastiche.nodes.host.injections.injectfusion_sampler import injectfusion_sampler
from pastiche.nodes.host.trajectories.inversion import invert, reconstruct
from pastiche.nodes.host.networks.families import find_adapter
from pastiche.nodes.host.networks.mini import load_mini
from support.sampling import schedule

T_EDIT, GAMMA = 400, 0.6
PROBES = (50, 150, 300)


class Lerp(HSpacePatches):
    """(1 - g) h + g h_c."""

    def mix(self, h, content, gamma, mask):
        return lerp(h, content, gamma)


class Replacement(HSpacePatches):
    """h_c in the place of h."""

    def mix(self, h, content, gamma, mask):
        return content.expand_as(h)


class Bench:
    """All pairs as one batch: row i is the original i with the content i."""

    def __init__(self, assets: Path, pairs: int, steps: int, size: int):
        self.model, self.vae, kinds = load_mini()
        self.empty, self.sigmas = kinds["empty"], schedule(self.model, steps)
        self.content_images, self.original_images = pictures(assets, size, pairs)
        self.content, trajectory = self.inverted(self.content_images)
        self.bank = capture(self.model, trajectory, "h_space", "auto", "ram", "full")
        _, trajectory = self.inverted(self.original_images)
        self.noise = trajectory.latents[-1]
        self.noise = self.model.model.process_latent_out(self.noise)
        self.original_bank = capture(self.model, trajectory, "h_space", "auto", "ram", "full")
        self.reconstruction = reconstruct(self.model, trajectory)

    def inverted(self, images):
        latent = self.vae.encode(images.movedim(1, -1))  # BCHW -> BHWC
        _, trajectory = invert(self.model, {"samples": latent}, self.sigmas, self.empty, "fixed_point", 2)
        return latent, trajectory

    def decode(self, latent):
        return self.vae.decode(latent).movedim(-1, 1).float().clamp(0, 1)  # BHWC -> BCHW

    def injected(self, kind, gamma: float, omega: float):
        """(latent, cosines to the content and to the original, (2, B))."""
        model, seen = kind(self.bank, gamma, T_EDIT, "both", None, "constant").install(self.model), []

        def note(args):
            # absent: the injecting prediction is a run of its own, as this patch may read the whole batch
            flags = args["transformer_options"].get(INJECT, (True,))
            if flags and any(flags):
                h = args["h"].chunk(len(flags))[flags.index(True)]
                sigma = float(args["transformer_options"]["sigmas"][0])
                step = int((self.bank.trajectory.sigmas - sigma).abs().argmin())
                banks = (bank.store.read(H_SPACE, step, h.device) for bank in (self.bank, self.original_bank))
                seen.append(torch.stack([cosine([h], [bank]) for bank in banks]))
            return args

        model.set_model_patch(note, "middle_block_after_patch")
        latent = comfy.sample.sample_custom(
            model, torch.zeros_like(self.noise), 1.0, injectfusion_sampler(omega, 0, 0), self.sigmas, self.empty,
            self.empty, self.noise, disable_pbar=True, seed=0,
        )
        return latent, torch.stack(seen).mean(0)

    def h_of(self, latent):
        """[(B, C, h, w)] of a clean latent at every probed timestep, always with the same noise."""
        sampling, seen = self.model.get_model_object("model_sampling"), []
        options = comfy.model_patcher.create_model_options_clone(self.model.model_options)
        find_adapter(self.model).capture(options["transformer_options"], [H_SPACE], lambda key, h: seen.append(h.float()))
        x = self.model.model.process_latent_in(latent.float())
        noise = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(0))
        context = self.empty[0][0].expand(len(x), -1, -1)
        with torch.no_grad():
            for t in PROBES:
                sigma = sampling.sigmas[t].expand(len(x))
                self.model.model.apply_model(
                    x + sigma[0] * noise, sigma, c_crossattn=context,
                    transformer_options={**options["transformer_options"], "cond_or_uncond": [0], "sigmas": sigma},
                )
        return seen

    def statistics(self, latent):
        """(B,): root mean square difference of channel means and deviations, in the reconstruction's deviations."""
        x, y = (self.model.model.process_latent_in(z.float()).flatten(2) for z in (latent, self.reconstruction))
        spread = y.std(-1)
        mean, deviation = (x.mean(-1) - y.mean(-1)) / spread, (x.std(-1) - spread) / spread
        return (mean.square() + deviation.square()).mean(1).sqrt()


def cosine(a, b):
    """(B,): mean over the probed timesteps."""
    return torch.stack([torch.cosine_similarity(x.flatten(1), y.flatten(1)) for x, y in zip(a, b)]).mean(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_pictures(parser, 20, 256, 10)
    add_outputs(parser, sheet=True)
    parser.add_argument("--gammas", type=float, nargs="+", default=(0.2, 0.4, 0.6, 0.8, 1.0))
    parser.add_argument("--omegas", type=float, nargs="+", default=(0.0, 0.3))
    options = parser.parse_args()
    started = time.perf_counter()
    bench = Bench(options.assets, options.pairs, options.steps, options.size)
    measure = Metrics(options.assets / "metrics")
    target, h_start, h_content = bench.decode(bench.reconstruction), bench.h_of(bench.reconstruction), bench.h_of(bench.content)
    print(f"inverted in {time.perf_counter() - started:.0f} s", flush=True)
    sheet = [bench.original_images, bench.content_images]

    def row(latent, cosines):
        """Per-sample measures, (6, B)."""
        images = bench.decode(latent)
        sheet.append(images)
        gram = torch.tensor([measure.gram_distance(a[None], b[None]) for a, b in zip(images, target)])
        own = bench.h_of(latent)
        return torch.cat([cosines, torch.stack([cosine(own, h_content), cosine(own, h_start), gram, bench.statistics(latent)])])

    heads = "| | h to content | h to original | result to content | result to original | Gram | statistics |\n" + "|---" * 7 + "|"
    show = lambda name, values: f"| {name} | " + " | ".join(f"{value:.5f}" for value in values.mean(1).tolist()) + " |"
    lines = [heads]
    sweep = []
    for gamma in options.gammas:
        sweep.append(row(*bench.injected(HSpacePatches, gamma, 0.0)))
        lines.append(show(f"gamma {gamma}", sweep[-1]))
        print(lines[-1], flush=True)
    steps = torch.stack(sweep).diff(dim=0)  # (gammas - 1, measures, pairs)
    always = [int((sign * steps[:, k] > 0).all(0).sum()) for k, sign in enumerate((1, -1, 1, -1))]
    text = [
        f"# InjectFusion, mini model, {options.pairs} pairs, {options.size} px, {options.steps} steps",
        "",
        f"t_edit {T_EDIT}, no quality boosting; means over the pairs. {setup_host.hardware()}.",
        "See the script's head for the measures.",
        "",
        "## Slerp, asymmetric step (omega 0)",
        "",
        *lines,
        "",
        f"With every step of gamma, h nearer to the content's in {always[0]} pairs and farther from the original's in "
        f"{always[1]}; the result's own h nearer to the content's in {always[2]}, farther from the original's in {always[3]}.",
    ]
    for omega in options.omegas:
        ways = {"replacement": row(*bench.injected(Replacement, GAMMA, omega)), "lerp": row(*bench.injected(Lerp, GAMMA, omega)),
                "slerp": row(*bench.injected(HSpacePatches, GAMMA, omega))}
        counts = [
            f"{name} below {other} in {int((ways[name][k] < ways[other][k]).sum())} pairs ({what})"
            for what, k in (("Gram", 4), ("statistics", 5)) for name, other in (("slerp", "lerp"), ("slerp", "replacement"))
        ]
        text += ["", f"## Ways of mixing at gamma {GAMMA}, omega {omega}", "", heads]
        text += [show(name, values) for name, values in ways.items()] + ["", "; ".join(counts) + "."]
        print("\n".join(text[-7:]), flush=True)
    text += ["", f"Took {(time.perf_counter() - started) / 60:.1f} minutes."]
    publish(text, options.table)
    save_sheet([torch.cat(list(images[:, None]), dim=-1) for images in sheet], options.sheet)


if __name__ == "__main__":
    main()
