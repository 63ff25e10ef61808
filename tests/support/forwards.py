"""Single predictions of the tiny models, as a sampler's step asks for them, and what reaches the network."""

import functools

import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from pastiche.nodes.host.references.run import KEY, ReferenceRun
from pastiche.nodes.host.networks.rows import condition_rows

from .families import family_cond, tiny_model


@functools.lru_cache(maxsize=None)
def model_of(name):
    return tiny_model(name)


@functools.lru_cache(maxsize=None)
def cond_of(name):
    return family_cond(name, model=model_of(name))


def forward(name, x, patched=None, share=0.7, extra=None, text=None, sigma=None):
    """One denoised prediction, as a sampler's step asks for it, after `share` of the noise or at `sigma`; `extra` sees every batch that reaches the network."""
    model = (patched or model_of(name)).model
    sigma = torch.tensor([float(model.model_sampling.percent_to_sigma(1 - share) if sigma is None else sigma)])
    options = {"cond_or_uncond": [0], "uuids": [0], "sigmas": sigma, "sample_sigmas": torch.tensor([float(sigma), 0.0]), KEY: ReferenceRun(tuple(x.shape))}
    if patched is not None:
        options["wrappers"] = {kind: dict(wrappers) for kind, wrappers in patched.wrappers.items()}
    if extra is not None:
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", extra, options)
    conditions = condition_rows(model, text or cond_of(name), x[:1])
    kwargs = {key: value.repeat(len(x), *[1] * (value.ndim - 1)) if isinstance(value, torch.Tensor) and value.ndim else value for key, (value, _) in conditions.items()}
    with torch.no_grad():
        return model.apply_model(x, sigma.expand(len(x)), transformer_options=options, **kwargs)


class Rows:
    """Counts the rows that reach the network."""

    def __init__(self):
        self.count, self.outputs = 0, []

    def __call__(self, executor, x, *args, **kwargs):
        self.count += x.shape[0]
        out = executor(x, *args, **kwargs)
        self.outputs.append(out)
        return out
