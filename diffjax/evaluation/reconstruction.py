"""The quality of an autoencoder, by its reconstructions of held-out images."""

from typing import Any

import numpy as np

from diffjax.build import count_parameters
from diffjax.data.image_io import to_float, to_uint8
from diffjax.evaluation import metrics
from diffjax.evaluation.features import Extractor, Outputs
from diffjax.evaluation.metrics import Moments
from diffjax.evaluation.quality import LEAST_IMAGES, Reference, compare, extract
from diffjax.evaluation.results import ReconstructionRow, versions
from diffjax.inference.autoencoder import TrainedAutoencoder, autoencoder_codec
from diffjax.inference.pipeline import NotFiniteError, describe_devices


def number_of_images(reference: Reference, num: int) -> int:
    """The number of held-out images, at most `num`.

    Raises: ValueError for too few of them.
    """
    num = min(num, len(reference.held_out))
    if num < LEAST_IMAGES:
        raise ValueError(f"num is {num}, of held-out images: use {LEAST_IMAGES} or more")
    return num


def measure_reconstructions(
    autoencoder: TrainedAutoencoder, reference: Reference, num: int, batch: int, data: str
) -> ReconstructionRow:
    """Reconstruct held-out images from the means of their latents, and compare both.

    PSNR and SSIM compare each image, of 8 bits, with its reconstruction; distances compare all
    reconstructions with the real images of the reference, as those of generated images do.

    num: of the first held-out images. batch: images at a time, over the devices of this process.
    data: a description of the images.

    Raises: NotFiniteError for reconstructions that are not finite.
    """
    examples = [reference.held_out[i] for i in range(num)]
    images = np.stack([example["image"] for example in examples])
    codec = autoencoder_codec(autoencoder, batch)
    x = codec.encode(to_float(images))
    decoded = codec.decode(x)
    if not np.isfinite(decoded).all():
        raise NotFiniteError("reconstructions are not finite: use another checkpoint")
    others, c = to_uint8(decoded), autoencoder.config
    found = extract(reference.extractor, others)
    distances = compare(reference, found, _accuracy(reference.extractor, examples, found))
    is_large = min(images.shape[1:3]) >= metrics.WINDOW
    size = "x".join(map(str, images.shape[1:]))
    return ReconstructionRow(
        **vars(distances),
        network=f"autoencoder of {autoencoder.source}",
        parameters=count_parameters(autoencoder.params),
        image_size=size,
        dtype=c.dtype,
        weights=f"{autoencoder.weights}, step {autoencoder.step},"
        f" sha256:{autoencoder.checksum[:8]}",
        device=describe_devices(),
        versions=versions(),
        latent_size="x".join(map(str, x.shape[1:])),
        images=num,
        batch=batch,
        data=f"{data}, held out",
        extractor=reference.extractor.name,
        reference=reference.name,
        psnr=metrics.peak_signal_to_noise(images, others),
        ssim=float(metrics.structural_similarity(images, others).mean()) if is_large else None,
        images_fd=_distance(reference, reference.extractor, images),
        latent_std=float(x.std(dtype=np.float64) / c.scaling),
        scaling=c.scaling,
    )


def _distance(reference: Reference, extractor: Extractor, images: np.ndarray) -> float:
    vectors = extract(extractor, images).features
    moments = Moments.empty(vectors.shape[1]).update(vectors)
    return metrics.frechet_distance(reference.moments, moments)


def _accuracy(extractor: Extractor, examples: list[Any], found: Outputs) -> float | None:
    """The share of reconstructions that are classified as the label of the image.

    None without a classifier that was trained on these labels.
    """
    if extractor.accuracy is None or found.probabilities is None:
        return None
    classes = np.array([example["label"] for example in examples])
    return float(np.mean(found.probabilities.argmax(1) == classes))
