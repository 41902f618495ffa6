import numpy as np

from diffjax.build import build_codec
from diffjax.config import Config
from diffjax.data.codec import PIXELS


def test_pixels_are_x():
    images = np.random.default_rng(0).uniform(-1, 1, (2, 4, 4, 3)).astype(np.float32)
    codec = build_codec(Config())
    np.testing.assert_array_equal(codec.encode(images), images)
    np.testing.assert_array_equal(codec.decode(codec.encode(images)), images)
    assert codec.bounds == PIXELS.bounds == (-1, 1)
