"""The encoding pipeline against a bare loop, and its memory as the number of images grows.

    python -m tests.benchmarks.encode [--images FOLDER_OR_TAR --classes N] [--count 48]

The autoencoder has the size of Stable Diffusion's, with random weights. The bare loop decodes and
encodes in one process on the same CPUs. Without --images, noisy JPEG files are generated.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from diffit_train.config import Recipe, load_recipe
from diffit_train.data.autoencoder import load_autoencoder
from diffit_train.data.encode import encode
from diffit_train.data.preprocess import to_model_range
from diffit_train.data.reading import read_items
from diffit_train.data.sources import list_images
from tests.benchmarks.common import print_table

CPUS = os.cpu_count() or 1


def make_images(folder: Path, count: int) -> None:
    """JPEG files of about ImageNet's size in two classes."""
    random = np.random.default_rng(0)
    for number in range(count):
        small = random.integers(0, 256, (50, 64, 3), dtype=np.uint8)
        path = folder / "ab"[number % 2] / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize((500, 390), Image.Resampling.BICUBIC).save(path, quality=90)


def make_autoencoder(folder: Path, channels: tuple[int, ...]) -> None:
    """An AutoencoderKL with random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=2,
        norm_num_groups=8,
    ).save_pretrained(folder)


def recipe_for(root: Path, source: str, classes: int, per_shard: int, batch: int) -> Recipe:
    """The ImageNet recipe on this machine's CPUs."""
    return load_recipe(
        "imagenet256",
        [
            f"data.source={source}",
            f"data.num_classes={classes}",
            "data.flip=false",
            f"data.images_per_shard={per_shard}",
            "autoencoder.source=root:autoencoder",
            f"autoencoder.batch_size={batch}",
            "autoencoder.precision=fp32",
            "scaling.encode_actors=1",
            f"scaling.encode_threads={CPUS}",
            "scaling.gpus_per_actor=0",
        ],
        root=str(root),
    )


def bare_loop(recipe: Recipe, skip: int) -> float:
    """Images per second of decoding and encoding in this process, after the first `skip`."""
    torch.set_num_threads(CPUS)
    autoencoder = load_autoencoder(recipe, torch.device("cpu"))
    listing, batch = list_images(recipe), recipe.autoencoder.batch_size
    started_s = 0.0
    for start in range(0, len(listing), batch):
        if start == skip:
            started_s = time.perf_counter()
        items = listing.items[start : start + batch]
        pixels = read_items(listing.source, items, recipe.data.resolution).pixels
        autoencoder.encode_moments(to_model_range(pixels)).astype(np.float16)
    return (len(listing) - skip) / (time.perf_counter() - started_s)


def pipeline(recipe: Recipe, skip: int) -> tuple[float, float]:
    """Images per second after the first shards of `skip` images, and total seconds."""
    shutil.rmtree(Path(recipe.storage.root) / "latents", ignore_errors=True)
    started_s = time.time()
    manifest = encode(recipe)
    total_s = time.time() - started_s
    folder = Path(recipe.storage.root) / "latents" / recipe.data.name
    times = [(folder / shard.name).stat().st_mtime for shard in manifest.shards]
    first = skip // recipe.data.images_per_shard
    return (manifest.totals.written - skip) / (max(times) - times[first - 1]), total_s


def peak_bytes(body: Callable[[], object]) -> int:
    """Peak memory of this process and its children; shared memory is counted once."""
    peak, stop = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.25):
            total = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue  # it has just ended
            peak = max(peak, total)

    thread = threading.Thread(target=watch)
    thread.start()
    body()
    stop.set()
    thread.join()
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="source of images, as data.source")
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--memory-count", type=int, default=512)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_autoencoder(root / "autoencoder", (128, 256, 512, 512))
        source = options.images
        if source is None:
            make_images(root / "images", options.count)
            source = str(root / "images")
        recipe = recipe_for(root, source, options.classes, per_shard=8, batch=4)
        listing = list_images(recipe)
        start = time.perf_counter()
        read_items(listing.source, listing.items, 256)
        reading = len(listing) / (time.perf_counter() - start)
        bare = bare_loop(recipe, skip=8)
        steady, total_s = pipeline(recipe, skip=8)
        again = bare_loop(recipe, skip=8)
        bare = (bare + again) / 2
        print_table(
            f"{len(listing)} images at 256x256, full-size autoencoder, {CPUS} CPUs",
            ["", "images/s", "vs. bare loop"],
            [
                ["bare loop (before and after)", f"{bare:.3f}", "1.00"],
                ["pipeline, steady state", f"{steady:.3f}", f"{steady / bare:.2f}"],
                [
                    "pipeline, including startup",
                    f"{len(listing) / total_s:.3f}",
                    f"{len(listing) / total_s / bare:.2f}",
                ],
                ["reading, decoding, cropping, one process", f"{reading:.1f}", ""],
            ],
        )

        shutil.rmtree(root / "autoencoder")
        make_autoencoder(root / "autoencoder", (8, 8, 8, 8))
        rows, first = [], 0
        for times in (1, 4):
            shutil.rmtree(root / "images", ignore_errors=True)
            make_images(root / "images", times * options.memory_count)
            small = recipe_for(root, str(root / "images"), 2, per_shard=64, batch=16)
            shutil.rmtree(root / "latents", ignore_errors=True)
            peak = peak_bytes(lambda small=small: encode(small))
            first = first or peak
            count = times * options.memory_count
            rows.append([f"{count:,}", f"{peak / 2**20:,.0f}", f"{peak / first:.3f}"])
        print_table("Peak memory of all processes", ["images", "MiB", "vs. first"], rows)


if __name__ == "__main__":
    main()
