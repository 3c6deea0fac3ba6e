"""Classes that successive batches see: of a source sorted by class, against a uniform draw.

    python -m tests.benchmarks.order

ImageNet's 1,281,167 images in 1,000 classes, shards of 512, batches of 256, windows of 1,024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from diffit_train.data.encode_plan import encode_order
from diffit_train.data.loader import SampleOrder
from diffit_train.data.sources import Item
from tests.benchmarks.common import print_table

IMAGES, CLASSES, PER_SHARD, BATCH, WINDOW = 1_281_167, 1_000, 512, 256, 1024


def classes_seen(labels: np.ndarray, streams: int, first: int, batches: int, seed: int = 0) -> int:
    """Number of classes in successive batches of a source with these labels, (n,)."""
    counts = np.bincount(np.arange(len(labels)) // PER_SHARD).tolist()
    order = SampleOrder(counts, BATCH, streams, WINDOW, seed)
    starts = np.cumsum([0, *counts])
    found = {
        int(labels[starts[shard] + offset])
        for step in range(first, first + batches)
        for stream in range(order.streams)
        for shard, offset in order.stream_samples(step, stream)
    }
    return len(found)


def expected_classes(classes: int, samples: int) -> float:
    """Expected number of classes in a uniform draw of samples."""
    return classes * (1.0 - (1.0 - 1.0 / classes) ** samples)


def sorted_labels(images: int, classes: int) -> np.ndarray:
    """Labels of a source that is listed by class, (n,)."""
    return np.arange(images) * classes // images


def permuted(labels: np.ndarray) -> np.ndarray:
    """The labels in the order of encoding."""
    items = cast(Sequence[Item], range(len(labels)))
    return labels[encode_order(items, False, PER_SHARD, 0)]


def main() -> None:
    by_class = sorted_labels(IMAGES, CLASSES)
    ways = {
        "sorted, 256 streams": (by_class, 256),
        "permuted, 64 streams": (permuted(by_class), 64),
        "permuted, 256 streams": (permuted(by_class), 256),
    }
    rows = []
    for name, way in ways.items():
        seen = [classes_seen(*way, first, 16) for first in (0, 1000, 3000)]
        rows.append([name, *map(str, seen)])
    uniform = f"{expected_classes(CLASSES, 16 * BATCH):.0f}"
    rows.append(["expected of a uniform draw", uniform, uniform, uniform])
    title = f"classes of {CLASSES:,} in 16 batches of {BATCH} from step 0, 1,000 and 3,000"
    print_table(title, ["", "0", "1,000", "3,000"], rows)


if __name__ == "__main__":
    main()
