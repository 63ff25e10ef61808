"""Restyle Frames on the mini model: against the other nodes wired by hand, and on a film whose motion is known."""

import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image
from support.sampling import schedule

from pastiche.nodes.algorithms.frames import warped_difference
from pastiche.nodes.algorithms.metrics import psnr
from pastiche.nodes.frames import RestyleFrames
from pastiche.nodes.host.trajectories.inversion import invert, reconstruct
from pastiche.nodes.inversion import DDIMInversion
from pastiche.nodes.mini import LoadMini
from pastiche.nodes.styleid import LatentAdaIN, StyleInjection

RIGHT, DOWN = 3, 2


@pytest.fixture(scope="module")
def mini():
    return LoadMini.execute("empty").result


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def film(repository):
    picture = Image.open(repository / "assets" / "samples" / "content_coffee.jpg").convert("RGB").resize((100, 90), Image.LANCZOS)
    pixels = torch.from_numpy(np.array(picture)).float() / 255
    return torch.stack([pixels[DOWN * i : DOWN * i + 64, RIGHT * i : RIGHT * i + 80] for i in range(3)])


@pytest.fixture(scope="module")
def painting(repository):
    picture = Image.open(repository / "assets" / "samples" / "style_impasto.png").convert("RGB").resize((64, 64), Image.LANCZOS)
    return torch.from_numpy(np.array(picture)).float()[None] / 255


def restyle(mini, film, **settings):
    model, vae, empty = mini
    return RestyleFrames.execute(model, vae, film, **{"steps": 3, "positive": empty, **settings})


def test_a_film_of_one_frame_is_what_the_other_nodes_give(mini, film, painting, output):
    model, vae, empty = mini
    made = restyle(mini, film[:1], style=painting, gamma=0.6, temperature=1.2)
    sigmas = schedule(model, 3)
    content, style = (DDIMInversion.execute(
        model, {"samples": vae.encode(image)}, sigmas, empty, streams="self_attention", memory="ram"
    ).result for image in (film[:1], painting))
    noise = LatentAdaIN.execute(content[2], style[2]).result[1]
    patched = StyleInjection.execute(model, style[3], content[3], 0.6, 1.2).result[0]
    trajectory = type(content[1])(content[1].sigmas, noise.latent[None], empty, content[1].scheme, content[1].fingerprint)
    expected = vae.decode(reconstruct(patched, trajectory)).clamp(0, 1)
    assert (made.result[0] - expected).abs().max() <= 0.51 / 255
    (folder,) = output.glob("frames/restyled_*")
    assert made.ui["text"] == [f"1 frames: frames/{folder.name}"]
    written = np.array(Image.open(folder / "frame_00001.png"))
    assert np.array_equal(written, (made.result[0][0] * 255).round().to(torch.uint8).numpy())


def test_a_frame_in_its_own_style_comes_back(mini, film):
    """Its own features and statistics, its own queries, plain temperature: nothing is left of a style but where features were taken."""
    model, vae, empty = mini
    frame = film[:1, :64, :64]
    image = restyle(mini, frame, style=frame, gamma=1.0, temperature=1.0, steps=6).result[0]
    _, trajectory = invert(model, {"samples": vae.encode(frame)}, schedule(model, 6), empty)
    assert psnr(image, vae.decode(reconstruct(model, trajectory)).clamp(0, 1), 1.0) > 30


def test_a_steady_film_flickers_less(mini, film, painting):
    """Half of the frame before, along the motion, leaves (1 - s) sqrt(2 / (1 + s)) / sqrt(2) = 0.41 of what independent frames differ by."""
    plain, steady = (restyle(mini, film, style=painting, chunk=2, steady=steady).result[0] for steady in (0.0, 0.5))
    assert warped_difference(steady, RIGHT, DOWN, 8) < 0.6 * warped_difference(plain, RIGHT, DOWN, 8)
    assert torch.equal(plain[0], steady[0])  # nothing goes into the first frame


@pytest.mark.parametrize("change, sentence", [
    (dict(frames=torch.full((2, 64, 64, 3), float("nan"))), "frames: holds NaN"),
    (dict(chunk=0), "chunk: got 0"),
    (dict(), "style: connect a style picture or style_features, one of them; got neither"),
    (dict(style=torch.rand(1, 64, 64, 3), scheduler="none such"), "scheduler"),
    (dict(style=torch.rand(1, 64, 64, 3), layers="output 1"), "layers"),
])
def test_bad_input_is_named(mini, film, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        restyle(mini, change.pop("frames", film), **change)


def test_a_transformer_is_refused(film, painting):
    model, vae, empty = LoadMini.execute("empty", "transformer").result
    with pytest.raises(ValueError, match="has no U-Net"):
        restyle((model, vae, empty), film, style=painting)
