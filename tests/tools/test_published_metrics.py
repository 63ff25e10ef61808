"""benchmarks/published_metrics.py against closed forms, scipy and the published packages, on random weights."""

import importlib.util
import math
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F


@pytest.fixture(scope="module")
def metrics(repository):
    spec = importlib.util.spec_from_file_location("published_metrics", repository / "benchmarks" / "published_metrics.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_distance_of_diagonal_gaussians(metrics):
    """|m|^2 + sum (s - t)^2 for covariances diag(s^2), diag(t^2): samples m +- s e_i have them exactly."""
    s, t, m = torch.tensor([[1.0, 2.0, 0.5], [3.0, 0.25, 0.5], [0.3, -1.0, 2.0]], dtype=torch.float64)
    scale = math.sqrt((6 - 1) / 2)
    a, b = (torch.cat([torch.diag(x), -torch.diag(x)]) * scale for x in (s, t))
    assert metrics.frechet_distance(a + m, b) == pytest.approx(float((m**2).sum() + ((s - t) ** 2).sum()), rel=1e-12)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("count, features", [(50, 6), (7, 20)])
def test_frechet_distance_is_scipys_root(metrics, count, features):
    """Also with fewer samples than features, where covariances are singular."""
    linalg = pytest.importorskip("scipy.linalg")
    a, b = drawn(count, features), drawn(count + 3, features, seed=1) @ drawn(features, features, seed=2) + 0.5
    covariances = [np.cov(x.numpy(), rowvar=False) for x in (a, b)]
    root = linalg.sqrtm(covariances[0] @ covariances[1] + (1e-14 * np.eye(features) if count < features else 0)).real
    expected = float(((a.mean(0) - b.mean(0)) ** 2).sum()) + sum(map(np.trace, covariances)) - 2 * np.trace(root)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def art_fid_package(monkeypatch):
    """The published package; what it imports for other measures is stood in for."""
    for name in ("art_fid", "lpips", "torchvision"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}")
    importlib.import_module("torchvision")  # looks for the real scikit-learn when first imported
    if importlib.util.find_spec("sklearn") is None:
        stub = types.ModuleType("sklearn.linear_model")
        stub.LinearRegression = None
        monkeypatch.setitem(sys.modules, "sklearn", types.ModuleType("sklearn"))
        monkeypatch.setitem(sys.modules, "sklearn.linear_model", stub)
    if importlib.util.find_spec("requests") is None:
        monkeypatch.setitem(sys.modules, "requests", types.ModuleType("requests"))
    from art_fid import art_fid, inception

    return art_fid, inception


def test_frechet_distance_is_the_packages(metrics, art_fid_package):
    a, b = drawn(40, 8), drawn(30, 8, seed=1) + 1
    moments = [(x.numpy().mean(0), np.cov(x.numpy(), rowvar=False)) for x in (a, b)]
    try:
        expected = art_fid_package[0].compute_frechet_distance(*moments[0], *moments[1])
    except TypeError:
        pytest.skip("this scipy's sqrtm has no `disp`, which the package uses")
    assert metrics.frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-4)


def test_inception_is_the_packages(metrics, art_fid_package, tmp_path):
    """The package's file fills our network, and both give the same 2048 features."""
    torch.manual_seed(1)
    theirs = art_fid_package[1].Inception3(init_weights=False).eval()
    for name, buffer in theirs.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
    torch.save(theirs.state_dict(), tmp_path / "art_inception.pth")
    image = torch.rand(3, 96, 80, generator=torch.Generator().manual_seed(0))
    network = metrics.Networks(tmp_path)._filled(metrics.inception, "art_inception*.pth")
    with torch.no_grad():
        found, expected = network.double()(image[None].double()), theirs.double()(image[None].double(), return_features=True)
    assert expected.std() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_lpips_with_a_users_alexnet(metrics, tmp_path, monkeypatch):
    """The package filled with torchvision's names, against LPIPS written out: unit features, heads, means."""
    lpips = pytest.importorskip("lpips")
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(2)
    trunk = torchvision.models.alexnet(weights=None).features.double()
    torch.save({f"features.{key}": value.float() for key, value in trunk.state_dict().items()}, tmp_path / "alexnet-mine.pth")
    trunk.load_state_dict({key: value.float().double() for key, value in trunk.state_dict().items()})
    monkeypatch.setattr(metrics, "SIDE", 64)
    a, b = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = metrics.Networks(tmp_path).lpips(a, b)
    heads = [layer.model[-1].weight.double() for layer in lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).lins]
    shift = torch.tensor([-0.030, -0.088, -0.188]).double().view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).double().view(3, 1, 1)
    x, expected = torch.stack([a, b]).double(), 0.0
    x, heads = ((x * 2 - 1) - shift) / scale, iter(heads)
    with torch.no_grad():
        for layer in trunk:
            x = layer(x)
            if isinstance(layer, torch.nn.ReLU):
                unit = x / x.norm(dim=1, keepdim=True)
                unit = torch.where(x.norm(dim=1, keepdim=True) > 0, unit, 0.0)
                expected += float((next(heads)[0] * (unit[0] - unit[1]) ** 2).sum(0).mean())
    assert expected > 0
    assert found == pytest.approx(expected, rel=1e-4)


def test_art_fid(metrics):
    """The paper's own row: FID 18.131 and LPIPS 0.5055 are ArtFID 28.801."""
    assert metrics.art_fid(18.131, 0.5055) == pytest.approx(28.801, abs=2e-3)


def test_cfsd_is_torchs_divergence(metrics, monkeypatch):
    """KLDivLoss, batchmean over one picture, of the softmax of scalar products over C squared, also in pieces."""
    result, content = 4 * drawn(6, 4, 5), 2 * drawn(6, 4, 5, seed=1)
    rows = [f.reshape(6, 20).T / 6 for f in (result, content)]
    log, target = (rows[0] @ rows[0].T).log_softmax(-1), (rows[1] @ rows[1].T).softmax(-1)
    expected = F.kl_div(log.reshape(1, -1), target.reshape(1, -1), reduction="batchmean")
    assert metrics.cfsd(result, content) == pytest.approx(float(expected), rel=1e-9)
    monkeypatch.setattr(metrics, "ROWS", 7)
    assert metrics.cfsd(result, content) == pytest.approx(float(expected), rel=1e-9)
    assert metrics.cfsd(content, content) == 0 and metrics.cfsd(content, result) != pytest.approx(float(expected), rel=1e-3)


def test_gram_distance(metrics):
    """Two layers by hand: (C 1, 2 pixels) and (C 2, 1 pixel)."""
    ours = [torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.0]], [[0.0]]])]
    theirs = [torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[0.0]], [[2.0]]])]
    first, second = (5 / 2 - 2 / 2) ** 2, ((1 / 2) ** 2 + (4 / 2) ** 2) / 4
    assert metrics.gram_distance(ours, theirs) == pytest.approx((first + second) / 2)


def test_pictures_are_resized_as_torchvision_does(metrics, monkeypatch):
    transforms = pytest.importorskip("torchvision.transforms")
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    expected = transforms.Compose([transforms.Resize(40), transforms.ToTensor()])(Image.fromarray(pixels))
    monkeypatch.setattr(metrics, "SIDE", 40)
    found = metrics.resized(torch.from_numpy(pixels).movedim(-1, 0) / 255)
    assert found.shape == expected.shape == (3, 40, 60)
    assert (found - expected).abs().max() <= 1.01 / 255


def test_what_is_missing_is_said(metrics, tmp_path, capsys):
    networks, image = metrics.Networks(tmp_path), torch.rand(3, 64, 64)
    assert metrics.attempt("FID", lambda: networks.art_inception(image)) is None
    assert "FID: not measured, no art_inception*.pth in" in capsys.readouterr().err
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "vgg19-other.pth")
    assert metrics.attempt("CFSD", lambda: networks.vgg19(image, (1,))) is None
    assert "vgg19-other.pth lacks features.0.weight" in capsys.readouterr().err
    assert metrics.attempt("FID", lambda: metrics.frechet_distance(torch.rand(1, 4), torch.rand(3, 4))) is None
    assert "FID: not measured, a Frechet distance needs two samples a side, got 1 and 3" in capsys.readouterr().err
