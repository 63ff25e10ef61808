import pytest
import torch
from support.models import tiny_cond, tiny_unet
from support.sampling import random_latent, sample, schedule

from pastiche.nodes.feature_injection import FeatureInjection
from pastiche.nodes.features import CaptureFeatures
from pastiche.nodes.inversion import DDIMInversion
from pastiche.nodes.keep_outside import KeepOutside


@pytest.mark.parametrize("node, identifier", [(FeatureInjection, "PasticheFeatureInjection"), (KeepOutside, "PasticheTrajectoryBlend")])
def test_schemas(node, identifier):
    schema = node.GET_SCHEMA()
    assert schema.node_id == identifier
    assert all(entry.tooltip for entry in [*schema.inputs, *schema.outputs])


def test_frozen_inputs():
    ids = lambda node: [entry.id for entry in node.GET_SCHEMA().inputs]
    assert ids(KeepOutside) == ["model", "trajectory", "mask"]
    assert ids(FeatureInjection)[:8] == ["model", "content", "feature_steps", "attention_steps", "feature_layers",
                                         "self_attention_layers", "cross_attention_layers", "mode"]


def test_the_nodes_work_together():
    """The paper's thinned inversion (forward steps per kept step), capture, injection, mask."""
    model = tiny_unet()
    sigmas, positive = schedule(model, 4), tiny_cond(model)
    noise, trajectory, *_ = DDIMInversion.execute(
        model, {"samples": random_latent()}, sigmas, positive, scheme="next", substeps=5
    ).result
    assert trajectory.steps == 4
    (content,) = CaptureFeatures.execute(
        model, trajectory, streams="residual, self_attention_qk, cross_attention", layers="3-11"
    ).result
    (injected,) = FeatureInjection.execute(model, content).result
    mask = torch.zeros(1, 64, 64)
    mask[..., 32:] = 1
    (kept,) = KeepOutside.execute(injected, trajectory, mask).result
    out = sample(kept, noise["samples"], sigmas, tiny_cond(model, seed=3))
    clean = model.model.process_latent_out(trajectory.latents[0])
    assert torch.equal(out[..., :4], clean[..., :4]) and torch.isfinite(out).all()
    assert not torch.allclose(out[..., 4:], clean[..., 4:])
