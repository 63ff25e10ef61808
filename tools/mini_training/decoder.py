"""Training of encoder and decoder together, then of the decoder alone: same latents, last layers at pixel resolution, no grid."""
import json
import math
import time

import torch
import torch.nn.functional as F
from torch import nn

from .data import square
from .diffusion import save_atomically

FINISH = 32  # channels at pixel resolution
CORRECTION = 96  # of the encoder's network, at latent size
INSIDE = slice(2, 7)  # columns of a patch whose second difference sees no other patch


def steps(picture):
    """|x(p) - x(p - 1)|, (B, C, H, W) -> (B, C, H, W/8 - 2, 8); the last axis is p's place in its patch, 0 leads over a border."""
    return picture.diff(dim=-1).abs()[..., 7:-8].unflatten(-1, (-1, 8))


def second_differences(picture):
    """|x'(p) - mean of x' on both sides|, x'(p) the step from column p - 1 to p; shapes and places as in `steps`."""
    step = picture.diff(dim=-1)  # step[p - 1]
    bend = (step[..., 1:-1] - (step[..., :-2] + step[..., 2:]) / 2).abs()  # bend[p - 2]
    return bend[..., 6:-7].unflatten(-1, (-1, 8))  # columns 8 .. W - 9


def grid(picture):
    """Jumps over patch borders over those inside patches, both ways, per picture (B); about 1 where no grid is."""
    bends = [second_differences(way).mean(dim=(1, 2, 3)) for way in (picture, picture.transpose(-1, -2))]
    border, inside = (sum(part) for part in zip(*((b[:, 0], b[:, INSIDE].mean(1)) for b in bends)))
    return border / inside


def comb(picture):
    """Power at 8 pixels' period and its harmonics over that of the frequencies beside them, both ways, per picture (B).

    (B, C, H, W) -> (B); about 1 where no grid is. Of the differences of brightness, over whole multiples of 8 pixels.
    """
    ratios = []
    for way in (picture.mean(1), picture.mean(1).mT):
        step = way.diff(dim=-1)
        length = step.shape[-1] // 8 * 8
        window = torch.hann_window(length, periodic=False, dtype=picture.dtype)
        power = torch.fft.rfft((step[..., :length] - step[..., :length].mean(-1, keepdim=True)) * window).abs().square().mean(1)
        at = [length // 8 * k for k in (1, 2, 3)]
        teeth = sum(power[:, f - 1 : f + 2].sum(-1) for f in at)
        beside = sum(power[:, f - 6 : f - 3].sum(-1) + power[:, f + 4 : f + 7].sum(-1) for f in at) / 2
        ratios.append(teeth / beside)
    return sum(ratios) / 2


def grid_penalty(picture, floor=0.02, window=4):
    """How much steps and bends differ between the eight columns of a patch, in units of their mean.

    In a picture every column is like every other; where patches show, their borders have more of both, or, smoothed
    over, less. Averaged over `window` x `window` patches first, since single columns differ by chance.
    """
    total = 0.0
    for way in (picture, picture.transpose(-1, -2)):
        for measure in (steps, second_differences):
            seen = measure(way).mean(1)  # colours
            rows = seen[:, : seen.shape[1] // 8 * 8].unflatten(1, (-1, 8)).mean(2)  # (B, rows of patches, patches, 8)
            profile = F.avg_pool2d(rows.movedim(-1, 1), window, stride=window // 2)  # (B, 8, windows)
            mean = profile.mean(1, keepdim=True).detach()
            # Deviations from a mean add up to 0, so this is their mean size; but its gradient only lowers what stands
            # out. A two-sided one was trained once and had learned to roughen flat insides instead.
            total = total + 2 * F.relu((profile - mean) / (mean + floor)).mean()
    return total / 4


def strange(latents, std):
    """Latents as a sampler hands them over: the statistics of another picture, mixtures of two, noise on either."""
    other = latents.roll(1, 0)
    mean, deviation = latents.mean((2, 3), keepdim=True), latents.std((2, 3), keepdim=True) + 0.1 * std
    toned = (latents - mean) / deviation * (other.std((2, 3), keepdim=True) + 0.1 * std) + other.mean((2, 3), keepdim=True)
    share = torch.rand(len(latents), 1, 1, 1)
    patchy = (torch.rand(len(latents), 1, *latents.shape[2:]) < share).to(latents)
    mixed = torch.lerp(latents, toned.roll(1, 0), patchy * torch.rand(len(latents), 1, 1, 1))
    choice = torch.rand(len(latents), 1, 1, 1) < 0.6
    noise = 0.3 * torch.rand(len(latents), 1, 1, 1) * torch.randn_like(latents) * std
    return torch.where(choice, torch.lerp(latents, toned, torch.rand(len(latents), 1, 1, 1).sqrt()), mixed) + noise


def edge_error(a, b):
    """L1 of the differences between neighbouring pixels."""
    return (a.diff(dim=2) - b.diff(dim=2)).abs().mean() + (a.diff(dim=3) - b.diff(dim=3)).abs().mean()


class DecoderTrainer:
    """AdamW, cosine rate by processor time, EMA, resumable. `encoder`: trains that too; else it stays as it is."""

    def __init__(self, model, pools, validation, work, rng, rate=3e-4, batch=16, encoder=False):
        self.model, self.pools, self.work, self.rng, self.rate, self.batch = model, pools, work, rng, rate, batch
        self.encoder = encoder
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(encoder or not name.startswith(("analysis", "correction")))
        model.to(memory_format=torch.channels_last)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, rate, betas=(0.9, 0.98), weight_decay=1e-4)
        self.average = {k: v.clone() for k, v in model.state_dict().items()}
        self.step, self.minutes, self.recent = 0, 0.0, []
        self.std = model.latent_std[:, None, None]
        self.held_out = torch.stack([square(p, 256) for p in validation[::8]])

    @property
    def checkpoint(self):
        return self.work / ("encoder.pt" if self.encoder else "decoder.pt")

    def save(self):
        save_atomically({"model": self.model.state_dict(), "average": self.average, "optimizer": self.optimizer.state_dict(),
                         "step": self.step, "minutes": self.minutes}, self.checkpoint)

    def resume(self):
        if self.checkpoint.exists():
            saved = torch.load(self.checkpoint, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.average, self.step, self.minutes = saved["average"], saved["step"], saved["minutes"]

    def decode(self, z):
        with torch.autocast("cpu", torch.bfloat16):
            return self.model.decode(z.contiguous(memory_format=torch.channels_last)).float()

    def joint_loss(self, x):
        """Squared error and a little of the edges', half of the latents with noise: what they say is to survive a sampler."""
        z = self.model.encode(x)
        level = 0.15 * torch.rand(len(z), 1, 1, 1) * (torch.rand(len(z), 1, 1, 1) < 0.5)
        y = self.decode(z + level * torch.randn_like(z) * self.std)
        error = F.mse_loss(y, x)
        return error + 0.01 * edge_error(y, x), {"mse": error.detach()}

    def decoder_loss(self, x):
        with torch.no_grad():
            z = self.model.encode(x)
            known = len(x) * 5 // 8  # pictures' own latents, some with a little noise: the picture is the target
            level = 0.1 * torch.rand(known, 1, 1, 1) * (torch.rand(known, 1, 1, 1) < 0.2)
            given = torch.cat([z[:known] + level * torch.randn_like(z[:known]) * self.std, strange(z[known:], self.std)])
        y = self.decode(given)
        own, target = y[:known], x[:known]
        # No picture is known that belongs to a strange latent. It should say what the latent says, and without a grid.
        said = (self.model.encode(y[known:]) - given[known:]).square().mean() * 16 / 192
        strange_borders = grid_penalty(y[known:])
        error = F.mse_loss(own, target)
        loss = error + 0.01 * edge_error(own, target) + 0.1 * said + 0.004 * strange_borders
        parts = {"mse": error, "said": said, "strange_borders": strange_borders}
        return loss, {name: part.detach() for name, part in parts.items()}

    def train_step(self, rate):
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        count = self.batch
        x = torch.cat([self.pools["photo"].crops(self.rng, count - count // 4, 128),
                       self.pools["painting"].crops(self.rng, count // 4 - 1, 128), self.pools["drawing"].crops(self.rng, 1, 128)])
        x = x[torch.randperm(count)]
        loss, parts = self.joint_loss(x) if self.encoder else self.decoder_loss(x)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        keep = min(0.998, (1 + self.step) / (20 + self.step))
        for k, v in self.model.state_dict().items():
            self.average[k].lerp_(v, 1 - keep)
        return parts

    @torch.no_grad()
    def validate(self, probe=None):
        """dB of the EMA on held-out photos at 256 px; grid of those, of strange latents made from them and of `probe`."""
        own = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        z = self.model.encode(self.held_out)
        if self.encoder:
            probe = None  # of other latents
        state = torch.get_rng_state()
        torch.manual_seed(0)
        odd = strange(z, self.std)
        torch.set_rng_state(state)
        decoded = self.decode(z).clamp(-1, 1)
        decibels = 10 * torch.log10(4 / (decoded - self.held_out).square().mean((1, 2, 3)))
        out = {"db": decibels.mean().item(), "grid": grid(decoded).mean().item(),
               "grid_strange": grid(self.decode(odd).clamp(-1, 1)).mean().item()}
        if probe is not None:
            out["grid_probe"] = grid(self.decode(probe).clamp(-1, 1)).mean().item()
        self.model.load_state_dict(own)
        return out

    def run(self, minutes, probe=None, save_every=30.0):
        """Train until `minutes` of processor time in total (earlier runs counted in) have passed.

        A machine that is busy otherwise then makes the training later, not shorter.
        """
        clock = saved = time.process_time()
        with open(self.checkpoint.with_name(f"{self.checkpoint.stem}_log.jsonl"), "a") as log:
            while (progress := self.minutes / minutes) < 1:
                rate = self.rate * min(1.0, (self.step + 1) / 100) * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * progress)))
                self.recent.append(self.train_step(rate))
                now = time.process_time()
                self.minutes, clock = self.minutes + (now - clock) / 60, now
                if now - saved > save_every or self.minutes >= minutes:
                    means = {name: sum(parts[name].item() for parts in self.recent) / len(self.recent) for name in self.recent[0]}
                    entry = {"step": self.step, "minutes": round(self.minutes, 2), "rate": rate, **means, **self.validate(probe)}
                    self.recent = []
                    print(entry, flush=True)
                    log.write(json.dumps(entry) + "\n")
                    log.flush()
                    self.save()
                    saved = time.process_time()
