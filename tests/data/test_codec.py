import numpy as np

from diffjax.data.codec import PIXELS
from diffjax.inference.autoencoder import codec_of


def test_pixels_are_x():
    images = np.random.default_rng(0).uniform(-1, 1, (2, 4, 4, 3)).astype(np.float32)
    codec = codec_of(None)
    np.testing.assert_array_equal(codec.encode(images), images)
    np.testing.assert_array_equal(codec.decode(codec.encode(images)), images)
    assert codec.bounds == PIXELS.bounds == (-1, 1)
