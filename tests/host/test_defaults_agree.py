"""Numbers that stand in two places agree: a node's widget, its help page, and what the code takes when it is called without."""

import dataclasses
import inspect
import re
from dataclasses import is_dataclass

import pytest

from pastiche.nodes import fastsam as fastsam_nodes
from pastiche.nodes import injectfusion as injectfusion_nodes
from pastiche.nodes import inversion as inversion_nodes
from pastiche.nodes import style_reference as reference_nodes
from pastiche.nodes import styleid as styleid_nodes
from pastiche.nodes import training as training_nodes
from pastiche.nodes.algorithms import inversion as inversion_steps
from pastiche.nodes.algorithms import overlay, prompts, references, segments, slerp, styleid
from pastiche.nodes.host.fastsam import prompt
from pastiche.nodes.host.fastsam.model import FastSAM
from pastiche.nodes.host.injections import base, beside, hints, hspace
from pastiche.nodes.host.injections.injectfusion_sampler import injectfusion_sampler, sample_injectfusion
from pastiche.nodes.host.multistyle import guider
from pastiche.nodes.host.networks import unconditional_checkpoint, unconditional_layouts, unet
from pastiche.nodes.host.references import layout, settings, sharing, sources
from pastiche.nodes.host.references.install import style_reference
from pastiche.nodes.host.training import loop
from pastiche.nodes.host.trajectories import ddim_sampler, inversion, latent_adain
from pastiche.nodes.sockets import StyleEntry

def widgets(node):
    return {part.id: part.default for part in node.define_schema().inputs if getattr(part, "default", None) is not None}


def defaults(function):
    return {name: part.default for name, part in inspect.signature(function).parameters.items() if part.default is not part.empty}


@pytest.mark.parametrize("function, node, names", [
    (loop.TrainingSettings, training_nodes.TrainStyleLoRA, "steps rank alpha learning_rate targets seed batch_size flip crop min_snr_gamma "
     "precision gradient_checkpointing keep_on_cancel preview_every schedule clean_weight validation_every"),
    (prompt.Finish, fastsam_nodes.FastSAMPrompt, "merge invert grow feather"),
    (prompt.Prompt, fastsam_nodes.FastSAMPrompt, "count mode"),
    (prompt.prompt_masks, fastsam_nodes.FastSAMPrompt, "resolution confidence overlap"),
    (FastSAM.segment, fastsam_nodes.FastSAMPrompt, "resolution confidence overlap"),
    (segments.decode_segments, fastsam_nodes.FastSAMPrompt, "confidence overlap"),
    (sample_injectfusion, injectfusion_nodes.InjectFusionSampler, "omega t_boost dt_lambda"),
    (injectfusion_sampler, injectfusion_nodes.InjectFusionSampler, "dt_lambda"),
    (hspace.inject_content, injectfusion_nodes.HSpaceSlerp, "match_norm"),
    (hspace.HSpacePatches, injectfusion_nodes.HSpaceSlerp, "match_norm"),
    (inversion.invert, inversion_nodes.DDIMInversion, "scheme iterations substeps tolerance clean_level"),
    (inversion_steps.Leg, inversion_nodes.DDIMInversion, "iterations"),
    (ddim_sampler.ddim_sampler, inversion_nodes.DDIMSampler, "clean_level skip_steps"),
    (ddim_sampler.sample_ddim, inversion_nodes.DDIMSampler, "clean_level skip_steps"),
    (latent_adain.latent_adain, styleid_nodes.LatentAdaIN, "epsilon"),
    (latent_adain.noise_adain, styleid_nodes.LatentAdaIN, "epsilon"),
    (styleid.adain, styleid_nodes.LatentAdaIN, "epsilon"),
    (style_reference, reference_nodes.StyleReference, "noise_seed"),
])
def test_without_a_value_the_code_takes_the_widgets(function, node, names):
    declared, own = widgets(node), defaults(function)
    for name in names.split():
        assert own[name] == declared[name], name


def test_seeds_and_flags_of_samplers():
    assert defaults(sample_injectfusion)["boost_seed"] == widgets(injectfusion_nodes.InjectFusionSampler)["seed"] == 0
    assert defaults(slerp.masked_slerp)["matched"] is defaults(slerp._arc)["matched"] is widgets(injectfusion_nodes.HSpaceSlerp)["match_norm"]


def test_cures_change_nothing_by_themselves():
    assert settings.Cures() == settings.Cures(
        key_scale=1.0, untwist_high=1.0, untwist_low=1.0, untwist_beta=1.0, position_shift=0.0, token_adain=0.0, leak_guard=0.0
    )
    assert not settings.Cures().needs_rotation
    for changed in (dict(untwist_high=0.5), dict(untwist_low=0.5), dict(position_shift=-1.0)):
        assert settings.Cures(**changed).needs_rotation
    assert not settings.Cures(key_scale=2.0, untwist_beta=2.0, token_adain=1.0, leak_guard=1.0).needs_rotation


def test_presets_are_those_of_the_help_page(repository):
    page = (repository / "js" / "docs" / "PasticheStyleReference.md").read_text(encoding="utf-8")
    number = r"([\d.]+)"
    balanced = re.search(rf'"balanced" \(key_scale {number}, untwist {number} to {number}, token_adain {number}\)', page)
    more = re.search(rf'"more style" \({number}, {number} to {number}, {number}\)', page)
    for name, found in (("balanced", balanced), ("more style", more)):
        scale, high, low, adain = map(float, found.groups())
        assert settings.PRESETS[name] == settings.Cures(key_scale=scale, untwist_high=high, untwist_low=low, token_adain=adain)
    assert settings.PRESETS["plain"] == settings.Cures()


def test_choices_of_heads_mean_what_they_say():
    assert unconditional_layouts.HEADS["auto"] is None
    for text, (heads, channels) in list(unconditional_layouts.HEADS.items())[1:]:
        number = int(text.split()[0])
        assert (heads, channels) == ((None, number) if "channels" in text else (number, None))


@pytest.mark.parametrize("kind", [
    inversion_steps.Leg, inversion_steps.Landing, overlay.Layers, prompts.Points, prompts.Boxes, references.RotaryLayout, segments.Segments,
    prompt.Prompt, prompt.Finish, prompt.Result, base.Source, beside.Beside, hints.Other, hints.Expected, hints._Likeness,
    unconditional_checkpoint.Reading, unconditional_checkpoint.Weights, unconditional_layouts.Layer, unconditional_layouts.Layout,
    unet.UNet, layout.Call, layout.Layout, settings.Cures, settings.Borrow, settings.Reference, sharing.Part, sources.PictureSource,
    sources.TrajectorySource, loop.TrainingSettings, StyleEntry,
], ids=lambda kind: kind.__qualname__)
def test_settings_and_results_cannot_be_written_to(kind):
    """They are shared between runs and caches."""
    assert is_dataclass(kind) and kind.__dataclass_params__.frozen
    value = object.__new__(kind)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, dataclasses.fields(kind)[0].name, None)


def test_networks_are_told_apart_by_identity():
    """Two adapters of like networks are two: their tensors have no one answer to being equal."""
    assert not unet.UNet.__dataclass_params__.eq


def test_small_defaults():
    """What a field means when nothing is said of it."""
    leg = defaults(inversion_steps.Leg)
    assert leg["smallest"] == 0.0 and leg["input_scale"](3.0) == 1.0 and defaults(inversion_steps.Landing)["settled"] is True
    assert defaults(base.Source)["beside"] is False and defaults(hints.Expected)["unguided"] is False
    assert defaults(settings.Reference)["unrotated"] is False
    assert defaults(segments.decode_segments)["stride"] == 4.0  # the prototypes' grid is a quarter of the network's
    assert unconditional_checkpoint.Reading() == unconditional_checkpoint.Reading("auto", "auto", "auto", 0)
    assert defaults(unconditional_layouts.Layer)["kernel"] == 1
    assert defaults(guider.StyleEntry)["strength"] == 1.0
