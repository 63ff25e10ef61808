"""Style Reference as a node: its defaults, its presets, and the nodes that take its parts."""

import pytest
import torch
from pastiche.nodes.feature_injection import FeatureInjection
from pastiche.nodes.host.references.install import references_of
from pastiche.nodes.host.references.settings import PRESETS, Cures
from pastiche.nodes.host.trajectories.inversion import invert
from pastiche.nodes.multistyle import MultiStyleGuiderNode, StyleEntryNode
from pastiche.nodes.style_reference import StyleReference
from support.families import family_cond, family_latent, tiny_model
from support.sampling import sample, schedule


@pytest.fixture(scope="module")
def flux():
    return tiny_model("flux")


def execute(model, **inputs):
    return StyleReference.execute(model=model, **inputs).result[0]


def test_model_and_style_are_enough(flux):
    style = {"samples": family_latent("flux")}
    patched = execute(flux, style=style)
    (reference,) = references_of(patched)
    assert reference.cures == PRESETS["balanced"] and reference.share == "join" and reference.layers is None
    declared = {entry.id: entry.default for entry in StyleReference.define_schema().inputs if hasattr(entry, "default") and entry.default is not None}
    assert references_of(execute(flux, style=style, **declared))[0].cures == reference.cures
    result = sample(patched, family_latent("flux", seed=1), schedule(flux, 2, "simple"), family_cond("flux"))
    assert torch.isfinite(result).all()


def test_custom_reads_the_values_and_a_preset_says_what_it_ignores(flux, caplog):
    style = {"samples": family_latent("flux")}
    (reference,) = references_of(execute(flux, style=style, preset="custom", key_scale=1.4, position_shift=1.0))
    assert reference.cures == Cures(key_scale=1.4, position_shift=1.0)
    assert not caplog.text
    execute(flux, style=style, preset="plain", key_scale=1.4)
    assert 'preset "plain" sets key_scale; choose "custom"' in caplog.text


def test_a_picture_is_a_style_of_the_multi_style_guider(flux):
    entry = StyleEntryNode.execute(picture={"samples": family_latent("flux")}, share="replace", temperature=1.2).result[0]
    guider = MultiStyleGuiderNode.execute(flux, family_cond("flux"), family_cond("flux"), 1.0, {"style0": entry}).result[0]
    (reference,) = references_of(guider.model_patcher)
    assert (reference.row_style, reference.share, reference.temperature) == (0, "replace", 1.2)
    with pytest.raises(ValueError, match="A style has one source, got lora and picture"):
        StyleEntryNode.execute(lora={}, picture={"samples": family_latent("flux")})


def test_feature_injection_takes_a_trajectory_on_transformers(flux):
    trajectory = invert(flux, {"samples": family_latent("flux")}, schedule(flux, 2, "simple"), family_cond("flux"), "next")[1]
    (reference,) = references_of(FeatureInjection.execute(flux, trajectory=trajectory, mode="blend").result[0])
    assert reference.borrow.blends and reference.borrow.attention_steps == 0.5
    with pytest.raises(ValueError, match="^content: connect the features"):
        FeatureInjection.execute(flux)
