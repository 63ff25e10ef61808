"""Pictures for the papers' tables: the pack's own nodes, queued in a real ComfyUI, every picture inverted once.

A `Table` keeps what is done in its work folder, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "workflows" / "api")]

from host import environment  # noqa: E402
from host.comfy import Server, make_base  # noqa: E402
from host.environment import Host  # noqa: E402
from host.files import atomic_write  # noqa: E402

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
BANKS = "pastiche_features"  # Save Features' folder in the server's output
MINI = "mini"
RANDOM = "random"  # in the place of a folder with the measures' weights
PLUMBING = ("The pictures are real, the measures' networks have random weights: this shows that everything runs, its numbers mean "
            "nothing.")


def options_parser(script: str, description: str, folders: str, size: int) -> argparse.ArgumentParser:
    """With the options that every table takes. script: its file; description: its docstring; folders: what --data has."""
    first, *rest = description.split("\n\n")
    parser = argparse.ArgumentParser(description=first, epilog="\n\n".join(rest), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {folders}")
    parser.add_argument("--weights", required=True, help="folder of the measures' weights, or random")
    parser.add_argument("--pairs", type=int, help="fewer than all, from the first pictures on")
    parser.add_argument("--work", type=Path, default=Path("output") / Path(script).stem, help="what is done is kept here")
    parser.add_argument("--size", type=int, default=size)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    return parser


def run_table(
    script: str, arguments: list[str], options: argparse.Namespace, wrong: str | None, make: Callable[[Host, argparse.Namespace], int]
) -> int:
    """`make` in an environment that has ComfyUI; the exit status, 2 for paths that are not there. wrong: what is, of the model's."""
    if wrong is None and options.weights != RANDOM and not Path(options.weights).is_dir():
        wrong = f"--weights: {options.weights} is not a folder."
    if wrong is not None:
        print(f"error: {wrong}", file=sys.stderr)
        return 2
    host = environment.prepare()
    code = environment.run_inside(host, script, arguments)
    return make(host, options) if code is None else code


def random_note(options: argparse.Namespace) -> str:
    """Behind a model's name where the measures mean nothing."""
    return " (random networks)" if options.weights == RANDOM else ""


def write_table(options: argparse.Namespace, script: str, title: str, settings: str, rows: Iterable[str]) -> int:
    """Prints the table and writes it to --table; settings: a sentence without its end."""
    text = "\n".join([
        f"# {title}", "", *([PLUMBING, ""] if options.weights == RANDOM else []),
        f"{options.size} px, {options.steps} steps, {settings}; see benchmarks/{Path(script).name} for the measures.", "", *rows,
    ]) + "\n"
    print(text)
    if options.table:
        options.table.parent.mkdir(parents=True, exist_ok=True)
        options.table.write_text(text)
    return 0


def node(class_type: str, /, **inputs) -> dict:
    """A node in API format; tuples are links."""
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in inputs.items()}
    return {"class_type": class_type, "inputs": values, "_meta": {"title": class_type}}


class Loader:
    """The nodes that load a model; `model`, `vae` and `empty` are links to its parts."""

    def __init__(self, nodes: dict[str, dict], vae: tuple, empty: tuple):
        self.nodes, self.model, self.vae, self.empty = nodes, ("loader", 0), vae, empty


def checkpoint_loader(name: str) -> Loader:
    """An SD checkpoint by its name in models/checkpoints, or the mini model."""
    if name == MINI:
        return Loader({"loader": node("PasticheLoadMini", kind="empty")}, ("loader", 1), ("loader", 2))
    nodes = {"loader": node("CheckpointLoaderSimple", ckpt_name=name), "text": node("CLIPTextEncode", text="", clip=("loader", 1))}
    return Loader(nodes, ("loader", 2), ("text", 0))


def unconditional_loader(name: str) -> Loader:
    return Loader({"loader": node("PasticheLoadUnconditional", folder=name)}, ("loader", 1), ("loader", 2))


def inversion_graph(
    loader: Loader, picture: str, size: int, steps: int, scheduler: str, streams: str, layers: str, prefix: str
) -> dict:
    """Inverts a picture of the input folder and saves its features and trajectory."""
    return {
        **loader.nodes,
        "picture": node("LoadImage", image=picture),
        "size": node("ImageScale", image=("picture", 0), upscale_method="lanczos", width=size, height=size, crop="center"),
        "encode": node("VAEEncode", pixels=("size", 0), vae=loader.vae),
        "sigmas": node("BasicScheduler", model=loader.model, scheduler=scheduler, steps=steps, denoise=1.0),
        "invert": node("PasticheDDIMInversion", model=loader.model, latent=("encode", 0), sigmas=("sigmas", 0), positive=loader.empty,
                       scheme="predicted", iterations=3, substeps=1, streams=streams, layers=layers, memory="ram", precision="half"),
        "save": node("PasticheSaveFeatures", features=("invert", 3), filename_prefix=prefix),
    }


def sampling_graph(loader: Loader, steps: int, scheduler: str, model: tuple, latent: tuple, sampler: dict, more: dict) -> dict:
    """Samples from an inverted latent at cfg 1 and saves the picture."""
    return {
        **loader.nodes, **more,
        "sigmas": node("BasicScheduler", model=loader.model, scheduler=scheduler, steps=steps, denoise=1.0),
        "sampler": sampler,
        "sample": node("SamplerCustom", model=model, add_noise=False, noise_seed=0, cfg=1.0, positive=loader.empty, negative=loader.empty,
                       sampler=("sampler", 0), sigmas=("sigmas", 0), latent_image=latent),
        "decode": node("VAEDecode", samples=("sample", 0), vae=loader.vae),
        "result": node("SaveImage", images=("decode", 0), filename_prefix="table"),
    }


def pictures_of(folder: Path) -> list[Path]:
    """Sorted; names without their extension must differ, for results are named by them."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES) if folder.is_dir() else []
    if not found:
        raise SystemExit(f"{folder} holds no pictures ({', '.join(PICTURES)}).")
    stems = [path.stem for path in found]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise SystemExit(f"{folder}: two pictures are called {twice[0]}; give them different names.")
    return found


def choose_pairs(first: list[Path], second: list[Path], count: int | None) -> list[tuple[Path, Path]]:
    """Every one with every one; of fewer pairs those of the first pictures: four are two with two."""
    grid = [(i, j) for i in range(len(first)) for j in range(len(second))]
    chosen = sorted(sorted(grid, key=lambda pair: (max(pair), pair))[:count])
    return [(first[i], second[j]) for i, j in chosen]


class Table:
    """A work folder: server/ is ComfyUI's base, results/ the pictures, done.json what was inverted with which settings."""

    @classmethod
    def of(cls, options: argparse.Namespace, *names: str) -> Table:
        """In --work; names: the options that its pictures depend on beside --data, --size and --steps."""
        return cls(options.work, {key: str(getattr(options, key)) for key in (names[0], "data", "size", "steps", *names[1:])})

    def __init__(self, work: Path, settings: dict):
        self.work, self.results, self.base = work, work / "results", work / "server"
        self._notes = work / "done.json"
        self.results.mkdir(parents=True, exist_ok=True)
        known = json.loads(self._notes.read_text()) if self._notes.exists() else {"settings": settings, "banks": {}}
        if known["settings"] != settings:
            changed = [key for key in settings if known["settings"].get(key) != settings[key]]
            raise SystemExit(f"{work} holds a run with other settings ({', '.join(changed)}). Name another --work, or delete it.")
        self.banks: dict[str, str] = known["banks"]
        self._settings = settings

    def server(self, host: Host, cpu: bool) -> Server:
        make_base(self.base)
        return Server(host, self.base, cpu=cpu)

    def provide(self, path: Path, folder: str) -> str:
        """Makes a model of the user's known to the server; returns its name."""
        target = self.base / "models" / folder / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            try:
                target.symlink_to(path.resolve(), target_is_directory=path.is_dir())
            except OSError:  # Windows without the privilege for links
                shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target)
        return path.name

    def invert(self, server: Server, role: str, picture: Path, graph: Callable[[str, str], dict]) -> str:
        """The file of a picture's features; graph takes (name in the input folder, prefix)."""
        key = f"{role}/{picture.name}"
        known = self.banks.get(key)
        if known and (self.base / "output" / BANKS / known).is_file():
            return known
        started = time.monotonic()
        name = server.upload(picture, f"{role}_{_plain(picture)}")
        result = server.run(graph(name, f"{role}_{_plain(picture).rsplit('.', 1)[0]}"), timeout=24 * 3600)
        (told,) = result.outputs["save"]["text"]
        self.banks[key] = told.rsplit(": ", 1)[0]
        self._save()
        print(f"inverted {key} in {time.monotonic() - started:.0f} s: {told}", flush=True)
        return self.banks[key]

    def invert_all(
        self, server: Server, roles: tuple[str, str], pairs: list[tuple[Path, Path]], graph: Callable[[str, str], dict]
    ) -> list[tuple[str, str]]:
        """The files of every pair's features, each picture inverted once in each of its roles."""
        found = {
            (role, picture): self.invert(server, role, picture, graph)
            for column, role in enumerate(roles) for picture in dict.fromkeys(pair[column] for pair in pairs)
        }
        return [(found[roles[0], first], found[roles[1], second]) for first, second in pairs]

    def picture(self, server: Server, name: str, graph: dict) -> Path:
        """results/<name>.png, made unless it is there."""
        target = self.results / f"{name}.png"
        if not target.is_file():
            started = time.monotonic()
            (image,) = server.run(graph, timeout=24 * 3600).images
            server.download(image, target)
            print(f"{target.name} in {time.monotonic() - started:.0f} s", flush=True)
        return target

    def complete(self, names: Iterable[str]) -> bool:
        return all((self.results / f"{name}.png").is_file() for name in names)

    def _save(self) -> None:
        with atomic_write(self._notes) as partial:
            partial.write_text(json.dumps({"settings": self._settings, "banks": self.banks}, indent=1))


def _plain(path: Path) -> str:
    """A name that any file system and ComfyUI take, different for different pictures."""
    stem = "".join(letter if letter.isalnum() and letter.isascii() else "_" for letter in path.stem)
    digest = hashlib.sha256(path.name.encode()).hexdigest()[:6]
    return f"{stem[:60]}_{digest}{path.suffix.lower()}"


def load_picture(path: Path, size: int | None = None):
    """(3, H, W) in 0..1, cut to a square of `size` as the graphs cut it."""
    import numpy as np
    import torch
    from PIL import Image

    image = Image.open(path).convert("RGB")
    if size is not None:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.LANCZOS)
    return torch.from_numpy(np.asarray(image).copy()).movedim(-1, 0).float() / 255  # HWC -> CHW


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def shown(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
