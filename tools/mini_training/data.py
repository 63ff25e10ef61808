"""Pictures for the mini model: one pool of images per kind, random crops on demand."""
from pathlib import Path

import numpy as np
import torch
from PIL import Image

KINDS = ("empty", "photo", "painting", "drawing")

# Never trained on: these, and every photo in content/, are what benchmarks use.
HELD_OUT_STYLES = (
    "katsushika_hokusai_the_great_wave_off_kanagawa_182",
    "vincent_van_gogh_village_street_in_auvers_1890",
    "wassily_kandinsky_composition_viii_1923",
    "pierre_auguste_renoir_bal_du_moulin_de_la_galette_",
    "pieter_brugel_the_harvesters_1565",
    "katsushika_hokusai_ejiri_in_suruga_province_1830_1",
    "giuseppe_arcimboldo_spring_1573",
    "leonardo_da_vinci_mona_lisa_1503_19",
    "katsushika_hokusai_woman_holding_a_fan",
    "katsushika_hokusa_poppies_1833_1834",
)
VALIDATION_PHOTOS = 64

SHARE = {"photo": 0.45, "painting": 0.22, "strokes": 0.23, "drawing": 0.1}  # of the pools in a batch of the networks
KIND_OF = {"photo": "photo", "painting": "painting", "strokes": "painting", "drawing": "drawing"}
STROKES_SIZE = 272  # side of a picture that `strokes.paint` makes
DROP_KIND = 0.15


def load_rgb(path, paper=255):
    """uint8 array (H, W, 3); transparent parts are laid on a flat `paper` tone."""
    image = Image.open(path)
    if image.mode in ("RGBA", "LA", "P"):
        image = image.convert("RGBA")
        sheet = Image.new("RGBA", image.size, (paper, paper, paper, 255))
        image = Image.alpha_composite(sheet, image)
    return np.asarray(image.convert("RGB"))


def square(path, size):
    """Centre square of an image as a float tensor (3, size, size) in [-1, 1]."""
    image = Image.fromarray(load_rgb(path))
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((size, size), Image.LANCZOS, box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).float().permute(2, 0, 1) / 127.5 - 1  # HWC -> CHW


class Pool:
    """Images of one kind, kept as uint8; `crops` cuts, scales and mirrors them at random."""

    def __init__(self, images, max_zoom):
        self.images = images
        self.max_zoom = max_zoom  # a crop spans 1 to max_zoom times the asked size

    def crops(self, rng, count, size):
        """Float tensor (count, 3, size, size) in [-1, 1]."""
        return pixels(torch.from_numpy(self.cut(rng, count, size)))

    def cut(self, rng, count, size):
        """The same as uint8 array (count, size, size, 3)."""
        out = np.empty((count, size, size, 3), np.uint8)
        for i in range(count):
            array = self.images[rng.integers(len(self.images))]
            side = min(int(size * rng.uniform(1, self.max_zoom)), *array.shape[:2])
            top = rng.integers(array.shape[0] - side + 1)
            left = rng.integers(array.shape[1] - side + 1)
            crop = array[top:top + side, left:left + side]
            if side != size:
                crop = np.asarray(Image.fromarray(crop).resize((size, size), Image.BICUBIC, reducing_gap=2))
            out[i] = crop[:, ::-1] if rng.random() < 0.5 else crop
        return out


class Pairs:
    """Photos and what was painted from them, (S, S, 3) uint8 each."""

    def __init__(self, photos, paintings, max_zoom=1.5):
        self.photos, self.paintings, self.max_zoom = photos, paintings, max_zoom

    def __len__(self):
        return len(self.paintings)

    def cut(self, rng, count, size):
        """(photos, the same places painted, other places of those paintings), uint8 (count, size, size, 3) each."""
        out = np.empty((3, count, size, size, 3), np.uint8)
        for i in range(count):
            chosen = rng.integers(len(self))
            painting = self.paintings[chosen]
            side = min(int(size * rng.uniform(1, self.max_zoom)), *painting.shape[:2])
            here, there = ([rng.integers(painting.shape[axis] - side + 1) for axis in (0, 1)] for _ in range(2))
            mirrored = rng.random() < 0.5
            for part, picture, (top, left) in zip(out, (self.photos[chosen], painting, painting), (here, here, there)):
                crop = Image.fromarray(picture[top:top + side, left:left + side]).resize((size, size), Image.BICUBIC, reducing_gap=2)
                part[i] = np.asarray(crop)[:, ::-1] if mirrored else np.asarray(crop)
        return tuple(out)


def pixels(array):
    """uint8 tensor (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1]."""
    return array.float().permute(0, 3, 1, 2) / 127.5 - 1


class Batches(torch.utils.data.IterableDataset):
    """Endless (uint8 crops (count, size, size, 3), kind indices (count)), drawn by `SHARE`, some kinds dropped to empty."""

    def __init__(self, pools, size, count, seed):
        self.pools, self.size, self.count, self.seed = pools, size, count, seed
        self.names = [name for name in SHARE if name in pools and pools[name].images]
        shares = np.array([SHARE[name] for name in self.names])
        self.shares = shares / shares.sum()

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([*self.seed, worker.id if worker else 0, self.size])
        while True:
            yield self.draw(rng)

    def draw(self, rng):
        names = rng.choice(self.names, self.count, p=self.shares)
        crops = np.concatenate([self.pools[name].cut(rng, 1, self.size) for name in names])
        kinds = [0 if rng.random() < DROP_KIND else KINDS.index(KIND_OF[name]) for name in names]
        return torch.from_numpy(crops), torch.tensor(kinds)


class Feed:
    """Batches of any (size, count), by `workers` processes ahead of time (0: in this process).

    A GPU takes thousands of crops a second, a core cuts about a thousand.
    """

    def __init__(self, pools, workers, seed):
        self.pools, self.workers, self.seed, self.running = pools, workers, seed, {}

    def __call__(self, size, count):
        key = size, count
        if key not in self.running:
            batches = Batches(self.pools, size, count, self.seed)
            loader = torch.utils.data.DataLoader(batches, None, num_workers=self.workers, prefetch_factor=4 if self.workers else None)
            self.running[key] = iter(loader)
        return next(self.running[key])


def load_drawings(folder, limit, seed):
    """Clip art at least 200 px on its short side, laid on white, shrunk to at most 384 px."""
    paths = sorted(Path(folder).rglob("*.png"))
    rng = np.random.default_rng(seed)
    drawings = []
    for i in rng.permutation(len(paths)):
        if len(drawings) == limit:
            break
        try:
            with Image.open(paths[i]) as image:
                if min(image.size) < 200 or max(image.size) > 2500:
                    continue
            array = load_rgb(paths[i])
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
        image = Image.fromarray(array)
        image.thumbnail((384, 384), Image.BICUBIC)
        array = np.asarray(image)
        # Nearly empty sheets (arrows, thin shapes) teach nothing but white.
        if min(array.shape[:2]) >= 160 and array.std() > 45:
            drawings.append(array)
    return drawings


def validation_photos(assets, seed=0):
    """Paths of the photos of train_photos/ that are never trained on."""
    photos = sorted((Path(assets) / "train_photos").glob("*.jpg"))
    order = np.random.default_rng(seed).permutation(len(photos))
    return [photos[i] for i in sorted(order[:VALIDATION_PHOTOS])]


def load_pools(assets, drawings_folder, seed=0):
    """Dict kind -> Pool, and the list of validation photo paths."""
    assets = Path(assets)
    photos = sorted((assets / "train_photos").glob("*.jpg"))
    order = np.random.default_rng(seed).permutation(len(photos))
    validation = validation_photos(assets, seed)
    training = [photos[i] for i in sorted(order[VALIDATION_PHOTOS:])]
    styles = [p for p in sorted((assets / "style").glob("*.png")) if p.stem not in HELD_OUT_STYLES]
    pools = {
        "photo": Pool([load_rgb(p) for p in training], max_zoom=2.2),
        "painting": Pool([load_rgb(p) for p in styles], max_zoom=2.5),
        "drawing": Pool(load_drawings(drawings_folder, 1200, seed), max_zoom=2.2),
    }
    return pools, validation
