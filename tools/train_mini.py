#!/usr/bin/env python3
"""Makes the embedded mini models, nodes/assets/mini*.safetensors, on a CPU or a GPU.

    python tools/train_mini.py --assets DIR --drawings DIR --work DIR autoencoder --minutes 15
    python tools/train_mini.py --assets DIR --drawings DIR --work DIR unet --minutes 85
    python tools/train_mini.py --assets DIR --drawings DIR --work DIR decoder --minutes 70   # same latents, better pictures
    python tools/train_mini.py --assets DIR --drawings DIR --work DIR transformer --minutes 85
    python tools/train_mini.py --work DIR export            # at any time: EMA so far, fp16
    python tools/train_mini.py --assets DIR --work DIR report   # numbers and pictures of docs/mini
    python tools/train_mini.py --assets DIR --work DIR report-transformer

Needs ComfyUI on the path (COMFYUI_PATH). Every stage writes checkpoints under --work every few
minutes, whole files only, and resumes where it stopped; a network without a checkpoint starts from
the weights in nodes/assets, so that every session's training adds up. On a GPU: unet and transformer
with --device cuda --processes 1 --batch 256 --workers 14. Seeded; with wall-clock rates
a rerun gives an equivalent model, not the same bits.

Data (docs/mini/REPORT.md lists it with licences): ASSETS/train_photos (CC0), ASSETS/style
(public-domain paintings, minus those in mini_training.data.HELD_OUT_STYLES), DRAWINGS = the png
folder of Debian's openclipart-png (public domain).
"""
import argparse
import faulthandler
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "nodes" / "algorithms")]
if os.environ.get("COMFYUI_PATH"):
    sys.path.insert(0, os.environ["COMFYUI_PATH"])

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing(False)
from comfy.cli_args import args as comfy_args  # noqa: E402

comfy_args.cpu = "cuda" not in sys.argv
comfy_args.use_pytorch_cross_attention = True

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from mini_autoencoder import MiniAutoencoder  # noqa: E402
from host.files import atomic_write  # noqa: E402
from mini_training import autoencoder, data, evaluate, evaluate_transformer, export, strokes  # noqa: E402
from mini_training.decoder import CORRECTION, FINISH, DecoderTrainer  # noqa: E402
from mini_training.diffusion import Trainer, save_atomically  # noqa: E402
from mini_training.flow import FlowTrainer  # noqa: E402


SHIPPED = ROOT / "nodes" / "assets" / "mini.safetensors"
SHIPPED_TRANSFORMER = SHIPPED.with_name("mini_transformer.safetensors")


def load_autoencoder(work):
    """(MiniAutoencoder, mean, std, rgb, rgb_bias) as saved by the autoencoder stage, else as the pack ships them."""
    if not (work / "autoencoder.pt").exists():
        return export.shipped_autoencoder(SHIPPED)
    saved = torch.load(work / "autoencoder.pt", weights_only=True)
    return MiniAutoencoder.from_state(saved["model"]).eval(), *saved["statistics"]


def train_autoencoder(options):
    """A new latent space; every network after it has to be trained on, from the weights of the last one if need be."""
    pools, validation = load_pools(options)
    rng = np.random.default_rng(options.seed)
    torch.manual_seed(options.seed)
    path, start = options.work / "autoencoder.pt", options.work / "lapped.pt"
    model = MiniAutoencoder(finish=FINISH, window=16, correction=CORRECTION)
    if start.exists():
        model.load_state_dict(torch.load(start, weights_only=True))
    else:
        autoencoder.set_linear_transform(model, *autoencoder.principal_components(pools, rng, channels=16))
        autoencoder.lap(model, pools, rng)
        model.latent_std.copy_(autoencoder.latent_statistics(model, pools, rng)[1])
        save_atomically(model.state_dict(), start)
    trainer = DecoderTrainer(model, pools, validation, options.work, rng, rate=5e-4, encoder=True)
    trainer.resume()
    trainer.run(options.minutes)
    model.load_state_dict(trainer.average)
    save_atomically({"model": trainer.average, "statistics": list(autoencoder.latent_statistics(model, pools, rng))}, path)


def train_unet(options):
    pools, validation = load_pools(options)
    numbers = sorted(int(path.stem) for path in (options.work / "strokes").glob("*.png"))
    pairs = data.Pairs([to_paint(pools, options.seed, number)[0] for number in numbers], pools["strokes"].images)
    # One single-threaded process a core shares a busy machine better than threads, which wait for
    # each other in every operation. Forked before torch computes anything: pictures are shared.
    rendezvous = options.work.resolve() / "rendezvous"
    rendezvous.unlink(missing_ok=True)
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=unet_process, args=(options, pools, validation, pairs, rank, rendezvous), daemon=True)
              for rank in range(1, options.processes)]
    for process in others:
        process.start()
    unet_process(options, pools, validation, pairs, 0, rendezvous)
    for process in others:
        process.join()


def unet_process(options, pools, validation, pairs, rank, rendezvous):
    if options.processes > 1:
        torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=options.processes)
    model, mean, std, *_ = (part.to(options.device) for part in load_autoencoder(options.work))

    def encode(pixels):
        return autoencoder.LATENT_SCALE * (model.encode(pixels) - mean[:, None, None]) / std[:, None, None]

    batch, workers = options.batch, options.workers
    trainer = Trainer(encode, pools, validation, options.work, options.seed, batch=batch, device=options.device, workers=workers, pairs=pairs)
    trainer.resume(export.shipped_unet(SHIPPED) if SHIPPED.exists() else None)
    trainer.run(options.minutes)


def load_pools(options):
    """As `data.load_pools`, kept in --work: a resumed training does not read thousands of files again."""
    path = options.work / "pools.pt"
    if not path.exists():
        pools, _ = data.load_pools(options.assets, options.drawings, options.seed)
        save_atomically({k: ([torch.from_numpy(np.array(i)) for i in v.images], v.max_zoom) for k, v in pools.items()}, path)
    saved = torch.load(path, weights_only=True)
    pools = {kind: data.Pool([image.numpy() for image in images], zoom) for kind, (images, zoom) in saved.items()}
    painted = sorted((options.work / "strokes").glob("*.png"))
    pools["strokes"] = data.Pool([data.load_rgb(p) for p in painted], max_zoom=1.5)
    return pools, data.validation_photos(options.assets, options.seed)


def to_paint(pools, seed, number):
    """The photo that painting `number` is of, and the generator that then draws its manner."""
    rng = np.random.default_rng([seed, number])
    kind = "photo" if rng.random() < 0.8 else "drawing"
    return pools[kind].cut(rng, 1, data.STROKES_SIZE)[0], rng


def paint_strokes(options):
    """PNG files under --work/strokes, one a number: a rerun goes on where the last one stopped."""
    pools, _ = load_pools(options)
    folder = options.work / "strokes"
    folder.mkdir(exist_ok=True)
    for number in range(options.count):
        path = folder / f"{number:04}.png"
        if path.exists():
            continue
        photo, rng = to_paint(pools, options.seed, number)
        with atomic_write(path) as partial:
            Image.fromarray(strokes.paint(photo, rng)).save(partial, "PNG")


def train_decoder(options):
    pools, validation = load_pools(options)
    torch.manual_seed(options.seed)
    model, *_ = load_autoencoder(options.work)
    model.train()
    trainer = DecoderTrainer(model, pools, validation, options.work, np.random.default_rng(options.seed + int(time.time())))
    trainer.resume()
    trainer.run(options.minutes, torch.load(options.probe, weights_only=True) if options.probe else None)


def train_transformer(options):
    pools, validation = load_pools(options)
    model, mean, std, *_ = (part.to(options.device) for part in load_autoencoder(options.work))

    def encode(pixels):
        return (model.encode(pixels) - mean[:, None, None]) / std[:, None, None]

    trainer = FlowTrainer(encode, pools, validation, options.work, options.seed, options.device, batch=options.batch, workers=options.workers)
    trainer.resume(export.shipped_transformer(SHIPPED_TRANSFORMER) if SHIPPED_TRANSFORMER.exists() else None)
    trainer.run(options.minutes)


def export_all(options):
    """Writes what --work has a checkpoint of: the U-Net's file, a new decoder into the U-Net's file, the transformer's."""
    parts = load_autoencoder(options.work)
    if (options.work / "unet.pt").exists():
        export.export(parts, options.work / "unet.pt", options.output)
    if (options.work / "decoder.pt").exists():
        start = options.output if options.output.exists() else SHIPPED
        export.export_decoder(start, torch.load(options.work / "decoder.pt", weights_only=True)["average"], options.output)
    if (options.work / "transformer.pt").exists():
        saved = torch.load(options.work / "transformer.pt", weights_only=True, map_location="cpu")
        export.export_transformer(parts, saved, options.output.with_name(SHIPPED_TRANSFORMER.name))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("strokes", "autoencoder", "unet", "decoder", "transformer", "export", "report", "report-transformer"))
    parser.add_argument("--assets", type=Path, help="folder with train_photos/, style/ and content/")
    parser.add_argument("--drawings", type=Path, help="folder of PNG drawings, searched recursively")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and logs")
    parser.add_argument("--minutes", type=float, default=15.0, help="wall-clock budget of the stage")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2, help="data-parallel processes of the unet stage")
    parser.add_argument("--probe", type=Path, help="latents (B, 16, h, w) of restyled pictures whose grid the decoder stage logs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the unet and transformer stages")
    parser.add_argument("--batch", type=int, default=16, help="of the same; 256 or more on a GPU")
    parser.add_argument("--workers", type=int, default=0, help="processes that cut crops; 14 beside a GPU")
    parser.add_argument("--count", type=int, default=300, help="pictures of the strokes stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=SHIPPED)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    faulthandler.register(signal.SIGUSR1)  # where is it? kill -USR1
    torch.set_flush_denormal(True)  # CPUs are slow below the range of normal numbers
    options.work.mkdir(parents=True, exist_ok=True)
    if options.stage == "strokes":
        paint_strokes(options)
    elif options.stage == "autoencoder":
        train_autoencoder(options)
    elif options.stage == "unet":
        train_unet(options)
    elif options.stage == "decoder":
        train_decoder(options)
    elif options.stage == "transformer":
        train_transformer(options)
    elif options.stage == "export":
        export_all(options)
    elif options.stage == "report-transformer":
        transformer = options.output.with_name(SHIPPED_TRANSFORMER.name)
        evaluate_transformer.report(options.output, transformer, options.assets, options.work, ROOT / "docs" / "mini")
    else:
        evaluate.report(options.output, options.assets, options.work, ROOT / "docs" / "mini")


if __name__ == "__main__":
    main()
