"""Updates of single batch rows, layer by layer, against the layer with the changed weight; and whose rows they are."""

import pytest
import torch
from comfy.weight_adapter.lora import LoRAAdapter
from torch import nn

from pastiche.nodes.host.multistyle.lora_batch import BASE, BatchedStyles, _check_shapes, _DenseRows, _locate, _low_rank, _LowRankRows

CPU, ROWS = torch.device("cpu"), (0, BASE, 1, 0)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(kind):
    torch.manual_seed(1)
    made = {
        "linear": lambda: nn.Linear(6, 4), "conv": lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1, dilation=2, groups=2),
        "group": lambda: nn.GroupNorm(2, 6, eps=0.1), "layer": lambda: nn.LayerNorm(6, eps=0.1),
    }[kind]()
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape)
    return made.requires_grad_(False)


def picture(kind, rows=4):
    return random(rows, 5, 6, seed=3) if kind in ("linear", "layer") else random(rows, 6, 9, 7, seed=3)


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("kind", ["linear", "conv", "group", "layer"])
def test_a_full_difference_changes_its_styles_rows_only(kind, part):
    module, x = layer(kind), picture(kind)
    difference = random(*getattr(module, part).shape, seed=5)
    before = getattr(module, part).clone()
    update = _DenseRows(module, part, 0, [(0.5, ("diff", (difference,)), 1.0, None, None)], f"x.{part}", CPU, torch.float32)
    assert torch.equal(getattr(module, part), before)
    plain = module(x)
    found = update(x, plain, ROWS)
    getattr(module, part).add_(0.5 * difference)
    changed = module(x)
    expected = torch.stack([(changed if style == 0 else plain)[row] for row, style in enumerate(ROWS)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (changed - plain).abs().max() > 0.1
    assert update(x, plain, (1, BASE, 1, 1)) is plain


@pytest.mark.parametrize("options", [
    dict(kernel_size=1), dict(kernel_size=1, stride=2), dict(kernel_size=1, padding=1), dict(kernel_size=1, padding="valid"),
    dict(kernel_size=3), dict(kernel_size=3, padding=1), dict(kernel_size=3, stride=2, padding=2, dilation=2), dict(kernel_size=(1, 3)),
])
def test_every_row_has_its_own_convolution(options):
    """Ranks differ; rows of no style and of the base stay as they are, bit for bit."""
    module, x = nn.Conv2d(6, 4, **options).requires_grad_(False), picture("conv", 5)
    size = module.weight.shape[2:]
    pairs = {0: (random(3, 6, *size, seed=1), random(4, 3, seed=2)), 2: (random(2, 6, *size, seed=3), random(4, 2, seed=4))}
    update, rows = _LowRankRows(module, pairs, 3, CPU, torch.float32), (0, BASE, 2, 1, 0)
    plain = module(x)
    found = update(x, plain, rows)
    for number, style in enumerate(rows):
        if style not in pairs:
            torch.testing.assert_close(found[number], plain[number], rtol=0, atol=0)
            continue
        down, up = pairs[style]
        weight = torch.einsum("or,rihw->oihw", up, down)
        expected = nn.functional.conv2d(x[number : number + 1], module.weight + weight, module.bias, module.stride, module.padding, module.dilation)
        torch.testing.assert_close(found[number : number + 1], expected, rtol=1e-4, atol=1e-4)
    assert update(x, plain, (1, BASE, 1, 1, BASE)) is plain
    torch.testing.assert_close(update(x, plain, (2,) * 5)[2:3], found[2:3], rtol=1e-5, atol=1e-5)  # other rows than before


def lora(up, down, alpha=None, middle=None, dora=None, reshape=None):
    return LoRAAdapter(set(), (up, down, alpha, middle, dora, reshape))


def test_plain_loras_become_one_pair_with_all_scales():
    linear, up, down = layer("linear"), random(4, 2), random(2, 6, seed=1)
    more = lora(random(4, 3, seed=2)[..., None, None], random(3, 6, seed=3)[..., None, None], alpha=6.0)
    found = _low_rank(linear, "weight", [(0.5, lora(up, down), 1.0, None, None), (2.0, more, 1.0, None, None)])
    wanted = 0.5 * up @ down + 2.0 * (6.0 / 3) * random(4, 3, seed=2) @ random(3, 6, seed=3)
    torch.testing.assert_close(found[1] @ found[0], wanted)
    assert found[0].shape == (5, 6) and found[1].shape == (4, 5)
    convolution = nn.Conv2d(6, 4, 3)
    down, up = _low_rank(convolution, "weight", [(1.0, lora(random(4, 2), random(2, 54)), 1.0, None, None)])
    assert down.shape == (2, 6, 3, 3) and torch.equal(down, random(2, 54).view(2, 6, 3, 3)) and torch.equal(up, random(4, 2))


def test_anything_else_is_none():
    linear, plain = layer("linear"), lora(random(4, 2), random(2, 6))
    assert _low_rank(linear, "weight", [(1.0, plain, 1.0, None, None)]) is not None
    for patch in (
        (1.0, plain, 0.5, None, None), (1.0, plain, 1.0, (0, 0, 2), None), (1.0, plain, 1.0, None, lambda weight: weight),
        (1.0, ("diff", (random(4, 6),)), 1.0, None, None), (1.0, lora(*plain.weights[:2], middle=random(2, 2)), 1.0, None, None),
        (1.0, lora(*plain.weights[:2], dora=random(4, 1)), 1.0, None, None), (1.0, lora(*plain.weights[:2], reshape=[4, 6]), 1.0, None, None),
    ):
        assert _low_rank(linear, "weight", [patch]) is None
    assert _low_rank(linear, "bias", [(1.0, plain, 1.0, None, None)]) is None
    assert _low_rank(layer("layer"), "weight", [(1.0, plain, 1.0, None, None)]) is None
    assert _low_rank(layer("conv"), "weight", [(1.0, lora(random(4, 2), random(2, 27)), 1.0, None, None)]) is None  # two groups


def test_places_and_shapes_that_do_not_fit_are_named():
    model = nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Embedding(3, 2)})
    assert _locate(model, "a.weight", "style")[1] == "weight" and _locate(model, "a.bias", "style") == (model["a"], "bias")
    for key in ("b.weight", "a.scale", "weight"):
        with pytest.raises(ValueError, match=f"^ink: its LoRA changes {key} "):
            _locate(model, key, "ink")
    _check_shapes(model["a"], (random(2, 6), random(4, 2)), "a.weight", "ink")
    for pair in ((random(2, 5), random(4, 2)), (random(2, 6), random(3, 2))):
        with pytest.raises(ValueError, match="^ink: the LoRA's a.weight is for a weight of"):
            _check_shapes(model["a"], pair, "a.weight", "ink")


def test_rows_of_a_layer_that_sees_the_batch_repeated():
    model = nn.ModuleDict({"a": nn.Linear(6, 4).requires_grad_(False)})
    pair, other = (random(4, 2), random(2, 6, seed=1)), (random(4, 1, seed=2), random(1, 6, seed=3))
    patches = [{"a.weight": [(2.0, lora(*each), 1.0, None, None)]} for each in (pair, other)]
    styles = BatchedStyles(model, patches, [0.5, 1.0], ["one", "two"], CPU, torch.float32)
    plain, x = model["a"](picture("linear")), picture("linear")
    styled, second = plain + x @ pair[1].T @ pair[0].T, plain + 2 * x @ other[1].T @ other[0].T

    def ask(rows, x):
        with styles.running(rows):
            return model["a"](x)

    with styles.attached():
        torch.testing.assert_close(ask((0, BASE, 1, 0), x), torch.stack([styled[0], plain[1], second[2], styled[3]]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ask((0, BASE), x), torch.cat([styled[:2], plain[2:]]), rtol=1e-5, atol=1e-5)  # every row twice
        for rows in ((0, 0, 0), (0,)):  # one style: however many rows
            torch.testing.assert_close(ask(rows, x), styled, rtol=1e-5, atol=1e-5)
        assert torch.equal(ask((BASE, BASE, BASE), x), plain) and torch.equal(model["a"](x), plain)
        with pytest.raises(ValueError, match="A layer got 4 rows for a batch of 3"):
            ask((0, BASE, 1), x)
        assert torch.equal(model["a"](x), plain)
    assert not model["a"]._forward_hooks
    with pytest.raises(ValueError, match="^two: the LoRA's a.weight is for a weight of"):
        BatchedStyles(model, [{}, {"a.weight": [(1.0, lora(random(4, 2), random(2, 5)), 1.0, None, None)]}], [1.0, 1.0], ["one", "two"], CPU, torch.float32)
