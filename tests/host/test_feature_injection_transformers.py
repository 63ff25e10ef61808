"""Feature Injection on transformers: what the content's row gives, and to whom."""

import comfy.ldm.modules.attention as attention
import pytest
import torch
from pastiche.nodes.host.injections.schedule import Schedule
from pastiche.nodes.host.references.install import borrow_structure, references_of
from pastiche.nodes.host.references.layout import Call, Layout
from pastiche.nodes.host.references.settings import Borrow
from pastiche.nodes.host.references.sharing import Part, Sharing
from pastiche.nodes.host.trajectories.inversion import invert
from support.families import family_cond, family_latent, tiny_model
from support.forwards import Rows, forward, model_of
from support.models import tiny_unet
from support.sampling import sample, schedule
from test_style_reference_run import SPAN, TEXT, a_reference, explicit, heads, tensors

ROUNDING = 1e-5  # of a result's deviation: a hundred float32 roundings


def borrowed(name, *steps, layers=("auto", "auto"), mode="override", seed=3, size=3):
    model = model_of(name)
    sigmas = schedule(model, size, "simple")
    content = {"samples": family_latent(name, seed=seed)}
    trajectory = invert(model, content, sigmas, family_cond(name, model=model), "next")[1]
    return trajectory, borrow_structure(model, trajectory, *steps, *layers, mode)


@pytest.mark.parametrize("axis", [1, 2])
def test_borrowing_is_the_explicit_attention_in_float64(axis):
    q, k, v = tensors(2, axis)
    borrow = Borrow(Schedule(torch.tensor([1.0, 0.0])), 1.0, 1.0, None, None, True)
    reference = a_reference((), borrow=borrow)

    def run(attention_calls, feature_calls, progress):
        part = Part(reference, None, (0,), (), slice(1, 2), frozenset({0}), frozenset(attention_calls), frozenset(feature_calls))
        sharing = Sharing(Layout((Call(q.shape[axis], SPAN),)), [part], 1, (4, 8), True, progress, None, None)
        return sharing(attention.attention_pytorch, q, k, v, 2, skip_reshape=axis == 2)

    plain = explicit(*(heads(x, axis) for x in (q, k, v)))
    q_own, k_own, v_own = (heads(x, axis) for x in (q, k, v))
    mixed = [x[:1].clone() for x in (q_own, k_own)]
    for x, source in zip(mixed, (q_own, k_own)):
        x[:, :, TEXT:] = 0.5 * source[1:, :, TEXT:] + 0.5 * source[:1, :, TEXT:]  # blend: 2 t / 1000 at t = 250
    out = run({0}, {}, 0.75)
    assert (out[:1] - explicit(*mixed, v_own[:1])).abs().max() < 1e-12 and (out[1:] - plain[1:]).abs().max() < 1e-12
    out = run({}, {0}, 0.0)
    assert (out[:1, :TEXT] - plain[:1, :TEXT]).abs().max() < 1e-12
    assert (out[:1, TEXT:] - plain[1:, TEXT:]).abs().max() < 1e-12 and (out[1:] - plain[1:]).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["flux", "sd35_medium", "z_image", "hidream", "wan", "omnigen2", "lens"])
def test_a_content_gives_itself_nothing_and_another_sample_its_structure(name):
    trajectory, patched = borrowed(name, 1.0, 1.0)
    sigma, level, other, rows = float(trajectory.sigmas[2]), trajectory.latents[2], family_latent(name, seed=9), Rows()
    own, twice = forward(name, level, patched, sigma=sigma), forward(name, torch.cat([level, level]), sigma=sigma)[:1]
    assert (own - twice).abs().max() <= ROUNDING * twice.std()  # HiDream adds its experts up in an order that threads change
    styled = forward(name, other, patched, sigma=sigma, extra=rows)
    pair = forward(name, torch.cat([other, level]), sigma=sigma)
    assert (rows.outputs[-1][1:] - pair[1:]).abs().max() <= ROUNDING * pair.std()
    assert (styled - pair[:1]).std() > 1e-3 * (other - pair[:1]).std()


def test_steps_and_layers():
    """Of six image calls: features in the middle third, for 4 of 10 steps; queries and keys in all of them, for 7."""
    _, patched = borrowed("flux", 0.4, 0.7, size=10)
    borrow = references_of(patched)[0].borrow
    levels = schedule(model_of("flux"), 10, "simple").tolist()[:10]
    counts = [tuple(map(len, borrow.layers(sigma, 6))) for sigma in levels]
    assert counts == [(6, 2)] * 4 + [(6, 0)] * 3 + [(0, 0)] * 3
    assert borrow.layers(levels[0], 6)[1] == {2, 3}
    chosen = references_of(borrowed("flux", 1.0, 1.0, layers=("1", "none"))[1])[0].borrow
    assert chosen.layers(levels[0], 6) == (frozenset(), {1})
    with pytest.raises(ValueError, match="layers: Flux has 4 attention layers about the picture, 0-3; got 9"):
        forward("flux", family_latent("flux"), borrowed("flux", 1.0, 1.0, layers=("9", "auto"))[1], sigma=levels[1])


def test_the_trajectory_must_be_as_large_as_the_sample_and_end_as_high():
    trajectory, patched = borrowed("flux", 1.0, 1.0)
    sigmas = trajectory.schedule
    with pytest.raises(ValueError, match="trajectory: its latent is 8x12 .height x width., the sampled one 8x8"):
        sample(patched, family_latent("flux", size=(8, 8)), sigmas, family_cond("flux"))
    model = model_of("flux")
    late = invert(model, {"samples": family_latent("flux")}, sigmas[1:], family_cond("flux"), "next")[1]
    with pytest.raises(ValueError, match="trajectory: the inversion ends at sigma"):
        sample(borrow_structure(model, late, 1.0, 1.0, "auto", "auto", "override"), family_latent("flux"), sigmas, family_cond("flux"))


def test_refusals_and_nothing_to_do():
    trajectory, patched = borrowed("flux", 0.0, 0.5, layers=("auto", "none"))
    assert references_of(patched) == ()
    with pytest.raises(ValueError, match="^trajectory: it is for transformers; .* is a U-Net"):
        borrow_structure(tiny_unet(), trajectory, 0.5, 0.5, "auto", "auto", "override")
    with pytest.raises(ValueError, match="The trajectory's latents were made with another model"):
        borrow_structure(tiny_model("sd3"), trajectory, 0.5, 0.5, "auto", "auto", "override")
