"""Style Reference's parts: what a row shows at a level, which calls and rows it acts on, weights, masks of other nodes."""

import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch

from pastiche.nodes.host.injections.schedule import Schedule, SigmaRange
from pastiche.nodes.host.references.install import _say_what_has_no_effect, _styles, borrow_structure, parse_weights, picture_latents, references_of
from pastiche.nodes.host.references.layout import Call, Layout, Probe, chained, named, small_shape, token_axis
from pastiche.nodes.host.references.run import StyleReferences, _Added, _cropped, _first_rows, _shapes, borrowed_calls, chosen_calls
from pastiche.nodes.host.references.settings import Borrow, Cures, Reference
from pastiche.nodes.host.references.sharing import Part, Sharing, _lengthened, _normalised, _rows_of, _unconditional
from pastiche.nodes.host.references.sources import PictureSource, TrajectorySource, seeded_noise
from pastiche.nodes.host.trajectories.inversion import invert
from pastiche.nodes.sockets import Fingerprint, Trajectory
from support.families import family_cond, family_latent, tiny_model
from support.sampling import schedule

LEVELS = [0.0, 1.0, 3.0]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trajectory(batch=2):
    return Trajectory(torch.tensor(LEVELS), random(3, batch, 4, 2, 2), [[None, {}]], "next", Fingerprint("w", "p"))


def reference(**settings):
    settings = dict(
        styles=((PictureSource(torch.zeros(1)), 1.0),), content=None, share="join", gamma=0.0, gamma_end=0.0, schedule="constant",
        temperature=1.0, strength=1.0, mask=None, places=None, layers=None, sigmas=SigmaRange(), noise_seed=0, family="Test",
    ) | settings
    return Reference(**settings)


def shown(sigma, rows=(1,)):
    return TrajectorySource(trajectory(), rows).at(torch.tensor(sigma), torch.zeros(1, 4, 2, 2), None)


@pytest.mark.parametrize("sigma, low, share", [
    (0.0, 0, 0.0), (1.0, 1, 0.0), (3.0, 2, 0.0), (9.0, 2, 0.0), (2.0, 1, 0.5), (1.5, 1, 0.25), (0.4, 0, 0.4),
    (1.00002, 1, 0.0), (2.99998, 2, 0.0),
])
def test_a_trajectorys_row_lies_on_the_straight_line_between_its_levels(sigma, low, share):
    latents = trajectory().latents[:, 1:]
    expected = latents[low] if not share else (1 - share) * latents[low] + share * latents[low + 1]
    torch.testing.assert_close(shown(sigma), expected, rtol=0, atol=0 if not share else 1e-6)
    assert shown(2.0, (1, 0)).shape == (2, 4, 2, 2)


@pytest.mark.parametrize("sigma, due, refused", [
    (3.014, SigmaRange(), False), (3.016, SigmaRange(), True), (5.0, SigmaRange(4.0, 0.0), False),
    (5.0, SigmaRange(6.0, 4.5), True),
    (2.0, SigmaRange(), False),
])
def test_an_inversion_that_ends_below_the_sampling_is_refused(sigma, due, refused):
    source, sigmas = TrajectorySource(trajectory(), (0,)), torch.tensor([sigma, 1.0, 0.0])
    if not refused:
        source.check("style_trajectory", sigmas, due)
        return
    with pytest.raises(ValueError, match=f"^style_trajectory: the inversion ends at sigma 3.000, sampling asks for {sigma:.3f}"):
        source.check("style_trajectory", sigmas, due)


@pytest.mark.parametrize("name", ["sd15", "flux", "wan"])
def test_a_picture_is_noised_as_its_models_equation_says(name):
    sampling = tiny_model(name).model.model_sampling
    latent, noise, sigma = family_latent(name, seed=1), family_latent(name, seed=2), torch.tensor(0.7)
    found = PictureSource(latent).at(sigma, noise, sampling)
    expected = latent + 0.7 * noise if name == "sd15" else 0.3 * latent + 0.7 * noise
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_noise_of_references():
    a = seeded_noise((4, 8, 8), 2**64 - 1)
    assert a.shape == (1, 4, 8, 8) and torch.equal(a, seeded_noise((4, 8, 8), 2**64 - 1))
    assert not torch.equal(a, seeded_noise((4, 8, 8), 0))


@pytest.mark.parametrize("text, expected", [("0, 2", [0, 1]), ("1, 3", [0.25, 0.75]), (" ", [0.5, 0.5]), ("0.5,0.5", [0.5, 0.5])])
def test_weights_sum_to_one(text, expected):
    assert parse_weights(text, 2) == expected


def test_what_a_trajectory_makes_useless_is_said(caplog):
    model = tiny_model("flux")
    inverted = invert(model, {"samples": family_latent("flux")}, schedule(model, 2, "simple"), family_cond("flux"), "next")[1]
    picture, prompt = {"samples": family_latent("flux")}, family_cond("flux")
    caplog.set_level("INFO")
    for style, positive, told in ((None, None, []), (picture, None, ["both connected"]), (None, prompt, ["style_positive has no effect"])):
        caplog.clear()
        ((source, weight),) = _styles(model, style, inverted, "", positive)
        assert source.trajectory is inverted and weight == 1 and [part in caplog.text for part in ("both connected", "style_positive has no effect")] == [
            part in told for part in ("both connected", "style_positive has no effect")
        ]
    ((source, _),) = _styles(model, picture, None, "", prompt)
    assert source.conditioning is prompt
    with pytest.raises(ValueError, match="^style_positive: a reference takes one conditioning, got 2"):
        _styles(model, picture, None, "", prompt * 2)


def test_a_still_picture_is_one_frame_of_a_film_model():
    model = tiny_model("wan")
    latent = model.model.process_latent_out(family_latent("wan", batch=2))
    assert torch.equal(picture_latents(model, {"samples": latent[:, :, 0]}, "style"), picture_latents(model, {"samples": latent}, "style"))
    with pytest.raises(ValueError, match="^style: its latent is"):
        picture_latents(tiny_model("flux"), {"samples": latent}, "style")


@pytest.mark.parametrize("changes", [
    dict(feature_steps=0.0, attention_steps=0.0), dict(feature_layers="none", attention_layers=""), dict(feature_steps=0.0, attention_layers="none"),
    dict(attention_steps=0.0, feature_layers=" None "),
])
def test_borrowing_nothing_leaves_the_model_alone(changes):
    model = tiny_model("flux")
    content = invert(model, {"samples": family_latent("flux")}, schedule(model, 2, "simple"), family_cond("flux"), "next")[1]
    settings = dict(feature_steps=0.5, attention_steps=0.5, feature_layers="auto", attention_layers="auto", mode="override")
    assert not references_of(borrow_structure(model, content, **settings | changes))
    (found,) = references_of(borrow_structure(model, content, **settings))
    assert found.content_input == "trajectory" and not found.styles and not found.borrow.blends


def image_calls(count):
    return Layout(tuple(Call(10, None if number == 1 else (0, 10), ("output", number)) for number in range(count + 1)))


def test_what_is_borrowed_from_which_layers_and_steps():
    """Four steps; attention in the first half, features in the first quarter, of the middle third of 9 layers."""
    sigmas = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])
    borrow = Borrow(Schedule(sigmas), 0.5, 0.25, None, None, False)
    assert borrow.layers(4.0, 9) == (frozenset(range(9)), frozenset({3, 4, 5}))
    assert borrow.layers(3.0, 9) == (frozenset(range(9)), frozenset()) and borrow.layers(2.0, 9) == (frozenset(), frozenset())
    assert borrow.layers(4.0, 4)[1] == frozenset({1}) and borrow.layers(4.0, 8)[1] == frozenset({2, 3, 4})
    own = Borrow(Schedule(sigmas), 1.0, 1.0, frozenset({0, 2}), frozenset({1}), False)
    content = TrajectorySource(trajectory(1), (0,))
    asked = reference(styles=(), content=content, borrow=own)
    assert borrowed_calls(asked, image_calls(3), 1.0) == (frozenset({0, 3}), frozenset({2}))
    assert chosen_calls(asked, image_calls(3), 1.0) == {0, 2, 3}
    assert borrowed_calls(reference(), image_calls(3), 1.0) == (frozenset(), frozenset())
    with pytest.raises(ValueError, match="^layers: Test has 2 attention layers about the picture, 0-1; got 2"):
        chosen_calls(asked, image_calls(2), 1.0)


def test_calls_by_place_and_by_number():
    layout = image_calls(3)
    assert chosen_calls(reference(places=frozenset({("output", 0), ("output", 1), ("output", 3)})), layout) == {0, 3}
    assert chosen_calls(reference(layers=frozenset({0, 2})), layout) == {0, 3}
    for count, expected in ((2, {1}), (3, {1, 2}), (4, {2, 3}), (6, {2, 3, 4, 5})):  # number >= count / 3
        calls = Layout(tuple(Call(10, (0, 10)) for _ in range(count)))
        assert chosen_calls(reference(), calls) == expected
    with pytest.raises(ValueError, match="has 3 attention layers about the picture, 0-2; got 5"):
        chosen_calls(reference(layers=frozenset({3, 5})), layout)


def test_rows_are_added_once_for_each_source_seed_and_chunks():
    added, one, two = _Added(4, 2), PictureSource(torch.zeros(1)), PictureSource(torch.ones(1))
    assert added.place(one, 0, (0, 1)) == slice(4, 8) and added.place(two, 0, (1,)) == slice(8, 10)
    assert added.place(one, 0, (0, 1)) == slice(4, 8)
    assert added.place(one, 1, (0, 1)) == slice(10, 14)
    assert added.copied == [0, 1, 2, 3, 2, 3, 0, 1, 2, 3] and added.chunks == [0, 1, 1, 0, 1]


def test_conditions_of_one_row_in_a_smaller_picture():
    x = random(4, 3, 8, 6)
    assert torch.equal(_first_rows(x, 4, 1), x[:1]) and _first_rows(x, 2, 1) is x and _first_rows(7, 4, 1) == 7
    (cut, kept) = _first_rows([x, x[:1]], 4, 1)
    assert torch.equal(cut, x[:1]) and kept.shape == (1, 3, 8, 6)
    number = torch.tensor(3.0)
    assert _first_rows(number, 4, 1) is number
    assert _shapes([x, 7, [x]]) == ((3, 8, 6), None, ((3, 8, 6),)) and _shapes("a") is None
    assert torch.equal(_cropped(x, (8, 6), (4, 2)), x[..., :4, :2]) and _cropped(x, (6, 8), (4, 2)) is x
    flat = random(3, 8, 6)
    assert _cropped(flat, (8, 6), (4, 2)) is flat


def test_a_small_latent_keeps_the_remainders_of_16():
    assert small_shape((100, 50)) == (20, 18) and small_shape((3, 64, 64)) == (3, 16, 16)
    assert small_shape((32, 16)) == (16, 16) and small_shape((31, 16)) is None and small_shape((16, 31)) is None
    assert small_shape((33, 16)) is None and small_shape((34, 32)) == (18, 16)


def test_a_layout_grows_with_the_picture():
    layout = Layout((Call(5 + 16, (5, 21)), Call(7, None), Call(5 + 16 + 3, (5, 21))))
    grown = layout.grown((8, 8), (16, 8))  # patches of two cells: 16 tokens become 32
    assert grown.calls == (Call(37, (5, 37)), Call(7, None), Call(40, (5, 37)))
    assert Layout((Call(15, (0, 15)),)).grown((8, 8), (16, 16)) is None
    assert layout.numbers == {0: 0, 2: 1}


def test_arguments_by_place_and_by_name():
    mask = object()
    assert named((mask, None, True), {"x": 1}) == {"mask": mask, "attn_precision": None, "skip_reshape": True, "x": 1}
    assert token_axis({"skip_reshape": True}) == 2 and token_axis({}) == 1 and token_axis({"skip_reshape": False}) == 1
    func = lambda *args, **kwargs: "plain"
    assert chained(None, func) is func
    assert chained(lambda f, *args, **kwargs: (f, args, kwargs), func)(1, 2, 3, 4, a=5) == (func, (1, 2, 3, 4), {"a": 5})


def test_the_probe_sees_calls_of_its_two_rows_only():
    probe = Probe(1)
    own = random(1, 6, 8)
    other = own.clone()
    other[:, 2:4] += 1
    both = torch.cat([own, other])
    plain = lambda q, k, v, heads, **kwargs: q
    options = {"transformer_options": {"block": ("output", 3)}}
    assert probe(plain, both, both, both, 2, **options) is both
    probe(plain, both, torch.cat([own, own]), both, 2)  # a prompt's keys
    probe(plain, own, own, own, 2)  # one row
    probe(plain, both, both[:, :3], both, 2)  # other keys than queries
    probe(plain, torch.cat([own, own]), both, both, 2)
    assert probe.layout.calls == (Call(6, (2, 4), ("output", 3)), *(Call(6, None) for _ in range(4)))


def test_weights_that_sum_to_one_need_no_plain_attention():
    assert _normalised([0.5, 0.5]) == ([0.5, 0.5], True) and _normalised([1.0, 1.0]) == ([0.5, 0.5], True)
    assert _normalised([0.25, 0.5]) == ([0.25, 0.5], False)
    weights, complete = _normalised([torch.tensor([0.25, 1.0]), torch.tensor([0.5, 3.0])])
    assert not complete and weights[0].tolist() == [0.25, 0.25] and weights[1].tolist() == [0.5, 0.75]


def test_rows_of_unconditional_chunks():
    marks = _unconditional((0, 1, 0), random(6, 2, 5))
    assert marks.shape == (6, 1, 1) and marks.flatten().tolist() == [0, 0, 1, 1, 0, 0]


def test_other_nodes_masks_go_with_their_rows():
    batch, heads, rows = 3, 2, [0, 2]
    one, each, shared = random(5, 5), random(3, 1, 5, 5), random(1, 1, 5, 5)
    folded = random(batch * heads, 5, 5)
    assert _rows_of(None, rows, batch, heads) is None and _rows_of(one, rows, batch, heads) is one
    assert _rows_of(shared, rows, batch, heads) is shared
    assert torch.equal(_rows_of(each, rows, batch, heads), each[rows])
    assert torch.equal(_rows_of(folded, rows, batch, heads), folded[[0, 1, 4, 5]])
    padding = random(3, 5)  # (batch, keys)
    assert torch.equal(_rows_of(padding, slice(1, None), batch, heads), padding[1:])
    odd = random(4, 5, 5)
    assert _rows_of(odd, rows, batch, heads) is odd


def test_a_lengthened_mask_hides_none_of_the_new_keys():
    number = _lengthened(random(2, 4), 3)
    assert number.shape == (2, 7) and not number[:, 4:].any()
    assert _lengthened(torch.zeros(2, 4, dtype=torch.bool), 3)[:, 4:].all()


def sharing(calls=(Call(6, (0, 6)),), parts=()):
    return Sharing(Layout(calls), list(parts), 1, (2, 3), True, 0.0, None, lambda key, compute: compute())


def test_statistics_are_left_alone_where_turning_positions_are_unknown():
    asked = reference(cures=Cures(token_adain=1.0))
    query, key = random(1, 6, 8), random(1, 6, 8, seed=1)
    found = Sharing._adain(asked, query, key, random(1, 6, 8, seed=2), random(1, 6, 8, seed=3), 4, 1)
    assert found[0] is query and found[1] is key


def test_calls_of_other_sizes_than_expected_are_passed_through():
    part = Part(reference(), None, (0,), (slice(1, 2),), None, frozenset({0}))
    q = random(2, 7, 8)
    stray = sharing(parts=[part])
    assert torch.equal(stray(attention_pytorch, q, q, q, 2), attention_pytorch(q, q, q, 2)) and stray.strayed and stray.count == 1
    alone = sharing(parts=[part])
    assert torch.equal(alone(attention_pytorch, q[:1, :6], q[:1, :6], q[:1, :6], 2), attention_pytorch(q[:1, :6], q[:1, :6], q[:1, :6], 2))
    assert alone.strayed
    fits = sharing(parts=[part])
    assert not torch.equal(fits(attention_pytorch, q[:, :6], q[:, :6], q[:, :6], 2)[:1], attention_pytorch(q[:1, :6], q[:1, :6], q[:1, :6], 2))
    assert not fits.strayed


def test_the_blend_of_borrowed_tokens_goes_with_the_progress():
    """All of the content's up to the middle of the sampling, then its share falls to nothing; the text's tokens stay."""
    q, span = random(4, 7, 8), (2, 7)
    borrow = Borrow(Schedule(torch.tensor([1.0, 0.0])), 1.0, 1.0, None, None, True)
    part = Part(reference(styles=(), borrow=borrow), None, (0,), (), slice(2, 4), frozenset({0}))
    for progress, share in ((0.0, 1.0), (0.5, 1.0), (0.75, 0.5), (0.9, 0.2), (1.0, 0.0)):
        own = Sharing(Layout(()), [], 2, (1, 5), True, progress, None, None)
        found = own._borrowed(q, part, span, 1)
        expected = q.clone()
        expected[:2, 2:] = share * q[2:, 2:] + (1 - share) * q[:2, 2:]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("settings, message", [
    (dict(), None), (dict(content=TrajectorySource(trajectory(2), (0, 1))), None), (dict(content=TrajectorySource(trajectory(1), (0,))), None),
    (dict(content=TrajectorySource(trajectory(3), (0, 1, 2))), "^content: 3 inverted images cannot be shared among 2 samples"),
    (dict(mask=torch.ones(2, 8, 8)), None), (dict(mask=torch.ones(8, 8)), None), (dict(mask=torch.ones(3, 8, 8)), "^mask: 3 masks for 2 samples"),
])
def test_what_does_not_fit_a_sampling_is_refused_when_it_starts(settings, message):
    def check(size=(2, 2), start=3.0):
        StyleReferences((reference(**settings),))._check(torch.zeros(2, 4, *size), torch.tensor([start, 1.0, 0.0]))

    if message is not None:
        with pytest.raises(ValueError, match=message):
            check()
        return
    check()
    if "content" not in settings:
        check((2, 4), 9.0)
        return
    for size in ((2, 4), (4, 2)):
        with pytest.raises(ValueError, match=f"^content: its latent is 2x2 .height x width., the sampled one {size[0]}x{size[1]}"):
            check(size)
    with pytest.raises(ValueError, match="^content: the inversion ends at sigma 3.000"):
        check(start=4.0)


def test_a_style_that_was_inverted_on_a_shorter_schedule_is_named():
    styles = ((TrajectorySource(trajectory(1), (0,)), 1.0),)
    with pytest.raises(ValueError, match="^style_trajectory: the inversion ends at sigma 3.000"):
        StyleReferences((reference(styles=styles),))._check(torch.zeros(1, 4, 2, 2), torch.tensor([4.0, 0.0]))


@pytest.mark.parametrize("cures, rotates, unrotated, said", [
    (Cures(untwist_high=0.5), False, True, ["has no rotary positions"]), (Cures(untwist_high=0.5), False, False, ["turns its positions in a way"]),
    (Cures(untwist_high=0.5), True, False, []), (Cures(token_adain=0.5), True, False, []), (Cures(token_adain=0.5), False, True, []),
    (Cures(token_adain=0.5), False, False, ["token_adain has no effect"]), (Cures(leak_guard=0.5), True, False, ["at cfg 1 there are none"]), (Cures(), False, False, []),
])
def test_cures_without_effect_are_said(caplog, cures, rotates, unrotated, said):
    caplog.set_level("INFO")
    _say_what_has_no_effect("Test", cures, rotates, unrotated)
    assert len(caplog.records) == len(said) and all(part in caplog.text for part in said)
