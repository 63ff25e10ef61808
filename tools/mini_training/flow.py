"""Training of the mini flow transformer: rectified flow, Muon and AdamW, cosine rate over its minutes, EMA, resumable."""
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from .data import KINDS, Feed, pixels, square
from .diffusion import clock, save_atomically
from .transformer import CONFIG, FlowTransformer

UNIFORM = 0.25  # share of times drawn uniformly: an inversion begins at 0, where the logit-normal ones hardly come
WIDE_FROM = 0.55  # part of the time after which one step in four sees 256 px


def times(count, generator=None):
    """(count) times in 0..1: logit-normal (Esser et al. 2024, eq. 19, m = 0, s = 1) with a share of uniform ones.

    Stratified: the loss of one batch then says more about all times.
    """
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    u = u[torch.randperm(count, generator=generator)]
    normal = torch.special.ndtri(u.double().clamp(1e-4, 1 - 1e-4))
    uniform = torch.rand(count, generator=generator) < UNIFORM
    return torch.where(uniform, u.double(), torch.sigmoid(normal)).float()


class FlowTrainer:
    """Owns network, EMA copy, optimisers and the clock; `run` trains until its minutes are spent."""

    def __init__(self, encode, pools, validation, work, seed=0, device="cpu", rate=1.5e-3, batch=16, workers=0, config=CONFIG):
        self.encode, self.pools, self.work, self.workers = encode, pools, Path(work), workers
        self.device, self.rate, self.batch, self.seed = torch.device(device), rate, batch, seed
        self.model = FlowTransformer(len(KINDS), config, seed).to(self.device)
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        named = list(self.model.named_parameters())
        matrices = [p for n, p in named if "_blocks" in n and "mod" not in n and p.ndim == 2]
        chosen = {id(p) for p in matrices}
        self.optimizers = [
            torch.optim.Muon(matrices, rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([p for _, p in named if id(p) not in chosen], rate, betas=(0.9, 0.98), weight_decay=0.0)]
        self.step, self.images, self.minutes = 0, 0, 0.0
        self.recent = []
        self.seed_samplers()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.held_out = encode(torch.stack([square(p, 128) for p in validation[:48]]).to(self.device))
        self.held_out_t = torch.linspace(0.01, 0.99, len(self.held_out)).to(self.device)
        self.held_out_noise = torch.randn(self.held_out.shape, generator=generator).to(self.device)

    @property
    def checkpoint(self):
        return self.work / "transformer.pt"

    def seed_samplers(self, step=0):
        self.feed = Feed(self.pools, self.workers, [self.seed, step])
        torch.manual_seed(1000 * self.seed + step)

    def save(self):
        save_atomically({"model": self.model.state_dict(), "average": self.average, "step": self.step, "images": self.images,
                         "optimizers": [o.state_dict() for o in self.optimizers], "minutes": self.minutes}, self.checkpoint)

    def resume(self, shipped=None):
        """Goes on where the checkpoint stopped; without one from `shipped` (state, images), without both anew."""
        if self.checkpoint.exists():
            saved = torch.load(self.checkpoint, weights_only=True, map_location=self.device)
            self.model.load_state_dict(saved["model"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"]):
                optimizer.load_state_dict(state)
            self.average, self.step = saved["average"], saved["step"]
            self.images, self.minutes = saved["images"], saved["minutes"]
            self.seed_samplers(self.step)
        elif shipped:
            state, self.images = shipped
            self.model.load_state_dict(state)
            self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    def train_step(self, size, count, rate):
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        crops, kinds = (part.to(self.device) for part in self.feed(size, count))
        with torch.no_grad():
            latents = self.encode(pixels(crops))
        t = times(count).to(self.device)
        noise = torch.randn_like(latents)
        mixed = torch.lerp(latents, noise, t[:, None, None, None])
        loss = F.mse_loss(self.model(mixed, t, kinds, torch.bfloat16), noise - latents)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        self.images += count
        keep = min(0.9985, (1 + self.step) / (20 + self.step))
        for k, v in self.model.state_dict().items():
            self.average[k].lerp_(v, 1 - keep)
        return loss.detach()

    @torch.no_grad()
    def validate(self):
        """Mean squared error of the EMA's velocity on held-out photos of no named kind, at fixed times and noise."""
        own = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        losses = []
        for z, e, t in zip(self.held_out.split(16), self.held_out_noise.split(16), self.held_out_t.split(16)):
            mixed = torch.lerp(z, e, t[:, None, None, None])
            kinds = torch.zeros(len(z), dtype=torch.long, device=self.device)
            losses.append((self.model(mixed, t, kinds, torch.bfloat16) - (e - z)).square().mean(dim=(1, 2, 3)))
        self.model.load_state_dict(own)
        return torch.cat(losses).mean().item()

    def plan(self, minutes):
        """(rate, crop size, batch) of the next step; rate 0 means stop."""
        progress = self.minutes / minutes
        if progress >= 1:
            return 0.0, 0, 0
        rate = self.rate * min(1.0, (self.step + 1) / 150) * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * progress)))
        wide = progress > WIDE_FROM and self.step % 4 == 0
        return rate, 256 if wide else 128, max(2, self.batch // 4) if wide else self.batch

    def run(self, minutes, save_every=60.0):
        """Train until `minutes` in total (earlier runs counted in) have passed by `clock`, a checkpoint every `save_every` seconds."""
        read = clock(self.device)
        before = saved = read()
        with open(self.work / "transformer_log.jsonl", "a") as log:
            while True:
                rate, size, count = self.plan(minutes)
                if not rate:
                    break
                self.recent.append(self.train_step(size, count, rate))
                now = read()
                self.minutes, before = self.minutes + (now - before) / 60, now
                if now - saved > save_every or self.minutes >= minutes:
                    entry = {"step": self.step, "images": self.images, "minutes": round(self.minutes, 2), "rate": rate,
                             "train": torch.stack(self.recent).mean().item(), "validation": self.validate()}
                    self.recent = []
                    print(entry, flush=True)
                    log.write(json.dumps(entry) + "\n")
                    log.flush()
                    self.save()
                    saved = read()
