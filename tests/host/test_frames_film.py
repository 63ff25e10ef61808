"""Films of a random U-Net: what a frame is must not depend on how many run at once, nor on where a run was stopped."""

import comfy.model_management
import folder_paths
import pytest
import torch
from support.models import tiny_cond, tiny_unet

from pastiche.nodes.host.features.on_the_way import invert_and_capture
from pastiche.nodes.host.frames import film as film_module
from pastiche.nodes.host.frames.film import Film, FilmSettings, restyle_film
from pastiche.nodes.host.frames.links import FrameLinks
from pastiche.nodes.host.frames.written import STATE, WrittenFrames
from pastiche.nodes.host.trajectories.inversion import invert

FAST = FilmSettings(steps=1, statistics_frames=2)
BOTH = FilmSettings(steps=2, statistics_frames=2, link="first and previous")


class PlainVAE:
    """Means of 8x8 pixels as latents, drawn out again; remembers what it decoded."""

    def __init__(self, stops_after=99):
        self.decoded, self.encoded, self.stops_after = [], 0, stops_after

    def encode(self, image):
        self.encoded += len(image)
        small = torch.nn.functional.avg_pool2d(image.movedim(-1, 1), 8)
        return 4 * torch.cat([small, small.square()[:, :1]], 1) - 2

    def decode(self, latent):
        if len(self.decoded) == self.stops_after:
            raise comfy.model_management.InterruptProcessingException()
        self.decoded.append(latent)
        return torch.sigmoid(latent[:, :3] / 4).repeat_interleave(8, 2).repeat_interleave(8, 3).movedim(1, -1)


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def model():
    return tiny_unet("sd15", dtype=torch.float64)


def clip(count=3, height=64, width=80, seed=0):
    picture = torch.rand(1, height + 8 * count, width + 8 * count, 3, generator=torch.Generator().manual_seed(seed))
    return torch.cat([picture[:, 8 * i : 8 * i + height, 8 * i : 8 * i + width] for i in range(count)])


def style(seed=9):
    return torch.rand(1, 72, 64, 3, generator=torch.Generator().manual_seed(seed))


def restyle(model, settings, chunk, frames=None, resume=False, vae=None, prefix="film", memory="ram", **given):
    vae = vae or PlainVAE()
    given = given or {"style": style()}
    images, written = restyle_film(
        model, vae, clip() if frames is None else frames, given.get("style"), given.get("style_features"), settings, chunk, prefix, resume,
        tiny_cond(model), memory,
    )
    return images, written, vae


@pytest.mark.parametrize("settings", [BOTH, FilmSettings(steps=1, link="previous", adain=False), FilmSettings(steps=1, gamma=0.0, link="first")])
def test_chunks_of_any_size_give_one_film(model, settings):
    whole, _, vae = restyle(model, settings, 3)
    assert whole.shape == (3, 64, 80, 3) and vae.decoded[0].std() > 0.1
    for chunk in (1, 2):
        parts, _, other = restyle(model, settings, chunk)
        # the network computes in float64 and core hands latents on in float32: rounding differs, nothing else
        assert torch.allclose(torch.cat(other.decoded), vae.decoded[0], rtol=0, atol=1e-4 * float(vae.decoded[0].abs().max()))
        assert (parts - whole).abs().max() <= 1.01 / 255


@pytest.mark.parametrize("family, prediction", [("sd20", "v"), ("sdxl", "eps")])
def test_chunks_of_other_families_give_one_film(family, prediction):
    model = tiny_unet(family, prediction, dtype=torch.float64)
    settings = FilmSettings(steps=1, statistics_frames=1, link="first and previous")
    whole, parts = (restyle(model, settings, chunk, clip(2))[2].decoded for chunk in (2, 1))
    assert torch.allclose(torch.cat(parts), whole[0], rtol=0, atol=1e-4 * float(whole[0].abs().max()))


def test_every_link_changes_the_frames(model):
    plain = restyle(model, FilmSettings(steps=1, adain=False, steady=0.0), 3)[2].decoded[0]
    for link in ("first", "previous", "first and previous"):
        linked = restyle(model, FilmSettings(steps=1, adain=False, steady=0.0, link=link), 3)[2].decoded[0]
        assert all(not torch.allclose(a, b, rtol=0, atol=1e-2) for a, b in zip(linked, plain))


def test_a_frame_linked_to_itself_alone_is_a_plain_one(model):
    """Rows that are there twice change no softmax average: a film of one frame, and one that stands still."""
    from pastiche.nodes.host.networks.families import find_adapter
    from pastiche.nodes.host.frames.links import CarriedRows
    from support.sampling import random_latent, sample, schedule

    adapter, latent, cond = find_adapter(model), random_latent(8, 10), tiny_cond(model)
    sigmas = schedule(model, 1)
    for frames in (latent, latent.expand(2, -1, -1, -1).contiguous()):
        plain = sample(model, frames, sigmas, cond)
        for link in ("first", "previous", "first and previous"):
            patched = FrameLinks(adapter, adapter.places("auto"), link, None, CarriedRows()).install(model)
            linked = sample(patched, frames, sigmas, cond)
            assert torch.allclose(linked, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))


def test_links_are_those_of_an_attention_over_all_the_rows(model):
    """Two unlike frames at one step: the second one's linked attention, against softmax over its own and the first one's rows."""
    from pastiche.nodes.host.networks.adapter import Attended
    from pastiche.nodes.host.frames.links import CarriedRows
    from pastiche.nodes.host.networks.families import find_adapter

    class Run:
        def schedule(self, options):
            return type("Schedule", (), {"step": lambda self, sigma: 0})()

    adapter, place = find_adapter(model), ("output", 6)
    module = adapter.attention_module("attn1", (*place, 0)).double()
    own = torch.randn(2, 12, module.to_q.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    options = {"block": place, "block_index": 0, "sigmas": torch.ones(1), "cond_or_uncond": [0], "pastiche_run": Run()}
    after = CarriedRows()
    made = FrameLinks(adapter, [place], "previous", None, after).change_hidden(own, Attended(own, own, own), options)
    out = module(made.inputs.query, context=made.inputs.keys, value=made.inputs.values)

    rows = torch.cat([own[1], own[0]])
    heads = module.heads
    split = lambda x: x.view(len(x), heads, -1).movedim(1, 0)
    q, k, v = split(own[1] @ module.to_q.weight.T), split(rows @ module.to_k.weight.T), split(rows @ module.to_v.weight.T)
    attended = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v
    expected = module.to_out(attended.movedim(0, 1).flatten(1))
    assert torch.allclose(out[1], expected, rtol=0, atol=1e-10)
    assert list(after.last) == ["self_attention/output.6.0/0/0"] and torch.equal(*after.last.values(), own[1:]) and not after.first


@pytest.mark.parametrize("settings", [FAST, BOTH])
def test_a_stopped_film_goes_on_as_if_it_had_not_been(model, settings):
    whole, *_ = restyle(model, settings, 1, prefix="whole")
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        restyle(model, settings, 1, vae=PlainVAE(stops_after=2))
    resumed, written, vae = restyle(model, settings, 1, resume=True)
    assert len(vae.decoded) == 1 and vae.encoded == 2  # two of three frames were there, and the statistics: the style and one frame are left
    assert torch.equal(resumed, whole) and written.done == 3
    again, _, vae = restyle(model, settings, 1, resume=True)
    assert not vae.decoded and torch.equal(again, whole)


def written(resume=True, identity="0123456789abcdef"):
    return WrittenFrames("film", identity, 3, resume)


def test_frames_are_found_again_to_the_bit():
    made, frames = written(), torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    for number, frame in enumerate(frames):
        made.write(number, frame)
    tensors = {"first/self_attention/output.6.0/0/0": torch.rand(1, 4, 2, dtype=torch.float64), "statistics/mean": torch.rand(1, 4, 1, 1)}
    made.advance(2, tensors)
    found = written()
    assert found.done == 2 and all(torch.equal(found.read(number), frame) for number, frame in enumerate(frames))
    assert found.tensors.keys() == tensors.keys() and all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
    assert written(identity="another").done == 0 and written(identity="0123456789 another").done == 0
    assert written(resume=False).done == 0 and written().done == 0  # begun anew


@pytest.mark.parametrize("spoil", [
    lambda folder: folder.joinpath("frame_00002.png").unlink(),
    lambda folder: folder.joinpath("frame_00002.png").write_bytes(b"\x89PNG"),
    lambda folder: folder.joinpath("frame_00002.png").write_bytes(folder.joinpath("frame_00002.png").read_bytes()[:-40]),
    lambda folder: folder.joinpath(STATE).write_bytes(b"cut short"),
    lambda folder: folder.joinpath(STATE).write_bytes(folder.joinpath(STATE).read_bytes()[:-1]),
])
def test_what_cannot_be_used_begins_anew(spoil):
    made = written()
    for number in range(2):
        made.write(number, torch.randint(0, 256, (30, 30, 3), dtype=torch.uint8))
    made.advance(2, {"statistics/mean": torch.rand(1, 4, 1, 1)})
    spoil(made.folder)
    found = written()
    assert found.done == 0 and not found.tensors


def test_other_settings_styles_films_and_models_have_folders_of_their_own(model):
    vae, frames = PlainVAE(), clip()
    cond = tiny_cond(model)

    def name(model=model, frames=frames, given=style(), settings=FAST, positive=cond):
        return Film(model, vae, frames, given, settings, positive).identity()

    darker = frames.clone()
    darker[2, 0, 0, 0] -= 0.01
    names = [
        name(), name(frames=darker), name(frames=frames[:2]), name(given=style(8)), name(settings=BOTH), name(model=tiny_unet("sd15", seed=1)),
        name(positive=tiny_cond(model, seed=1)), name(positive=None), name(settings=FilmSettings(steps=1, statistics_frames=2, steady=0.4)),
    ]
    assert len(set(names)) == len(names) and name() == names[0]


def test_other_nodes_settings_are_the_films_own_as_long_as_comfyui_runs(model, monkeypatch):
    """A patch turned, or a ControlNet's strength, never takes up frames of the setting before."""

    def name(model, positive=None):
        return Film(model, PlainVAE(), clip(), style(), FAST, positive or tiny_cond(model)).identity()

    def patched(strength):
        other = model.clone()
        other.set_model_attn1_patch(lambda q, k, v, extra: (q, k, v * strength))
        return other

    def told(strength):
        return [[cond, {**options, "strength": strength}] for cond, options in tiny_cond(model)]

    plain, turned, conditioned = name(model), [name(patched(strength)) for strength in (0.5, 0.5, 0.6)], [name(model, told(s)) for s in (0.5, 0.5, 0.6)]
    for first, same, other in (turned, conditioned):
        assert first == same and len({plain, first, other}) == 3
    monkeypatch.setattr(film_module, "PROCESS", "another start")
    assert name(model) == plain and name(patched(0.5)) != turned[0] and name(model, told(0.5)) != conditioned[0]


def test_style_features_are_the_style(model):
    picture, *_ = restyle(model, FAST, 3)
    film = Film(model, PlainVAE(), clip(), style(), FAST, tiny_cond(model))
    latent = {"samples": film._encoded(style(), "style")}
    *_, bank = invert_and_capture(model, latent, film.sigmas, "self_attention", "auto", "ram", positive=tiny_cond(model))
    features, *_ = restyle(model, FilmSettings(steps=7, statistics_frames=2), 3, style_features=bank)
    assert torch.equal(features, picture)


def test_statistics_are_of_frames_over_the_whole_film(model, monkeypatch):
    seen = []
    monkeypatch.setattr(film_module, "restandardised", lambda noise, own, wanted: seen.append((own, wanted)) or noise)
    settings = FilmSettings(steps=1, statistics_frames=2)
    for chunk in (1, 2):
        restyle(model, settings, chunk)
    film = Film(model, PlainVAE(), clip(), style(), settings, tiny_cond(model))
    noise = [invert(model, {"samples": film._encoded(part, "")}, film.sigmas, tiny_cond(model))[1].latents[-1] for part in (clip()[[0, 2]], style())]
    for own, wanted in seen:
        for (mean, std), latents in ((own, noise[0]), (wanted, noise[1])):
            assert torch.allclose(mean.flatten(), latents.movedim(1, 0).flatten(1).mean(1), atol=1e-4)
            assert torch.allclose(std.flatten(), latents.movedim(1, 0).flatten(1).std(1), atol=1e-4)


def test_cancel_is_looked_at_while_frames_are_made(model, monkeypatch, output):
    looks = iter(range(10**6))

    def press(after):
        def look():
            if next(looks) >= after:
                raise comfy.model_management.InterruptProcessingException()
        return look

    for after in (0, 5, 12):
        looks = iter(range(10**6))
        monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", press(after))
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            restyle(model, FAST, 2)
        assert next(looks) == after + 1
    assert comfy.utils.PROGRESS_BAR_HOOK is None and not list(output.rglob("*.partial"))


def test_one_bar_from_start_to_end(model, monkeypatch):
    shown = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, node_id=None: shown.append((value, total, preview)))
    restyle(model, FAST, 2)
    values = [value for value, _, _ in shown]
    assert values == sorted(values) and values[-1] == shown[-1][1] and {total for _, total, _ in shown} == {1000}
    assert sum(preview is not None and preview[0] == "JPEG" for *_, preview in shown) == 2


@pytest.mark.parametrize("given, sentence", [
    (dict(style=None), "style: connect a style picture or style_features, one of them; got neither"),
    (dict(style=torch.rand(2, 64, 64, 3)), "style: got 2 pictures"),
    (dict(style=style(), settings=FilmSettings(steps=1, layers="0")), "attention in 3-11"),
    (dict(style=style(), settings=FilmSettings(steps=1, link="all")), 'link: got "all", choose among none, first'),
    (dict(style=style(), prefix="../x"), "leaves ComfyUI's output folder"),
    (dict(style=style(), prefix=" "), "filename_prefix: got ' '; give a name"),
])
def test_bad_input_gets_a_sentence(model, given, sentence):
    settings, prefix = given.pop("settings", FAST), given.pop("prefix", "film")
    with pytest.raises(ValueError, match=sentence):
        restyle_film(model, PlainVAE(), clip(2), given["style"], None, settings, 2, prefix, True)


def test_a_video_vae_and_an_injection_are_refused(model):
    vae = PlainVAE()
    vae.encode = lambda image: torch.zeros(1, 4, len(image), 8, 8)
    with pytest.raises(ValueError, match="as the VAEs of video models do"):
        restyle(model, FAST, 2, vae=vae)
    film = Film(model, PlainVAE(), clip(), style(), FAST)
    from pastiche.nodes.host.frames.links import CarriedRows
    from pastiche.nodes.host.networks.families import find_adapter

    adapter = find_adapter(model)
    linked = FrameLinks(adapter, film.places, "first", None, CarriedRows()).install(model)
    with pytest.raises(ValueError, match="already carries Frame links"):
        Film(linked, PlainVAE(), clip(), style(), FAST)


def test_memory_modes_give_one_film(model):
    first, *_ = restyle(model, BOTH, 3, memory="ram")
    disk, *_ = restyle(model, BOTH, 3, memory="disk")
    assert torch.equal(first, disk)


def test_a_films_inversions_push_nothing_out_of_what_is_found_again(model, monkeypatch):
    from comfy.cli_args import args

    from pastiche.nodes.host.trajectories.found_again import RESULTS

    monkeypatch.setattr(args, "cache_none", False)
    RESULTS.clear()
    restyle(model, FAST, 2)
    kept = len(RESULTS)
    RESULTS.clear()
    assert kept == 2  # the style's inversion and its features, and nothing of the frames
