import numpy as np
import pytest
from sklearn.datasets import load_digits

from diffjax.picture import to_uint8
from diffjax.training import data


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The real builder, writing real files."""
    return data.load("digits", str(tmp_path_factory.mktemp("datasets")))


def take(stream, n):
    return [next(stream) for _ in range(n)]


def test_digits_are_those_of_scikit_learn(digits):
    assert (digits.image_shape, digits.classes) == ((8, 8, 1), 10)
    assert (len(digits.train), len(digits.held_out)) == (1500, 297)
    real = load_digits()

    def bag(images, labels):
        return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))

    for split, part in [(digits.train, slice(0, 1500)), (digits.held_out, slice(1500, None))]:
        examples = [split[i] for i in range(len(split))]
        expected = np.round(real.images[part] * 255 / 16).astype(np.uint8)
        assert bag([e["image"] for e in examples], [e["label"] for e in examples]) == bag(expected, real.target[part])


def test_an_epoch_sees_every_image_once_and_the_next_in_another_order(digits):
    epochs = [take(data.batches(digits.train, 100, seed=0, start=start), 15) for start in (0, 15)]
    seen = [np.concatenate([b["image"] for b in epoch]).reshape(1500, -1) for epoch in epochs]
    real = np.sort([digits.train[i]["image"].tobytes() for i in range(1500)])
    for images in seen:
        assert (np.sort([to_uint8(image).tobytes() for image in images]) == real).all()
    assert (seen[0] != seen[1]).any()


def test_the_stream_is_a_function_of_the_step(digits):
    whole = take(data.batches(digits.train, 64, seed=3), 30)
    later = take(data.batches(digits.train, 64, seed=3, start=25), 5)
    for a, b in zip(whole[25:], later, strict=True):
        assert all((a[k] == b[k]).all() for k in a)
    assert (np.concatenate([b["index"] for b in whole]) == np.arange(30 * 64)).all()
    other = next(data.batches(digits.train, 64, seed=4))
    assert (other["image"] != whole[0]["image"]).any()


def test_hosts_share_each_global_batch_in_order(digits):
    whole = take(data.batches(digits.train, 60, seed=3, start=2), 4)
    shares = [take(data.batches(digits.train, 60, seed=3, start=2, host=h, hosts=3), 4) for h in range(3)]
    for n, batch in enumerate(whole):
        for key, value in batch.items():
            assert (np.concatenate([share[n][key] for share in shares]) == value).all()


def test_batches_are_what_the_step_takes(digits):
    batch = next(data.batches(digits.train, 32, seed=0))
    assert {k: (v.shape, str(v.dtype)) for k, v in batch.items()} == {
        "image": ((32, 8, 8, 1), "float32"), "label": ((32,), "int32"), "index": ((32,), "uint32"),
    }  # fmt: skip
    assert (batch["image"].min(), batch["image"].max()) == (-1, 1)
    assert "label" not in next(data.batches(digits.train, 32, seed=0, labels=False))


@pytest.mark.parametrize(("batch", "multiple", "sizes"), [(64, 8, [64] * 4), (512, 8, [296]), (64, 1, [64] * 4)])
def test_held_out_batches_are_always_the_same(digits, batch, multiple, sizes):
    found = data.first_batches(digits.held_out, batch, multiple, limit=9)
    assert [len(b["image"]) for b in found] == sizes
    assert (np.concatenate([b["index"] for b in found]) == np.arange(sum(sizes))).all()


def test_a_dataset_of_the_catalogue_goes_the_same_way(tmp_path):
    """Real TFDS code over generated images; only the download is replaced."""
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=20, policy=tfds.testing.MockPolicy.USE_CODE):
        mnist = data.load("mnist", str(tmp_path))
        assert (mnist.image_shape, mnist.classes) == ((28, 28, 1), 10)
        assert next(data.batches(mnist.train, 8, seed=0))["image"].shape == (8, 28, 28, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar1", "no dataset 'cifar1': did you mean 'cifar10'"),
        ("imagenet2012", "different sizes"),
        ("ag_news_subset", "has no feature 'image': choose an image dataset"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_named(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        data.load(name, str(tmp_path))


def test_no_network_is_said_at_once(tmp_path, monkeypatch):
    """A port where nothing listens, in place of the download site: refused like any site that is out of reach."""
    import tensorflow_datasets as tfds

    builder = tfds.builder("cifar10", data_dir=tmp_path, file_format="array_record")
    monkeypatch.setattr(type(builder), "url_infos", {"http://127.0.0.1:9/cifar.tar.gz": None})
    with pytest.raises(ValueError, match=r"'cifar10' .*127.0.0.1:9.* cannot be reached, .* point --data.dir at the copy"):
        data.load("cifar10", str(tmp_path))


def test_a_batch_larger_than_the_data_is_named(digits):
    with pytest.raises(ValueError, match="a batch of 1600 is more than the 1500 images"):
        data.batches(digits.train, 1600, seed=0)
