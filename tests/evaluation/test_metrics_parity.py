"""Metrics and features against torch-fidelity, where the parity extra is installed."""

import hashlib

import chex
import numpy as np
import pytest
from safetensors.numpy import save_file

from diffjax.evaluation import features, inception, metrics

MISSING = "the parity extra is not installed"


def of(number, n, size=12):
    """Features of a set, others for another number, in float64, as torch-fidelity computes then."""
    rng = np.random.default_rng(number)
    return (
        rng.normal(size=(n, size)) * np.linspace(0.1, 2, size) @ rng.normal(size=(size, size)) * 0.3
        + 0.5 * number
    )


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason=MISSING)


def test_frechet_distance(torch):
    theirs = pytest.importorskip("torch_fidelity.metric_fid", reason=MISSING)
    real, generated = of(0, 300), of(1, 200)
    statistics = [
        theirs.fid_features_to_statistics(torch.from_numpy(each)) for each in (generated, real)
    ]
    expected = theirs.fid_statistics_to_metric(*statistics, verbose=False)[
        "frechet_inception_distance"
    ]
    found = metrics.frechet_distance(
        *(metrics.Moments.empty(12).update(each) for each in (generated, real))
    )
    print(f"FID {found!r}, torch-fidelity's {expected!r}")
    # Both in float64; theirs takes the root of a product that is not symmetric.
    assert found == pytest.approx(expected, rel=1e-8)


def test_kernel_distance(torch):
    theirs = pytest.importorskip("torch_fidelity.metric_kid", reason=MISSING)
    real, generated, subsets, size, seed = of(0, 300), of(1, 200), 20, 150, 5
    expected = theirs.kid_features_to_metric(
        *map(torch.from_numpy, (generated, real)),
        kid_subsets=subsets,
        kid_subset_size=size,
        rng_seed=seed,
        verbose=False,
    )
    rng = np.random.RandomState(seed)
    drawn = [
        [rng.choice(len(each), size, replace=False) for each in (generated, real)]
        for _ in range(subsets)
    ]
    found = metrics.kernel_distance(
        real, generated, [(of_real, of_generated) for of_generated, of_real in drawn]
    )
    print(f"KID {found!r}, torch-fidelity's {expected!r}")
    assert found == pytest.approx(
        (expected["kernel_inception_distance_mean"], expected["kernel_inception_distance_std"]),
        rel=1e-10,
    )


def test_inception_score(torch):
    theirs = pytest.importorskip("torch_fidelity.metric_isc", reason=MISSING)
    logits, seed = 3 * of(0, 303), 7
    expected = theirs.isc_features_to_metric(
        torch.from_numpy(logits), splits=10, shuffle=True, rng_seed=seed
    )
    order = np.random.RandomState(seed).permutation(len(logits))
    exponentials = np.exp(logits[order])
    found = metrics.inception_score(exponentials / exponentials.sum(1, keepdims=True), 10)
    print(f"IS {found!r}, torch-fidelity's {expected!r}")
    assert found == pytest.approx(
        (expected["inception_score_mean"], expected["inception_score_std"]), rel=1e-10
    )


@pytest.mark.parametrize("neighbours", [1, 3])
def test_precision_recall(torch, neighbours):
    theirs = pytest.importorskip("torch_fidelity.metric_prc", reason=MISSING)
    real, generated = of(0, 400, 3), of(1, 300, 3)
    for parts in (False, True):
        expected = theirs.prc_features_to_metric(
            *map(torch.from_numpy, (generated, real)),
            prc_neighborhood=neighbours,
            prc_batch_size=64,
            save_cpu_ram=parts,
            verbose=False,
        )
        found = metrics.precision_recall(real, generated, neighbours, batch=70)
        print(f"precision, recall {found!r}, torch-fidelity's {expected!r}")
        # Shares of 300 and of 400 images, in float32 there.
        assert found == pytest.approx((expected["precision"], expected["recall"]), rel=1e-6)
        assert 0.05 < min(found) < max(found) < 0.95


# ------------------------------------------------------------------------------- Inception


def random_weights():
    """Tensors by their PyTorch names that keep the scale of activations, with varied statistics."""
    rng = np.random.default_rng(0)
    found = {"fc.bias": rng.normal(size=1008)}
    for name, leaves in inception.shapes().items():
        *size, inside, outside = leaves["kernel"].shape
        if name == "fc":
            found["fc.weight"] = rng.normal(size=(outside, inside)) / inside**0.5
            continue
        scale = (2 / (inside * np.prod(size))) ** 0.5
        found[f"{name}.conv.weight"] = rng.normal(size=(outside, inside, *size)) * scale
        for each, low, high in (
            ("weight", 0.7, 1.3),
            ("running_var", 0.7, 1.3),
            ("bias", -0.2, 0.2),
        ):
            found[f"{name}.bn.{each}"] = rng.uniform(low, high, outside)
        found[f"{name}.bn.running_mean"] = rng.uniform(-0.2, 0.2, outside)
    return {name: np.ascontiguousarray(value, np.float32) for name, value in found.items()}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights as .pth, of both formats of torch, and as .safetensors."""
    torch = pytest.importorskip("torch", reason=MISSING)
    pytest.importorskip("torch_fidelity", reason=MISSING)
    tensors, path = random_weights(), tmp_path_factory.mktemp("weights") / "inception.pth"
    values = {name: torch.from_numpy(value) for name, value in tensors.items()}
    torch.save(values, path)
    torch.save(values, path.with_suffix(".old"), _use_new_zipfile_serialization=False)
    save_file(tensors, path.with_suffix(".safetensors"))
    return path


def test_inception(torch, weights):
    """Of images that grow in one direction and shrink in the other, RGB and grey."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    images = np.random.default_rng(1).integers(0, 256, (3, 20, 310, 3), np.uint8)
    theirs = FeatureExtractorInceptionV3("any", ["2048", "logits_unbiased"], str(weights))
    extractor = features.inception(weights)
    assert (
        extractor.name
        == f"inception-v3-2015 sha256:{hashlib.sha256(weights.read_bytes()).hexdigest()[:8]}"
    )
    for given in (images, images[..., :1]):
        rgb = np.broadcast_to(given, images.shape).transpose(0, 3, 1, 2).copy()
        pool, logits = (each.numpy() for each in theirs(torch.from_numpy(rgb)))
        expected = np.exp(logits - logits.max(1, keepdims=True))
        expected /= expected.sum(1, keepdims=True)
        found = extractor.extract(given)
        errors = [
            np.abs(a - b).max() / b.max() for a, b in zip(found, (pool, expected), strict=True)
        ]
        apart = np.abs(pool - pool.mean(0)).max() / pool.max()
        print(
            f"{given.shape}: features within {errors[0]:.1e}, probabilities {errors[1]:.1e};"
            f" {apart:.1e} apart"
        )
        # float32, through 94 layers.
        assert max(errors) < 1e-4 < 1e-2 < apart
        assert found.features.shape == (3, 2048)
        assert found.probabilities.shape == (3, 1008)


def test_pth_and_safetensors_agree(weights):
    of_pth, of_old, of_safetensors = (
        inception.from_tensors(features._tensors(path))
        for path in (weights, weights.with_suffix(".old"), weights.with_suffix(".safetensors"))
    )
    chex.assert_trees_all_equal(of_pth, of_safetensors)
    chex.assert_trees_all_equal(of_old, of_safetensors)
