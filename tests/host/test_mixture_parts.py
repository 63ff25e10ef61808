"""What the Multi-Style Guider's mixture does at its edges: windows of a batch, masks on other grids, conditions of a part."""

import types

import comfy.conds
import pytest
import torch

from pastiche.nodes.host.multistyle.guider import MultiStyleGuider, style_entry
from pastiche.nodes.host.multistyle.lora_batch import BASE
from pastiche.nodes.host.multistyle.mixture import StyleMixture, _rows_of, cond_name
from pastiche.nodes.host.multistyle.sources import _among, _belongs, _identity, _same
from pastiche.nodes.sockets import StyleEntry


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def mixture(*masks, conds=None, ranges=None, overlap="share"):
    guider = types.SimpleNamespace(conds=conds or {"positive": [], "negative": []})
    return StyleMixture(guider, None, list(masks), ranges or [(0.0, 10.0)] * len(masks), overlap)


def window(frames=None, count=2, masks=None, **options):
    masks = [random(5, 4, 4)] if masks is None else masks
    if frames is not None:
        options["context_window"] = types.SimpleNamespace(index_list=frames)
    return mixture(*masks)._window(torch.zeros(count, 4, 4, 4), {"transformer_options": options})


def test_which_samples_a_forward_holds():
    assert window(count=5) == (0, 1, 2, 3, 4) and window([3, 4]) == (3, 4) and window(ad_params={"sub_idxs": [1, 0]}) == (1, 0)
    same = [random(1, 4, 4).expand(5, 4, 4), torch.ones(5, 4, 4)]
    assert window(count=2, masks=same) == (0, 0) and window([0, 1, 2], count=3, masks=same) == (0, 1, 2)
    assert mixture(*same)._window(torch.zeros(2, 4, 4, 4), {}) == (0, 0)
    for frames in (None, [3, 5], [0, 1, 2]):  # none said, beyond the batch, another count
        with pytest.raises(ValueError, match="^styles: a node evaluates 2 of 5 samples"):
            window(frames)
    with pytest.raises(ValueError, match="^styles"):
        window(masks=[same[0], random(5, 4, 4)])


@pytest.mark.parametrize("size", [(4, 4), (2, 4), (4, 2)])
def test_weights_of_a_window_sum_to_one_on_any_grid(size):
    masks = [0.3 * random(3, 4, 4), 0.5 * random(3, 4, 4, seed=1)]
    x = torch.zeros(2, 4, *size, dtype=torch.float64)
    parts = mixture(*masks)._parts((0, 1), (2, 0), x)
    assert [style for style, _ in parts] == [0, 1, BASE]
    assert all(weight.shape == (2, 1, *size) and weight.dtype == torch.float64 for _, weight in parts)
    torch.testing.assert_close(sum(weight for _, weight in parts), torch.ones(2, 1, *size, dtype=torch.float64), rtol=0, atol=1e-6)
    for (_, weight), mask in zip(parts, masks):
        expected = torch.nn.functional.adaptive_avg_pool2d(mask[[2, 0]][:, None], size)
        torch.testing.assert_close(weight.float(), expected, rtol=1e-5, atol=1e-6)


def test_a_film_has_its_mask_on_every_frame():
    parts = mixture(torch.ones(1, 4, 4))._parts((0,), (0,), torch.zeros(1, 4, 3, 4, 4))
    assert [style for style, _ in parts] == [0] and parts[0][1].shape == (1, 1, 1, 4, 4)


def test_styles_are_on_between_the_ends_of_their_ranges():
    own = mixture(torch.ones(1, 2, 2), torch.zeros(1, 2, 2), torch.ones(1, 2, 2), ranges=[(1.0, 4.0), (0.0, 9.0), (4.0, 9.0)])
    assert [own._active(sigma) for sigma in (0.9, 1.0, 4.0, 4.1, 9.0, 9.1)] == [(), (0,), (0, 2), (2,), (2,), ()]


def test_a_styles_own_prompt_replaces_the_positive_only():
    positive, negative = [{"uuid": "p"}], [{"uuid": "n"}]
    theirs = [{"uuid": "t", "model_conds": {"c": comfy.conds.CONDRegular(random(3, 2))}}]
    own = mixture(random(3, 4, 4), random(3, 4, 4), conds={"positive": positive, "negative": negative, cond_name(1): theirs})
    every, part = (0, 1, 2), (2, 0)
    assert own._condition(1, positive, every, {}) is theirs and own._condition(BASE, positive, every, {}) is positive
    assert own._condition(1, None, every, {}) is None
    cut = own._condition(1, [{"uuid": "p", "x": 1}], part, {})
    assert torch.equal(cut[0]["model_conds"]["c"].cond, theirs[0]["model_conds"]["c"].cond[[2, 0]])
    for style, cond in ((0, positive), (1, negative)):
        (copied,) = own._condition(style, cond, every, {})
        assert copied["uuid"] != cond[0]["uuid"] and copied == own._condition(style, cond, every, {})[0]
    assert own._condition(0, negative, every, {})[0]["uuid"] != own._condition(1, negative, every, {})[0]["uuid"]


def test_conditions_with_a_row_for_each_sample_keep_their_window():
    each, shared, number = (comfy.conds.CONDRegular(random(*shape)) for shape in ((3, 2), (1, 2), (4, 2)))
    entry = {"uuid": 1, "model_conds": {"a": each, "b": shared, "c": number, "d": comfy.conds.CONDConstant(5)}}
    found = _rows_of(entry, (2, 0), 3)["model_conds"]
    assert torch.equal(found["a"].cond, each.cond[[2, 0]]) and found["b"] is shared and found["c"] is number
    assert found["d"].cond == 5
    single = {"model_conds": {"b": shared}}
    assert _rows_of(single, (0, 0), 1)["model_conds"]["b"] is shared and _rows_of({}, (0,), 3) == {"model_conds": {}}


def test_masks_of_a_style_are_one_or_as_many_as_samples():
    def check(shape, batch=2):
        guider = types.SimpleNamespace(styles=[StyleEntry(mask=torch.ones(shape))], names=["ink"])
        MultiStyleGuider._check_masks(guider, torch.zeros(batch, 4, 8, 8))

    for shape in ((8, 8), (1, 8, 8), (2, 8, 8)):
        check(shape)
    with pytest.raises(ValueError, match="^ink: 3 masks for 2 samples"):
        check((3, 8, 8))


@pytest.mark.parametrize("entry, expected", [
    (dict(strength=0.5), 1.0), (dict(strength=0.5, features=object()), 0.5), (dict(strength=0.5, picture=object()), 0.5),
    (dict(strength=3.0, picture=object()), 1.0), (dict(strength=-1.0, features=object()), 0.0),
])
def test_the_strength_of_features_and_pictures_is_in_the_mask(entry, expected):
    guider = types.SimpleNamespace()
    noise = torch.zeros(2, 4, 4, 6)
    assert torch.equal(MultiStyleGuider._mask(guider, StyleEntry(**entry), noise), torch.full((2, 4, 6), expected))
    half = torch.zeros(8, 12)
    half[:, 6:] = 2.0
    found = MultiStyleGuider._mask(guider, StyleEntry(mask=half, **entry), noise)
    assert torch.equal(found[1, 0], expected * torch.tensor([0.0, 0, 0, 1, 1, 1]))


def test_one_source_a_style():
    assert style_entry("none", start_percent=0.5, end_percent=0.5).lora is None
    with pytest.raises(ValueError, match="^start_percent 0.6 lies after end_percent 0.5"):
        style_entry("none", start_percent=0.6, end_percent=0.5)
    with pytest.raises(ValueError, match="^A style has one source, got model and lora_name"):
        style_entry("a.safetensors", model=object(), start_percent=0.0, end_percent=1.0)


def test_like_hooks_and_patches():
    a, b = [1], [1]
    assert _same(a, a) and _same(1, 1.0) and _same(None, None) and not _same(object(), object()) and not _same(1, 2)
    assert _same((1, a), [1, a]) and _same(a, b) and not _same((1,), (1, 2)) and not _same((1,), 1)
    assert _among(2, (1, 2)) and not _among(3, (1, 2)) and not _among(3, ())
    adapter, function = object(), lambda x: x
    patch = (1.0, adapter, 1.0, None, None)
    assert _identity(patch) == _identity((1.0, adapter, 1.0, None, None))
    for other in ((0.5, adapter, 1.0, None, None), (1.0, object(), 1.0, None, None), (1.0, adapter, 0.5, None, None),
                  (1.0, adapter, 1.0, (0, 0, 1), None), (1.0, adapter, 1.0, None, function)):
        assert _identity(patch) != _identity(other)


@pytest.mark.parametrize("key, belongs", [
    ("unet.a.lora_up.weight", True), ("unet.a.alpha", True), ("unet.a_lora.up.weight", True), ("unet.b.alpha", False),
    ("unet.a", False), ("x", False),
])
def test_tensors_of_known_layers(key, belongs):
    assert _belongs(key, {"unet.a": 1}) is belongs
