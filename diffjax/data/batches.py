"""The stream of batches that training sees: shuffled, shared out over hosts, read ahead.

The stream is a function of the step: example i of global batch n has index n*batch + i, whatever the number of hosts,
so nothing of it needs saving in a checkpoint.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from diffjax.data.image_io import to_float

READ_AHEAD = 16  # batches: a slow file or two holds up no step
THREADS = min(16, os.cpu_count() or 1)  # that decode them; pixels are decoded outside of Python's lock


def batch_stream(
    source: Any,
    batch: int,
    seed: int,
    start: int = 0,
    *,
    labels: bool = True,
    flip: bool = False,
    host: int = 0,
    hosts: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """The endless stream of this host's share of global batches start, start + 1, ...; it reads no others.

    Yields {"image": float32 [batch/hosts, H, W, C] in [-1, 1], "label": int32 if labels, "index": uint32, the global
    example index}. Each pass over the data is in a new random order, of `seed` alone. flip: mirror each image,
    left to right, with probability 1/2, keyed by (seed, index). Read ahead by threads. ValueError for a batch larger
    than the data, or one that the hosts cannot share equally.
    """
    if len(source) < batch:
        raise ValueError(f"a batch of {batch} is more than the {len(source)} images of this split: use a smaller batch")
    if batch % hosts:
        raise ValueError(f"a batch of {batch} cannot be shared equally by {hosts} hosts: use a multiple of {hosts}")
    shuffled = grain.MapDataset.source(source).seed(seed).shuffle().repeat(None)
    examples = shuffled.map_with_index(_example(labels, seed if flip else None))
    stream = examples.batch(batch // hosts)[start * hosts + host :: hosts]
    return iter(stream.to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=READ_AHEAD)))


def first_batches(
    source: Any, batch: int, multiple: int, limit: int, *, labels: bool = True
) -> list[dict[str, np.ndarray]]:
    """At most `limit` batches from the start of the data, in order and in memory: the same images at every evaluation.
    Of `batch` examples, or where there are fewer of the largest multiple of `multiple` that there is.
    """
    batch = min(batch, len(source) // multiple * multiple)
    if not batch:
        raise ValueError(f"a split of {len(source)} images cannot be shared out over {multiple} devices: use fewer")
    stream: Any = grain.MapDataset.source(source).map_with_index(_example(labels)).batch(batch, drop_remainder=True)
    return [stream[i] for i in range(min(limit, len(stream)))]


def first_images(source: Any, num: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The first images of a split, float32 [num, H, W, C] in [-1, 1], and their labels, int32 [num], or None where they
    have none. ValueError where there are not so many.
    """
    if not 1 <= num <= len(source):
        raise ValueError(f"{num} images are asked for: this split holds {len(source)}, use 1 or more of them")
    examples = [source[i] for i in range(num)]
    images = to_float(np.stack([example["image"] for example in examples]))
    labelled = "label" in examples[0]
    return images, np.array([example["label"] for example in examples], np.int32) if labelled else None


def _example(labels: bool, flip_seed: int | None = None) -> Callable[[int, dict[str, Any]], dict[str, Any]]:
    def convert(index: int, example: dict[str, Any]) -> dict[str, Any]:
        image = to_float(example["image"])
        if flip_seed is not None and np.random.default_rng((flip_seed, index)).random() < 0.5:
            image = image[:, ::-1]
        label = {"label": np.int32(example["label"])} if labels else {}
        return {"image": image, "index": np.uint32(index), **label}

    return convert
