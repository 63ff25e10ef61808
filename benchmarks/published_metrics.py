"""The measures of the papers' tables, with the networks' published weights from the user's folder. torch and torchvision.

    art_inception.pth             FID and ArtFID on paintings (Wright and Ommer 2022): ArtFID = (1 + LPIPS)(1 + FID)
    alexnet-owt-7be5be79.pth      LPIPS (Zhang et al. 2018) through the package lpips, which brings its heads
    vgg19-dcbb9e9d.pth            CFSD (Chung et al. 2024) and Gram
    weights-inception-2015-12-05-6726825d.pth    FID on photos, through the package torch-fidelity
    *.onnx                        an ArcFace of 112 px faces for ID, through onnxruntime

Names may go on otherwise (alexnet*.pth). Nothing is downloaded. Pictures are (3, H, W) float in 0..1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

RANDOM = "random"  # in the place of a weights folder: networks with random weights, to try the plumbing
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CFSD_LAYER, GRAM_LAYERS = 11, (1, 6, 11, 20, 29)  # of torchvision's vgg19.features: relu3_1; relu1_1, 2_1, 3_1, 4_1, 5_1
SIDE = 512  # shorter side in the networks of FID on paintings and LPIPS, as StyleID's evaluation has it
ROWS = 1024  # patches compared at a time


class Missing(Exception):
    """A measure that cannot be taken, in a sentence: a package or a file that is not there, too few pictures."""


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean difference|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2) of two sets of features, (N, D) and (M, D).

    With S = X^T X for centred X / sqrt(N - 1), tr (S_a S_b)^1/2 is the sum of X_a X_b^T's singular values: exact also
    where there are fewer samples than features, and no root of a singular matrix is taken.
    """
    a, b = a.double(), b.double()
    if min(len(a), len(b)) < 2:
        raise Missing(f"a Frechet distance needs two samples a side, got {len(a)} and {len(b)}.")
    centred = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b)]
    shared = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    difference = a.mean(0) - b.mean(0)
    return float(difference @ difference + sum(x.square().sum() for x in centred) - 2 * shared)


def art_fid(fid: float, lpips: float) -> float:
    return (1 + lpips) * (1 + fid)


def cfsd(result: Tensor, content: Tensor) -> float:
    """KL divergence of patch similarities, summed over patches, from features (C, h, w) of both pictures.

    A patch's similarities to all patches are scalar products of features over C, through a softmax. KL(content ||
    result), as the authors' evaluation computes it.
    """
    result, content = (features.flatten(1).T / features.shape[0] for features in (result, content))
    total = 0.0
    for start in range(0, len(result), ROWS):
        ours, theirs = ((x[start : start + ROWS] @ x.T).log_softmax(-1) for x in (result, content))
        total += float((theirs.exp() * (theirs - ours)).double().sum())
    return total


def gram_distance(result: Iterable[Tensor], original: Iterable[Tensor]) -> float:
    """Mean over layers of the mean squared difference of Gram matrices, F F^T / (C h w) (Gatys et al. 2016)."""
    found = []
    for pair in zip(result, original):
        a, b = (f.flatten(1) @ f.flatten(1).T / f.numel() for f in pair)
        found.append(F.mse_loss(a, b))
    return float(torch.stack(found).mean())


def resized(image: Tensor) -> Tensor:
    """The shorter side brought to SIDE, as torchvision's Resize does to pictures: bilinear, antialiased, 8 bits."""
    side = SIDE
    height, width = image.shape[-2:]
    scale = side / min(height, width)
    size = (side, int(side * width / height)) if height <= width else (int(side * height / width), side)
    if scale == 1:
        return image
    eight = (image * 255).round()
    return F.interpolate(eight[None], size, mode="bilinear", antialias=True, align_corners=False)[0].round().clamp(0, 255) / 255


class Networks:
    """Makes each network when it is first asked for. Raises Missing where its file or package is not there."""

    def __init__(self, folder: Path | str, device: str = "cpu"):
        self.folder, self.device, self._made = folder, device, {}

    @property
    def random(self) -> bool:
        return str(self.folder) == RANDOM

    def _get(self, name: str, make: Callable[[], Callable]) -> Callable:
        if name not in self._made:
            torch.manual_seed(0)  # random weights are the same in every run
            self._made[name] = make()
        return self._made[name]

    def file(self, pattern: str) -> Path:
        found = sorted(Path(self.folder).glob(pattern))
        if not found:
            raise Missing(f"no {pattern} in {self.folder}")
        return found[0]

    def _filled(self, make: Callable[[], torch.nn.Module], pattern: str) -> torch.nn.Module:
        """A network with the file's tensors of its own names; a missing one is an error, heads that it lacks are not."""
        path = None if self.random else self.file(pattern)
        network = make()
        if path is None:
            randomise(network)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
            own = network.state_dict()
            lacking = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
            if lacking:
                raise Missing(f"{path.name} lacks {lacking[0]} ({len(lacking)} tensors): another network's weights")
            network.load_state_dict({key: state[key] for key in own if key in state}, strict=False)
        return network.eval().requires_grad_(False).to(self.device)

    def art_inception(self, image: Tensor) -> Tensor:
        """(2048,) features of one picture."""
        network = self._get("art_inception", lambda: self._filled(inception, "art_inception*.pth"))
        return network(resized(image)[None].to(self.device))[0].cpu()

    def photo_inception(self, image: Tensor) -> Tensor:
        """(2048,) features of the Inception that FID is published with; its own resizing."""
        def make():
            if self.random:
                network = self._filled(inception, "")
                return lambda pixels: network(F.interpolate(pixels.float() / 255, (299, 299), mode="bilinear"))
            try:
                from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
            except ImportError as error:
                raise Missing("torch-fidelity: pip install --no-deps torch-fidelity") from error
            path = str(self.file("weights-inception-2015*.pth"))
            network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
            network = network.to(self.device).eval()
            return lambda pixels: network(pixels)[0]

        pixels = (image * 255).round().to(torch.uint8)[None].to(self.device)
        return self._get("photo_inception", make)(pixels)[0].float().cpu()

    def lpips(self, a: Tensor, b: Tensor) -> float:
        def make():
            try:
                import lpips
            except ImportError as error:
                raise Missing("lpips: pip install --no-deps lpips") from error
            network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
            if self.random:
                randomise(network.net)
            else:
                trunk = torch.load(self.file("alexnet*.pth"), map_location="cpu", weights_only=True)
                fill_alexnet(network, trunk)
            return network.eval().requires_grad_(False).to(self.device)

        network = self._get("lpips", make)
        return float(network(*(resized(image)[None].to(self.device) * 2 - 1 for image in (a, b))))

    def vgg19(self, image: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
        """Outputs (C, h, w) of some layers of vgg19.features."""
        def trunk():
            from torchvision.models import vgg

            return torch.nn.ModuleDict({"features": vgg.make_layers(vgg.cfgs["E"])[: max(GRAM_LAYERS) + 1]})

        def make():
            return self._filled(trunk, "vgg19*.pth")["features"]

        x = (image - image.new_tensor(MEAN)[:, None, None]) / image.new_tensor(STD)[:, None, None]
        x, found = x[None].to(self.device), []
        for number, layer in enumerate(self._get("vgg19", make)[: max(layers) + 1]):
            x = layer(x)
            if number in layers:
                found.append(x[0].clone())  # the next layer may work in place
        return found

    def face(self, image: Tensor) -> Tensor:
        """(D,) unit vector of an ArcFace export; the crop of aligned CelebA-HQ faces, 188 of 256 pixels."""
        def make():
            if self.random:
                weight = torch.randn(512, 3 * 112 * 112) / 194
                return lambda x: weight @ x.flatten()
            try:
                import onnxruntime
            except ImportError as error:
                raise Missing("onnxruntime: pip install onnxruntime") from error
            session = onnxruntime.InferenceSession(str(self.file("*.onnx")), providers=["CPUExecutionProvider"])
            return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0][0])

        square = F.interpolate(image[None], (256, 256), mode="bilinear", antialias=True, align_corners=False)
        crop = F.adaptive_avg_pool2d(square[:, :, 35:223, 32:220], (112, 112)) * 2 - 1
        return F.normalize(self._get("face", make)(crop).float(), dim=0)


def inception() -> torch.nn.Module:
    """Inception v3's trunk, (B, 3, H, W) -> (B, 2048), with torchvision's names."""
    import torchvision

    network = torchvision.models.inception_v3(weights=None, aux_logits=False, transform_input=False, init_weights=False)
    network.fc = torch.nn.Identity()
    return network


def randomise(network: torch.nn.Module) -> None:
    """Random convolutions that keep the activations' size (He et al. 2015), so that features differ visibly."""
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)


def fill_alexnet(network: torch.nn.Module, trunk: dict[str, Tensor]) -> None:
    """Puts torchvision's AlexNet (features.N.weight) into lpips' slices (sliceK.N.weight)."""
    own = network.net.state_dict()
    network.net.load_state_dict({key: trunk["features." + key.split(".", 1)[1]] for key in own})


def attempt(name: str, take: Callable[[], float]) -> float | None:
    """A measure, or None after a line that says what is missing."""
    try:
        return take()
    except Missing as reason:
        print(f"{name}: not measured, {reason}", file=sys.stderr, flush=True)
        return None
