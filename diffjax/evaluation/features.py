"""What images are told apart by: pixels, a small network that is trained here, or Inception-v3."""

import hashlib
import importlib.util
import os
import pickle
from collections.abc import Callable
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
from diffjax.devices import parallel
from diffjax.evaluation import inception as inception_v3

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
CONVERT = "safetensors.torch.save_file(torch.load(PTH, weights_only=True), SAFETENSORS)"
NETWORK_SECONDS = 10.0

FEATURES = 64  # of the small network
STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 600, 128, 2e-3, 1e-4


class Outputs(NamedTuple):
    """Of N images."""

    features: np.ndarray  # float32 [N, D]
    probabilities: np.ndarray | None  # float32 [N, classes], where the extractor is a classifier


class Extractor(NamedTuple):
    """A way to see images."""

    name: str  # all that its figures depend on, for every row that holds one
    extract: Callable[[np.ndarray], Outputs]  # of uint8 [N, H, W, C]; ValueError for others


def pixels() -> Extractor:
    """Pixels of 0..1, in a row: no network, and little of what eyes see."""

    def extract(images: np.ndarray) -> Outputs:
        images = _checked(images)
        return Outputs(images.reshape(len(images), -1).astype(np.float32) / 255, None)

    return Extractor("pixels", extract)


# ------------------------------------------------------------------------------------------- a small network


class Classifier(nn.Module):
    """(features [B, 64], logits [B, classes]) of images [B, H, W, C] in [-1, 1]: 3x3 convolutions with strides down to
    4x4 or less, and two dense layers.
    """

    classes: int

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Features are the 64 numbers that the last layer sees."""
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        while max(x.shape[1:3]) > 4:
            x = nn.relu(nn.Conv(64, (3, 3), (2, 2))(x))
        features = nn.relu(nn.Dense(FEATURES)(x.reshape(len(x), -1)))
        return features, nn.Dense(self.classes)(features)


def small_cnn(
    images: np.ndarray,
    labels: np.ndarray,
    held_out_images: np.ndarray,
    held_out_labels: np.ndarray,
    classes: int,
    cache: Path,
    seed: int,
    data: str = "images",
) -> Extractor:
    """A classifier of the real images, trained once: what it is made of, the images, the seed and the training, names
    its file in the folder `cache`, from which it is read ever after. A file that is damaged, or of something else, is
    written anew.

    images: uint8 [N, H, W, C]; labels: int [N] of 0..classes-1; data: what the images are, for the name, as in "digits
    train split". Features are the last hidden layer's. ValueError for other images or labels; OSError for a folder
    that cannot be written.
    """
    parts = {"images": (images, labels), "held-out images": (held_out_images, held_out_labels)}
    for each, (part, of) in parts.items():
        _checked(part, images.shape[1:])
        if len(of) != len(part) or not np.issubdtype(np.asarray(of).dtype, np.integer):
            raise ValueError(f"the labels of {len(part)} {each} are {len(of)}: use one whole number each")
        if np.min(of) < 0 or np.max(of) >= classes:
            raise ValueError(f"the labels of {each} are of {np.min(of)} to {np.max(of)}: use 0 to {classes - 1}")
    network = Classifier(classes)
    recipe = f"{STEPS} steps of {BATCH}, AdamW {LEARNING_RATE} {WEIGHT_DECAY}, cosine, seed {seed}"
    key = hashlib.sha256(
        f"{network!r} {recipe} {tree_sha256({'images': images, 'labels': labels.astype(np.int64)})}".encode()
    ).hexdigest()
    file = cache / f"cnn-{key[:16]}.safetensors"
    params = _read(file, key)
    if params is None:
        cache.mkdir(parents=True, exist_ok=True)
        params = _train(network, images, labels, seed)
        part = file.with_name(file.name + ".part")
        tensors: dict[str, Any] = {"/".join(path): leaf for path, leaf in flatten_dict(params).items()}
        save_file(tensors, part, metadata={"key": key, "digest": tree_sha256(params)})
        os.replace(part, file)

    def run(params: Any, images: Array) -> tuple[Array, Array]:
        features, logits = _apply(network, params, _to_float(images))
        return features, jax.nn.softmax(logits)

    over = _over_devices(run, params, 512)

    shape = images.shape[1:]

    def extract(images: np.ndarray) -> Outputs:
        return Outputs(*over(_checked(images, shape)))

    _, probabilities = over(held_out_images)
    right = np.mean(probabilities.argmax(1) == held_out_labels)
    name = (
        f"cnn-{FEATURES} trained on {data} ({len(images):,}), seed {seed}, {right:.1%} of {len(held_out_images):,} held"
        f" out, sha256:{tree_sha256(params)[:8]}"
    )
    return Extractor(name, extract)


def _to_float(images: Array) -> Array:
    return images.astype(jnp.float32) / 127.5 - 1


def _train(network: Classifier, images: np.ndarray, labels: np.ndarray, seed: int) -> Any:
    optimizer = optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, STEPS), weight_decay=WEIGHT_DECAY)

    def loss(params: Any, x: Array, y: Array) -> Array:
        _, logits = _apply(network, params, _to_float(x))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    @jax.jit
    def step(state: Any, x: Array, y: Array) -> tuple[Any, Array]:
        params, moments = state
        value, gradients = jax.value_and_grad(loss)(params, x, y)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    params = jax.jit(network.init)(jax.random.key(seed), jnp.zeros((1, *images.shape[1:])))["params"]
    state, rng = (params, optimizer.init(params)), np.random.default_rng(seed)
    with tqdm(total=STEPS, desc=f"cnn-{FEATURES}", unit="step", dynamic_ncols=True) as bar:
        for _ in range(STEPS):
            index = rng.integers(0, len(images), BATCH)
            state, value = step(state, images[index], labels[index].astype(np.int32))
            bar.update()
        bar.set_postfix(loss=f"{value:.4f}")
    return jax.device_get(state[0])


def _read(file: Path, key: str) -> Any:
    """The parameters of a file, or None where it is not there, damaged, or of something else."""
    try:
        with safe_open(file, "numpy") as opened:
            told = opened.metadata() or {}
        params = unflatten_dict(load_file(file), sep="/")
    except (OSError, SafetensorError, ValueError):
        return None
    return params if (told.get("key"), told.get("digest")) == (key, tree_sha256(params)) else None


# ------------------------------------------------------------------------------------------- Inception


def inception(weights: Path | None = None) -> Extractor:
    """Inception-v3 as of 2015, which FID, KID and the inception score are defined by: 2048 features, 1008 classes.

    weights: a .safetensors file of the tensors that `inception_v3.from_tensors` names, or a .pth file of them, which
    takes torch to read. If None, what stands in `cache_folder()` under the name of URL's file, as .safetensors or .pth,
    the latter downloaded once if need be. Grey images are seen as RGB. ValueError, saying what to do, where the weights
    are not there, or others.
    """
    path = weights or _stored()
    if not path.is_file():
        raise ValueError(f"there is no file {path}: name the weights of Inception, .safetensors or .pth")
    try:
        params = inception_v3.from_tensors(_tensors(path))
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error

    def run(params: Any, images: Array) -> tuple[Array, Array]:
        features, logits = _apply(inception_v3.Inception(), params, images)
        return features, jax.nn.softmax(logits)

    over = _over_devices(run, params, 32, "inception")

    def extract(images: np.ndarray) -> Outputs:
        return Outputs(*over(np.repeat(images, 3, -1) if _checked(images).shape[-1] == 1 else images))

    return Extractor(f"inception-v3-2015 sha256:{_sha256(path)[:8]}", extract)


def cache_folder() -> Path:
    """Where what is downloaded or trained once is kept: diffjax in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffjax"


def fetch(url: str, sha256: str, path: Path) -> None:
    """Download a file, unless it is there, whole. ValueError, saying where to put it, where it cannot be had."""
    if path.is_file() and _sha256(path) == sha256:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    advice = f"download it on a machine with a network, and put it at {path}"
    try:
        with requests.get(url, stream=True, timeout=NETWORK_SECONDS) as answer:
            answer.raise_for_status()
            total = int(answer.headers.get("content-length", 0)) or None
            with part.open("wb") as file, tqdm(total=total, desc=path.name, unit="B", unit_scale=True) as bar:
                for chunk in answer.iter_content(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
        if _sha256(part) != sha256:
            raise ValueError(f"what {url} sent is not the file of sha256 {sha256}: {advice}")
        os.replace(part, path)
    except requests.RequestException as error:
        raise ValueError(f"{path} is not there, and {url} cannot be had ({_reason(error)}): {advice}") from None
    finally:
        part.unlink(missing_ok=True)


def _reason(error: requests.RequestException) -> str:
    answer = error.response
    return f"{answer.status_code} {answer.reason}" if answer is not None else type(error).__name__


def _stored() -> Path:
    path = cache_folder() / URL.rsplit("/", 1)[1]
    plain = path.with_suffix(".safetensors")
    if plain.is_file():
        return plain
    if importlib.util.find_spec("torch") is None:
        raise ValueError(
            f"the weights of Inception are not at {plain}, and torch, which reads what {URL} holds, is not installed:"
            f" pip install torch, or where it is, write the file by {CONVERT}"
        )
    fetch(URL, SHA256, path)
    return path


def _tensors(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"it is damaged, or no safetensors file ({error})") from error
    try:
        import torch
    except ImportError:
        raise ValueError(f"torch, which reads it, is not installed: install it, or where it is, {CONVERT}") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"it is damaged, or no file of weights ({str(error).splitlines()[0]})") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------- all of them


def _apply(network: nn.Module, params: Any, images: Array) -> Any:
    return network.apply({"params": params}, images)


def _over_devices(
    function: Callable[..., Any], params: Any, batch: int, title: str | None = None
) -> Callable[[np.ndarray], Any]:
    """over(images): function(params, images) of all images, batch by batch, each shared out over all devices of this
    host; its results on the host. title: of a progress bar, if any.
    """
    mesh = parallel.device_mesh(jax.local_devices())
    whole, split = parallel.replicated(mesh), parallel.batch_sharding(mesh)
    placed = jax.device_put(params, whole)
    compiled = jax.jit(
        jax.shard_map(
            function, mesh=mesh, in_specs=(whole.spec, split.spec), out_specs=split.spec, check_vma=False
        )
    )  # fmt: skip

    def over(images: np.ndarray) -> Any:
        num = len(images)
        size = parallel.round_up(min(batch, num), mesh.size)
        found = []
        for first in tqdm(range(0, num, size), desc=title, unit="batch", dynamic_ncols=True, disable=title is None):
            index = np.arange(first, first + size) % num
            found.append(jax.device_get(compiled(placed, jax.device_put(images[index], split))))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:num], *found)

    return over


def _checked(images: np.ndarray, shape: tuple[int, ...] | None = None) -> np.ndarray:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise ValueError(f"images are {images.dtype} {list(images.shape)}: use uint8 [N, H, W, 1 or 3], one or more")
    if shape is not None and images.shape[1:] != shape:
        is_, was = ("x".join(map(str, each)) for each in (images.shape[1:], shape))
        raise ValueError(f"images are {is_} where the classifier was trained on {was}: use the same size")
    return images
