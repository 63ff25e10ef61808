"""Training of the mini U-Net: eps-prediction, AdamW, cosine rate over wall clock, EMA, resumable."""
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from host.files import atomic_write

from .data import KINDS, Feed, pixels, square
from .unet import Denoiser, alphas_cumprod

FOREIGN_FROM = 400  # timestep from which the bottleneck decides on the coarse picture
FOREIGN_WEIGHT = 1.0
MANNER_EVERY = 2  # steps; in each such one self-attention is taught to carry a painting's manner over
MANNER_FROM = 150  # timestep; below it a prediction has to keep to the picture that it sees
MANNER_LAYERS = range(6, 12)  # output blocks whose keys and values StyleID exchanges
MANNER_WEIGHT = 0.3
TEXTURE_UNTIL = 700  # timestep; from there on a prediction has no strokes yet


def clock(device):
    """What a training's minutes are read from. On a CPU the processor's: a machine that is busy otherwise then makes the
    training later, not shorter."""
    return time.monotonic if device.type == "cuda" else time.process_time


def save_atomically(obj, path):
    """torch.save under a temporary name, then rename: a killed run never leaves half a file."""
    with atomic_write(Path(path)) as partial:
        torch.save(obj, partial)


def diffuse(latents, timesteps, alphas, jitter=15.0):
    """z_t = sqrt(abar) z + a sqrt(1 - abar) eps; returns (z_t, eps).

    The noise's amplitude a lies within `jitter` * beta_t of 1: 1.3 % at the first step, 18 % at the last,
    one and a half steps of 50. The prediction then does not change along its own direction within a step,
    which is what an explicit DDIM inversion needs: it evaluates eps one step off the trajectory, and its
    error is step^2 (d eps / d x) eps.
    """
    noise = torch.randn_like(latents)
    abar = alphas[timesteps][:, None, None, None]
    before = torch.where(timesteps > 0, alphas[(timesteps - 1).clamp(min=0)], alphas.new_ones(()))[:, None, None, None]
    amplitude = 1 + jitter * (1 - abar / before) * (2 * torch.rand(len(latents), 1, 1, 1, device=latents.device) - 1)
    return abar.sqrt() * latents + amplitude * (1 - abar).sqrt() * noise, noise


def foreign_pairs(timesteps):
    """Up to a third of the batch, from FOREIGN_FROM on, and to each the sample next in timestep: two index tensors."""
    order = timesteps.argsort()
    order = order[timesteps[order] >= FOREIGN_FROM]
    chosen = torch.randperm(len(order), device=order.device)[: max(1, len(timesteps) // 3)] if len(order) > 1 else order[:0]
    return order[chosen], order.roll(1)[chosen]


def foreign_loss(own, foreign, latents, source, signal):
    """How far a foreign bottleneck is from changing just the coarse layout and colour, 1 where it changes nothing.

    Left alone a network of this size reads all of a picture from its skips, and what h says changes nothing. So the
    prediction with the h of `source` is to differ from the own one as a clean latent does that has the other's means
    over the cells of h. own, foreign: predictions (K, C, h, w) of the same samples; signal (K, 1, 1, 1): sqrt(abar /
    (1 - abar)), by which a change of the clean latent enters the noise.
    """
    grid = [-(-side // 8) for side in latents.shape[-2:]]
    coarse = F.adaptive_avg_pool2d(latents, grid)
    change = F.interpolate(F.adaptive_avg_pool2d(source, grid) - coarse, latents.shape[-2:], mode="bilinear")
    wrong = (foreign - own) / signal.clamp(min=0.2) + change * (signal / signal.clamp(min=0.2))
    return wrong.square().mean() / change.square().mean().clamp(min=1e-3)


def read_others(rows):
    """Patch of self-attention: in MANNER_LAYERS row i takes its keys and values from row `rows[i]`."""
    def patch(queries, keys, values, extra_options):
        kind, number = extra_options["block"]
        if kind != "output" or number not in MANNER_LAYERS:
            return queries, keys, values
        return queries, keys[rows], values[rows]

    return patch


def texture(latents):
    """Covariance of all channels in 3x3 latent pixels, (B, C, h, w) -> (B, 9 C, 9 C): which strokes there are, not where."""
    seen = F.unfold(latents, 3)
    seen = seen - seen.mean(-1, keepdim=True)
    return seen @ seen.mT / seen.shape[-1]


def manner_loss(clean, photo, painted, distinct):
    """How far a photo is from being painted when it reads a painting's keys and values, 1 where nothing changes.

    A network this small sees in its convolutions whatever its self-attention could tell, and what is exchanged there
    hardly shows. So the clean latent that it predicts from a noisy photo is to be that of the same photo painted, where
    the keys and values are another crop's of that painting: in its means over 2x2 latent pixels, and in its texture.
    (Pixel by pixel the best answer would be a blur, since nothing says where a stroke begins.) The texture only where
    `distinct` (B, bool): before, a prediction is rightly a blur. clean, photo, painted: (B, C, h, w).
    """
    tones, before = (F.avg_pool2d(part - painted, 2).square().mean((1, 2, 3)) for part in (clean, photo))
    told = (tones / (before + 0.02)).mean()
    wanted = texture(painted)
    apart, at_first = ((texture(part) - wanted).square().sum((1, 2)) for part in (clean, photo))
    strokes = apart / (at_first + 0.1 * wanted.square().sum((1, 2)))
    strokes = (strokes * distinct).sum() / distinct.sum().clamp(min=1)
    return told, strokes


def stratified(count, steps):
    """(count) timesteps, one in each count-th part of 0..steps: the loss of one batch then says more about all of them."""
    return ((torch.arange(count) + torch.rand(count)) * (steps / count)).long()[torch.randperm(count)]


class Trainer:
    """Owns network, EMA copy, optimiser and the clock; `run` trains until its minutes are spent.

    With several processes (torch.distributed set up) each draws its own batch and gradients are
    averaged; rank 0 keeps the clock, the log and the checkpoint.
    """

    def __init__(self, encode, pools, validation, work, seed=0, rate=5e-4, batch=16, device="cpu", workers=0, pairs=None):
        self.encode, self.pools, self.work, self.workers, self.pairs = encode, pools, Path(work), workers, pairs
        self.device = torch.device(device)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.rate, self.batch = rate, batch // self.world
        self.seed_samplers(seed)
        self.model = Denoiser(len(KINDS), seed=seed).to(self.device)
        torch.manual_seed(1000 * seed + self.rank)
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        decay = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], rate, betas=(0.9, 0.98))
        self.alphas = alphas_cumprod().to(self.device)
        self.step, self.images, self.minutes = 0, 0, 0.0
        self.recent, self.foreign, self.manner = [], [], []
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.held_out = encode(torch.stack([square(p, 128) for p in validation[:48]]).to(self.device))
        self.held_out_t = torch.linspace(5, 995, len(self.held_out)).long().to(self.device)
        self.held_out_noise = torch.randn(self.held_out.shape, generator=generator).to(self.device)

    @property
    def checkpoint(self):
        return self.work / "unet.pt"

    def save(self):
        save_atomically({"model": self.model.state_dict(), "average": self.average, "step": self.step,
                         "optimizer": self.optimizer.state_dict(), "images": self.images,
                         "minutes": self.minutes}, self.checkpoint)

    def resume(self, shipped=None):
        """Goes on where the checkpoint stopped; without one from `shipped` (state, images), without both anew."""
        if not self.checkpoint.exists():
            if shipped:
                state, self.images = shipped
                self.model.load_state_dict(state)
                self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
            return
        saved = torch.load(self.checkpoint, weights_only=True, map_location=self.device)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.average, self.step = saved["average"], saved["step"]
        self.images, self.minutes = saved["images"], saved["minutes"]
        self.seed_samplers(self.step)

    def seed_samplers(self, seed):
        """Crops, noise and timesteps differ between processes and go on differently after a resume."""
        self.feed = Feed(self.pools, self.workers, [seed, self.rank])
        self.rng = np.random.default_rng([seed, self.rank])
        torch.manual_seed(1000 * seed + self.rank)

    def sample_batch(self, size, count):
        """Latents (count, 16, size/8, size/8) and kind indices (count), some dropped to 'empty'."""
        crops, kinds = (part.to(self.device) for part in self.feed(size, count))
        with torch.no_grad():
            return self.encode(pixels(crops)), kinds

    def predict(self, *args):
        """The network's noise, computed in bf16."""
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.model(*args).float()

    @torch.no_grad()
    def validate(self):
        """EMA loss on fixed photos, noise and timesteps; comparable between runs."""
        live = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        abar = self.alphas[self.held_out_t][:, None, None, None]
        noisy = abar.sqrt() * self.held_out + (1 - abar).sqrt() * self.held_out_noise
        kinds = torch.full((len(noisy),), KINDS.index("photo"), device=self.device)
        loss = F.mse_loss(self.predict(noisy, self.held_out_t, kinds), self.held_out_noise).item()
        self.model.load_state_dict(live)
        return loss

    def plain_step(self, size, count):
        """The loss, and the squared error of the noise in it."""
        latents, kinds = self.sample_batch(size, count)
        timesteps = stratified(count, 1000).to(self.device)
        noisy, noise = diffuse(latents, timesteps, self.alphas)
        chosen, source = foreign_pairs(timesteps)
        rows = torch.cat([torch.arange(count, device=self.device), chosen])

        def exchange(args):
            return {**args, "h": torch.cat([args["h"][:count], args["h"][source]])}

        options = {"patches": {"middle_block_after_patch": [exchange]}}
        own, foreign = self.predict(noisy[rows], timesteps[rows], kinds[rows], options).tensor_split([count])
        loss = error = F.mse_loss(own, noise)
        if len(chosen):
            strange = foreign_loss(own[chosen], foreign, latents[chosen], latents[source], self.signal(timesteps[chosen]))
            self.foreign.append(strange.item())
            loss = loss + FOREIGN_WEIGHT * strange
        return loss, error.detach()

    def manner_step(self, size, count):
        """As `plain_step`: half of the rows are paintings, half photos that read the paintings' keys and values."""
        half = count // 2
        with torch.no_grad():
            crops = (self.encode(pixels(torch.from_numpy(part)).to(self.device)) for part in self.pairs.cut(self.rng, half, size))
            photo, painted, elsewhere = crops
        timesteps = (MANNER_FROM + stratified(half, 1000 - MANNER_FROM)).to(self.device).repeat(2)
        noisy, noise = diffuse(torch.cat([photo, elsewhere]), timesteps, self.alphas)
        kinds = torch.full((2 * half,), KINDS.index("painting"), device=self.device)
        kinds[torch.rand(2 * half, device=self.device) < 0.5] = 0  # StyleID samples without a prompt
        rows = torch.arange(half, 2 * half, device=self.device).repeat(2)
        own = self.predict(noisy, timesteps, kinds, {"patches": {"attn1_patch": [read_others(rows)]}})
        error = F.mse_loss(own[half:], noise[half:])
        abar = self.alphas[timesteps[:half]][:, None, None, None]
        clean = (noisy[:half] - (1 - abar).sqrt() * own[:half]) / abar.sqrt()
        told, strokes = manner_loss(clean, photo, painted, timesteps[:half] < TEXTURE_UNTIL)
        self.manner.append((told.item(), strokes.item()))
        # Clamped: a prediction far off its mark at one noisy row would steer the whole step, squared twice as it is.
        return error + MANNER_WEIGHT * (told + strokes).clamp(max=20), error.detach()

    def signal(self, timesteps):
        abar = self.alphas[timesteps][:, None, None, None]
        return (abar / (1 - abar)).sqrt()

    def train_step(self, size, count, rate):
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.pairs and self.step % MANNER_EVERY == 0 and count > 1:
            loss, error = self.manner_step(size, count)
        else:
            loss, error = self.plain_step(size, count)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.average_gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.images += count * self.world
        keep = min(0.9985, (1 + self.step) / (20 + self.step))
        for k, v in self.model.state_dict().items():
            self.average[k].lerp_(v, 1 - keep)
        return error.item()

    def average_gradients(self):
        if self.world == 1:
            return
        gradients = [p.grad for p in self.model.parameters()]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for gradient, mean in zip(gradients, (flat / self.world).split([g.numel() for g in gradients])):
            gradient.copy_(mean.view_as(gradient))

    def plan(self, minutes):
        """(rate, crop size, batch) of the next step, by rank 0's clock; rate 0 means stop."""
        progress = self.minutes / minutes
        rate = self.rate * min(1.0, (self.step + 1) / 150) * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * min(1, progress))))
        wide = progress > 0.4 and self.step % 4 == 0
        plan = torch.tensor([rate if progress < 1 else 0, 256 if wide else 128, max(2, self.batch // 4) if wide else self.batch],
                            dtype=torch.float64)
        if self.world > 1:
            dist.broadcast(plan, 0)
        return plan[0].item(), int(plan[1]), int(plan[2])

    def run(self, minutes, save_every=90.0):
        """Train until `minutes` in total (earlier runs counted in) have passed, by `clock`."""
        read = clock(self.device)
        before = saved = read()
        with open(self.work / "unet_log.jsonl", "a") as log:
            while True:
                rate, size, count = self.plan(minutes)
                if not rate:
                    break
                self.recent.append(self.train_step(size, count, rate))
                now = read()
                self.minutes, before = self.minutes + (now - before) / 60, now
                if self.rank == 0 and (now - saved > save_every or self.minutes >= minutes):
                    entry = {"step": self.step, "images": self.images, "minutes": round(self.minutes, 2), "rate": rate,
                             "train": sum(self.recent) / len(self.recent), "foreign": sum(self.foreign) / max(1, len(self.foreign)),
                             "manner": [sum(part) / len(self.manner) for part in zip(*self.manner)], "validation": self.validate()}
                    self.recent, self.foreign, self.manner = [], [], []
                    print(entry, flush=True)
                    log.write(json.dumps(entry) + "\n")
                    log.flush()
                    self.save()
                    saved = read()
