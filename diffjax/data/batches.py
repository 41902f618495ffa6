"""The shuffled stream of batches that training reads, divided among processes.

The stream is a function of the step: example i of global batch n has index n*batch + i, whatever
the number of processes, so a checkpoint needs to store nothing of it.
"""

import os
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from diffjax.data.image_io import to_float
from diffjax.data.latents import MIRRORED, MOMENTS, draw
from diffjax.nn.conditioning import UNCONDITIONAL, Condition, Conditioning

READ_AHEAD = 16  # batches: a slow file or two delays no step
THREADS = min(16, os.cpu_count() or 1)  # pixels are decoded without Python's lock


def batch_stream(
    source: Any,
    batch: int,
    seed: int,
    start: int = 0,
    *,
    conditioning: Conditioning = UNCONDITIONAL,
    flip: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, Any]]:
    """One process's share of the endless global batches start, start + 1, ...

    Yields {"x": float32 [batch/process_count, H, W, C] in [-1, 1], or latents, "index": uint32, the
    global example index, "condition": as the conditioning reads it, absent if None}. No other
    examples are read. Each pass over the data is in a new random order, of `seed` alone, with new
    latents, drawn from their moments by (seed, index). flip: mirror each image, left to right, with
    probability 1/2, keyed by (seed, index).

    Raises: ValueError for a batch larger than the data, or not divisible by the processes.
    """
    if len(source) < batch:
        raise ValueError(
            f"batch is {batch}, and this split has {len(source)} examples: use a smaller batch"
        )
    if batch % process_count:
        raise ValueError(
            f"batch is {batch}: {process_count} processes need a multiple of {process_count}"
        )
    shuffled = grain.MapDataset.source(source).seed(seed).shuffle().repeat(None)
    examples = shuffled.map_with_index(partial(_convert, conditioning, _Random(seed, flip)))
    batches = examples.batch(batch // process_count)
    stream = batches[start * process_count + process_index :: process_count]
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=READ_AHEAD)
    return iter(stream.to_iter_dataset(options))


def first_batches(
    source: Any,
    batch: int,
    multiple: int,
    limit: int,
    *,
    conditioning: Conditioning = UNCONDITIONAL,
) -> list[dict[str, Any]]:
    """The first batches of a split, at most `limit` of them, in memory.

    They are as those of `batch_stream`, except that latents are their mean. If the split has fewer
    than `batch` examples, there is one batch, of the largest multiple of `multiple` that it has.

    Raises: ValueError for fewer than `multiple` examples, unless `limit` is 0.
    """
    if not limit:
        return []
    batch = min(batch, len(source) // multiple * multiple)
    if not batch:
        raise ValueError(
            f"a split has {len(source)} examples for {multiple} devices: use fewer devices"
        )
    examples = grain.MapDataset.source(source).map_with_index(partial(_convert, conditioning, None))
    stream: Any = examples.batch(batch, drop_remainder=True)
    return [stream[i] for i in range(min(limit, len(stream)))]


def first_examples(
    source: Any, num: int, conditioning: Conditioning = UNCONDITIONAL
) -> tuple[np.ndarray, Condition]:
    """The first examples of a split: x (latents: their mean), conditions, [num, ...].

    Raises: ValueError for fewer than `num` examples.
    """
    if not 1 <= num <= len(source):
        raise ValueError(
            f"num is {num}, and this split has {len(source)} examples: use 1 to {len(source)}"
        )
    examples = [_convert(conditioning, None, i, source[i]) for i in range(num)]
    conditions = [example.get("condition") for example in examples]
    x = np.stack([example["x"] for example in examples])
    return x, jax.tree.map(lambda *leaves: np.stack(leaves), *conditions)


class _Random(NamedTuple):
    """The draws of training, keyed by (seed, index of the example)."""

    seed: int
    flip: bool


def _x_of(example: dict[str, Any], random: _Random | None, index: int) -> np.ndarray:
    """The image, or latents drawn from their moments, of either mirrored or not.

    Without draws they are the image as it is, or the mean of its latents.
    """
    is_latent, rng, mirrored = MOMENTS in example, None, False
    if random is not None and (is_latent or random.flip):
        rng = np.random.default_rng((random.seed, index))
        mirrored = random.flip and rng.random() < 0.5
    if is_latent:
        return draw(example[MIRRORED if mirrored else MOMENTS], rng)
    image = to_float(example["image"])
    return image[:, ::-1] if mirrored else image


def _convert(
    conditioning: Conditioning, random: _Random | None, index: int, example: dict[str, Any]
) -> dict[str, Any]:
    converted = {"x": _x_of(example, random, index), "index": np.uint32(index)}
    condition = conditioning.read(example)
    return converted if condition is None else converted | {"condition": condition}
