import pytest
import torch

from pastiche.nodes.algorithms.diffstyler import (
    blend_share,
    keep_outside,
    mix_predictions,
    normalise_masks,
    override_or_blend,
)


def test_masks_and_the_rest_are_a_partition(generator):
    masks = torch.rand(3, 2, 8, 8, generator=generator)
    masks[:, :, :2] = 0
    weights, rest = normalise_masks(masks)
    torch.testing.assert_close(weights.sum(dim=0) + rest, torch.ones(2, 8, 8))
    assert (rest[:, :2] == 1).all() and not weights[:, :, :2].any()
    crowded = masks.sum(dim=0) > 1
    assert crowded.any() and not rest[crowded].any()
    ratio = masks[0][crowded] / masks[1][crowded]
    torch.testing.assert_close(weights[0][crowded] / weights[1][crowded], ratio)


def test_a_single_mask_is_kept_exactly():
    mask = torch.rand(1, 1, 8, 8)
    weights, rest = normalise_masks(mask)
    assert torch.equal(weights, mask) and torch.equal(rest, 1 - mask[0])
    weights, rest = normalise_masks(torch.tensor([0.1, 0.2, 0.7]).view(3, 1, 1, 1))
    assert not rest.any()  # rounding is no rest


def test_mixture_is_the_masked_sum(generator):
    predictions = torch.randn(3, 2, 4, 8, 8, generator=generator)
    weights, rest = normalise_masks(torch.rand(2, 2, 8, 8, generator=generator) / 2)
    parts = [*zip(predictions, weights.unsqueeze(2)), (predictions[2], rest.unsqueeze(1))]
    loop = sum(weights[i].unsqueeze(1) * predictions[i] for i in range(2)) + rest.unsqueeze(1) * predictions[2]
    torch.testing.assert_close(mix_predictions(parts), loop)
    assert torch.equal(mix_predictions([(predictions[0], torch.ones(1, 1, 8, 8))]), predictions[0])


def test_outside_the_mask_the_content_stays_exactly(generator):
    sample, content = torch.randn(2, 2, 4, 8, 8, generator=generator)
    mask = torch.rand(1, 1, 8, 8, generator=generator)
    mask[..., :3], mask[..., 6:] = 0, 1
    kept = keep_outside(sample, content, mask)
    assert torch.equal(kept[..., :3], content[..., :3]) and torch.equal(kept[..., 6:], sample[..., 6:])
    soft = mask[..., 3:6]
    torch.testing.assert_close(kept[..., 3:6], soft * sample[..., 3:6] + (1 - soft) * content[..., 3:6])


def test_override_and_the_official_blend():
    ours, content = torch.zeros(2, 3), torch.ones(2, 3)
    assert override_or_blend(ours, content, 1.0) is content
    assert override_or_blend(ours, content, 0.25).eq(0.25).all()
    assert [blend_share(t) for t in (0, 250, 500, 999)] == [0.0, 0.5, 1.0, 1.0]


def test_later_masks_cover_earlier_ones():
    """Hard masks: the official code's loop of overwriting; soft ones: layers with an opacity."""
    generator = torch.Generator().manual_seed(4)
    hard = (torch.rand(3, 2, 6, 5, generator=generator, dtype=torch.float64) > 0.5).double()
    weights, rest = normalise_masks(hard, "later")
    winner = torch.full((2, 6, 5), -1)
    for number in range(3):
        winner[hard[number] > 0] = number
    for number in range(3):
        assert torch.equal(weights[number], (winner == number).double())
    assert torch.equal(rest, (winner == -1).double())
    soft = torch.rand(3, 2, 6, 5, generator=generator, dtype=torch.float64)
    values = torch.rand(3, 2, 6, 5, generator=generator, dtype=torch.float64)
    weights, rest = normalise_masks(soft, "later")
    layered = torch.ones(2, 6, 5, dtype=torch.float64)
    for mask, value in zip(soft, values):
        layered = (1 - mask) * layered + mask * value
    torch.testing.assert_close((weights * values).sum(0) + rest, layered)
    torch.testing.assert_close(weights.sum(0) + rest, torch.ones_like(rest))
    with pytest.raises(ValueError, match="share, later"):
        normalise_masks(soft, "first")
