"""Features of images: pixels, a small network trained here, or Inception-v3."""

import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import requests
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from diffjax.checkpoint import tree_sha256
from diffjax.data.files import atomic_path
from diffjax.devices.parallel import BatchMapper
from diffjax.evaluation import inception as inception_v3
from diffjax.interop.torch_file import read_pt

URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
NETWORK_SECONDS = 10.0

FEATURES = 64  # of the small network
STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 600, 128, 2e-3, 1e-4
MOST_READ = 50_000  # examples of a split that are held in memory
MOST_HASHED = 1000  # examples of a split by which a trained network is found again


class Outputs(NamedTuple):
    """The outputs of an extractor for N images."""

    features: np.ndarray  # float32 [N, D]
    probabilities: np.ndarray | None  # float32 [N, classes]; None unless it is a classifier


class Extractor(NamedTuple):
    """A function from images to features."""

    name: str  # all that its features depend on
    extract: Callable[[np.ndarray], Outputs]  # of uint8 [N, H, W, C]; ValueError for others
    accuracy: float | None = None  # of a classifier trained here, on held-out real images


def pixels() -> Extractor:
    """Pixels of 0..1 as features [N, H*W*C]: no network, and little of what eyes see."""
    return Extractor("pixels", _extract_pixels)


def _extract_pixels(images: np.ndarray) -> Outputs:
    _check_images(images)
    return Outputs(images.reshape(len(images), -1).astype(np.float32) / 255, None)


# ------------------------------------------------------------------------------- a small network


class Labelled(NamedTuple):
    """Images with their classes."""

    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int [N]


class Classifier(nn.Module):
    """A small convolutional classifier of images.

    3x3 convolutions with strides down to 4x4 or less, and two dense layers.
    """

    classes: int

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Features [B, 64] and logits [B, classes] of x [B, H, W, C] in [-1, 1]."""
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        while max(x.shape[1:3]) > 4:
            x = nn.relu(nn.Conv(64, (3, 3), (2, 2))(x))
        features = nn.relu(nn.Dense(FEATURES)(x.reshape(len(x), -1)))
        return features, nn.Dense(self.classes)(features)


def small_cnn(
    train: Any, held_out: Any, classes: int, cache: Path, seed: int, data: str = "images"
) -> Extractor:
    """A classifier of real images, whose last hidden layer gives the features.

    It is trained once: the network, its training, the seed, the numbers of images and up to 1000 of
    each split name its file in the folder `cache`, from which it is read later. A damaged or
    foreign file is replaced. Of a split of more than 50,000 images so many are drawn.

    train, held_out: examples in random access, {"image": uint8 [H, W, C], "label": int}, labels
    0..classes-1. data: a description of them, as "digits train split".

    Raises: ValueError for other images or labels, or those of one class; OSError for a folder that
    cannot be written.
    """
    network = Classifier(classes)
    recipe = f"{STEPS} steps of {BATCH}, AdamW {LEARNING_RATE} {WEIGHT_DECAY}, cosine, seed {seed}"
    some = {
        name: _read_labelled(source, name, classes, MOST_HASHED)
        for name, source in (("train", train), ("held_out", held_out))
    }
    shape = some["train"].images.shape[1:]
    _check_size(some["held_out"].images, shape, "held_out.images")
    sizes = len(train), len(held_out)
    used = [min(size, MOST_READ) for size in sizes]
    checksum = tree_sha256({name: drawn._asdict() for name, drawn in some.items()})
    key = hashlib.sha256(f"{network!r} {recipe} {sizes} {checksum}".encode()).hexdigest()
    file = cache / f"cnn-{key[:16]}.safetensors"
    found = _read(file, key)
    if found is None:
        found = _fit(network, train, held_out, seed)
        _write(file, key, *found)
    params, accuracy = found
    name = (
        f"cnn-{FEATURES} trained on {data} ({used[0]:,}), seed {seed}, {accuracy:.1%} of"
        f" {used[1]:,} held out, sha256:{tree_sha256(params)[:8]}"
    )
    mapper = BatchMapper(partial(_classify, network), params, 512)
    return Extractor(name, partial(_extract_by_cnn, mapper, shape), accuracy)


def _read_labelled(source: Any, name: str, classes: int, most: int, title: str = "") -> Labelled:
    """Examples of a split, in order: all, or `most` that are drawn from all of them."""
    drawn = np.sort(np.random.default_rng(0).permutation(len(source))[:most])
    bar = tqdm(drawn, title, unit="image", dynamic_ncols=True, leave=False, disable=not title)
    examples = [source[int(i)] for i in bar]
    images = np.array([example["image"] for example in examples])
    data = Labelled(images, np.array([example["label"] for example in examples]))
    _check_labelled(data, name, classes)
    return data


def _fit(network: Classifier, train: Any, held_out: Any, seed: int) -> tuple[Any, float]:
    """The parameters of a network that is trained, and its accuracy on held-out images."""
    classes = network.classes
    real = _read_labelled(train, "train", classes, MOST_READ, "train images")
    if len(np.unique(real.labels)) < 2:
        raise ValueError(
            f"train.labels has the one class {real.labels[0]}: a classifier needs 2 or more"
        )
    params = _train(network, real, seed)
    images, labels = _read_labelled(held_out, "held_out", classes, MOST_READ, "held-out images")
    probabilities = BatchMapper(partial(_classify, network), params, 512)((images,))[1]
    return params, float(np.mean(probabilities.argmax(1) == labels))


def _extract_by_cnn(mapper: BatchMapper, shape: tuple[int, ...], images: np.ndarray) -> Outputs:
    _check_images(images)
    _check_size(images, shape)
    return Outputs(*mapper((images,)))


def _classify(network: Classifier, params: Any, images: Array) -> tuple[Array, Array]:
    features, logits = _apply(network, params, _to_float(images))
    return features, jax.nn.softmax(logits)


def _loss(network: Classifier, params: Any, x: Array, y: Array) -> Array:
    _, logits = _apply(network, params, _to_float(x))
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def _train(network: Classifier, data: Labelled, seed: int) -> Any:
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, STEPS)
    optimizer = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)

    @jax.jit
    def step(state: Any, x: Array, y: Array) -> tuple[Any, Array]:
        params, moments = state
        value, gradients = jax.value_and_grad(partial(_loss, network))(params, x, y)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    images, labels = data
    x = jnp.zeros((1, *images.shape[1:]))
    params = jax.jit(network.init)(jax.random.key(seed), x)["params"]
    state, rng = (params, optimizer.init(params)), np.random.default_rng(seed)
    value: Any = np.nan
    with tqdm(total=STEPS, desc=f"cnn-{FEATURES}", unit="step", dynamic_ncols=True) as bar:
        for _ in range(STEPS):
            index = rng.integers(0, len(images), BATCH)
            state, value = step(state, images[index], labels[index].astype(np.int32))
            bar.update()
        bar.set_postfix(loss=f"{value:.4f}")
    return jax.device_get(state[0])


def _write(file: Path, key: str, params: Any, accuracy: float) -> None:
    tensors: dict[str, Any] = {"/".join(path): leaf for path, leaf in flatten_dict(params).items()}
    metadata = {"key": key, "accuracy": repr(accuracy), "digest": _digest(params, accuracy)}
    with atomic_path(file) as part:
        save_file(tensors, part, metadata=metadata)


def _read(file: Path, key: str) -> tuple[Any, float] | None:
    """The parameters and the accuracy of a file; None if it is missing, damaged or foreign."""
    try:
        with safe_open(file, "numpy") as opened:
            metadata = opened.metadata() or {}
        params = unflatten_dict(load_file(file), sep="/")
        accuracy = float(metadata.get("accuracy", ""))
    except (OSError, SafetensorError, ValueError):
        return None
    expected = key, _digest(params, accuracy)
    found = metadata.get("key"), metadata.get("digest")
    return (params, accuracy) if found == expected else None


def _digest(params: Any, accuracy: float) -> str:
    return hashlib.sha256(f"{tree_sha256(params)} {accuracy!r}".encode()).hexdigest()


# ------------------------------------------------------------------------------- Inception


def inception(weights: Path | None = None) -> Extractor:
    """Inception-v3 of 2015, which defines FID, KID and the inception score.

    2048 features, 1008 classes. Grey images are repeated to RGB.

    weights: a .safetensors or .pth file of the tensors that `inception_v3.from_tensors` names. None
    for the file of URL's name in `cache_folder()`, as .safetensors or .pth, which is downloaded
    once.

    Raises: ValueError, with the remedy, for weights that are missing or cannot be used.
    """
    path = weights or _cached_weights()
    if not path.is_file():
        raise ValueError(
            f"inception is {path}, which is missing: use a .safetensors or .pth file of its weights"
        )
    tensors = _tensors(path)
    try:
        params = inception_v3.from_tensors(tensors)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    mapper = BatchMapper(_run_inception, params, 32)
    name = f"inception-v3-2015 sha256:{_sha256(path)[:8]}"
    return Extractor(name, partial(_extract_by_inception, mapper))


def _run_inception(params: Any, images: Array) -> tuple[Array, Array]:
    features, logits = _apply(inception_v3.Inception(), params, images)
    return features, jax.nn.softmax(logits)


def _extract_by_inception(mapper: BatchMapper, images: np.ndarray) -> Outputs:
    _check_images(images)
    rgb = np.repeat(images, 3, -1) if images.shape[-1] == 1 else images
    total = mapper.num_batches(len(rgb))
    with tqdm(total=total, desc="inception", unit="batch", dynamic_ncols=True) as bar:
        return Outputs(*mapper((rgb,), bar.update))


def cache_folder() -> Path:
    """The folder of trained and downloaded weights.

    It is diffjax in $XDG_CACHE_HOME, or else in ~/.cache.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffjax"


def fetch(url: str, sha256: str, path: Path) -> None:
    """Download a file, unless it is there with this checksum.

    Raises: ValueError, with the place to put it by hand, if it cannot be downloaded.
    """
    if path.is_file() and _sha256(path) == sha256:
        return
    advice = f"download it on a machine with a network, and put it at {path}"
    try:
        with atomic_path(path) as part:
            _download(url, part, path.name)
            if _sha256(part) != sha256:
                raise ValueError(f"{url} is not the file of sha256 {sha256}: {advice}")
    except requests.RequestException as error:
        raise ValueError(
            f"{path} is missing, and {url} cannot be downloaded ({_reason(error)}): {advice}"
        ) from None


def _download(url: str, path: Path, title: str) -> None:
    with requests.get(url, stream=True, timeout=NETWORK_SECONDS) as answer:
        answer.raise_for_status()
        total = int(answer.headers.get("content-length", 0)) or None
        with (
            path.open("wb") as file,
            tqdm(total=total, desc=title, unit="B", unit_scale=True) as bar,
        ):
            for chunk in answer.iter_content(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))


def _reason(error: requests.RequestException) -> str:
    answer = error.response
    return f"{answer.status_code} {answer.reason}" if answer is not None else type(error).__name__


def _cached_weights() -> Path:
    path = cache_folder() / URL.rsplit("/", 1)[1]
    safetensors = path.with_suffix(".safetensors")
    if safetensors.is_file():
        return safetensors
    fetch(URL, SHA256, path)
    return path


def _tensors(path: Path) -> dict[str, np.ndarray]:
    if path.suffix != ".safetensors":
        return read_pt(path).tensors
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file ({error})") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------- of all extractors


def _apply(network: nn.Module, params: Any, images: Array) -> Any:
    return network.apply({"params": params}, images)


def _to_float(images: Array) -> Array:
    return images.astype(jnp.float32) / 127.5 - 1


def _check_images(images: np.ndarray, name: str = "images") -> None:
    batch = images.ndim == 4 and images.shape[-1] in (1, 3) and len(images)
    if images.dtype != np.uint8 or not batch:
        raise ValueError(
            f"{name} has dtype {images.dtype} and shape {list(images.shape)}: use uint8"
            " [N, H, W, 1 or 3] with N of 1 or more"
        )


def _check_size(images: np.ndarray, shape: tuple[int, ...], name: str = "images") -> None:
    if images.shape[1:] != shape:
        found, expected = ("x".join(map(str, each)) for each in (images.shape[1:], shape))
        raise ValueError(
            f"{name} has images of {found}, and the classifier is trained on {expected}: use the"
            " same size"
        )


def _check_labelled(data: Labelled, name: str, classes: int) -> None:
    images, labels = data
    _check_images(images, f"{name}.images")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{name}.labels has dtype {labels.dtype}: use integers")
    if np.min(labels) < 0 or np.max(labels) >= classes:
        raise ValueError(
            f"{name}.labels has {np.min(labels)} to {np.max(labels)}: use 0 to {classes - 1}"
        )
