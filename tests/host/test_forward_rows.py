"""A forward's arguments with rows of references behind the sample's."""

import torch
from comfy.ldm.modules.attention import attention_pytorch

from pastiche.nodes.host.networks.rows import lengthen, own_conditions, without_control

REFERENCES = slice(2, 4)


def put(batch, value, repeatable=False, rows=2):
    return own_conditions({"c": batch}, rows, [(REFERENCES, {"c": (value, repeatable)})])["c"]


def test_what_has_a_row_for_each_is_lengthened_and_the_rest_passed_on():
    x, shared, number, other = torch.arange(4.0).view(2, 2), torch.ones(1, 3), torch.tensor(5.0), object()
    assert lengthen(x, 2, [1, 0])[2:].tolist() == [[2, 3], [0, 1]]
    for value in (shared, number, other, None):
        assert lengthen(value, 2, [1, 0]) is value
    both = lengthen([x, shared, [x]], 2, [1])
    assert both[0].shape == both[2][0].shape == (3, 2) and both[1] is shared


def test_references_get_nothing_from_a_controlnet():
    residual = torch.arange(6.0).view(2, 3)
    out = without_control({"input": [residual, residual[:1], None], "middle": []}, 2, 3)
    assert torch.equal(out["input"][0], torch.cat([residual, torch.zeros(3, 3)])) and out["input"][2] is None
    assert out["middle"] == []
    assert torch.equal(out["input"][1], torch.cat([residual[:1], residual[:1], torch.zeros(3, 3)]))
    assert without_control(None, 2, 3) is None


def test_contexts_of_other_lengths_are_cut_or_padded_with_zeros():
    batch, value = torch.zeros(4, 3, 2), torch.arange(1.0, 11).view(1, 5, 2)
    assert torch.equal(put(batch, value)[2:], value[:, :3].expand(2, 3, 2)) and not put(batch, value)[:2].any()
    assert not batch.any()
    padded = put(torch.ones(4, 7, 2), value)
    assert torch.equal(padded[2:], torch.cat([value, torch.zeros(1, 2, 2)], 1).expand(2, 7, 2)) and padded[:2].all()
    flat = torch.arange(1.0, 6)[None]
    assert torch.equal(put(torch.zeros(4, 3), flat)[2:], flat[:, :3].expand(2, 3))
    assert torch.equal(put(torch.ones(4, 6), flat)[2:], torch.cat([flat, torch.zeros(1, 1)], 1).expand(2, 6))


def test_repeated_contexts_attend_as_the_short_ones():
    """4 and 6 tokens, both repeated to 12."""
    generator = torch.Generator().manual_seed(0)
    batch, own = torch.randn(4, 6, 8, generator=generator), torch.randn(1, 4, 8, generator=generator)
    query = torch.randn(4, 5, 8, generator=generator)
    out = put(batch, own, True)
    assert out.shape == (4, 12, 8)
    expected = torch.cat([attention_pytorch(query[:2], batch[:2], batch[:2], 2), *(attention_pytorch(query[row : row + 1], own, own, 2) for row in (2, 3))])
    torch.testing.assert_close(attention_pytorch(query, out, out, 2), expected)


def test_values_that_do_not_fit_a_row_are_left_out():
    batch = torch.zeros(4, 3, 2)
    for value in (torch.ones(1, 3, 4), torch.ones(1, 3), torch.ones(1, 2, 3, 2), 7, None):
        assert put(batch, value) is batch
    shared = torch.zeros(1, 3, 2)
    assert put(shared, torch.ones(1, 3, 2)) is shared
    scalar = torch.tensor(0.0)
    assert put(scalar, torch.tensor(1.0)) is scalar and put(5, torch.ones(1, 2)) == 5
    assert own_conditions({}, 2, [(REFERENCES, {"c": (torch.ones(1, 2), False)})]) == {}
    fits = put(torch.zeros(4, 2, 3, 3), torch.ones(1, 2, 3, 3))
    assert fits[2:].all() and not fits[:2].any()
    assert put(batch.half(), torch.ones(1, 3, 2)).dtype == torch.float16
