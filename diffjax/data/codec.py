"""The map between images and x, the space that a model is trained in.

Pictures, metrics and image files go through a codec; samplers never do.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Codec(NamedTuple):
    """A map between images, float32 [B, H, W, C] in [-1, 1], and x [B, ...]."""

    encode: Callable[[np.ndarray], np.ndarray]  # images -> x
    decode: Callable[[np.ndarray], np.ndarray]  # x -> images
    bounds: tuple[float, float] | None  # the range that x0 may be clipped to; None for no clipping


PIXELS = Codec(lambda images: images, lambda x: x, (-1.0, 1.0))
