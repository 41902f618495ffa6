import math
import re

import numpy as np
import pytest
from helpers import naming

from diffjax.evaluation import inception


def test_resize_from_the_corner():
    """A line stays a line, up to the last pixel, which is repeated; 299 pixels stay as they are."""
    line = np.arange(13, dtype=np.float32)[None, :, None, None] * 10 + np.zeros(
        (1, 13, 7, 1), np.float32
    )
    found = np.asarray(inception.resize(line))
    expected = np.minimum(np.arange(299) * 13 / 299, 12) * 10
    np.testing.assert_allclose(
        found[0, :, :, 0], np.broadcast_to(expected[:, None], (299, 299)), rtol=1e-5, atol=1e-4
    )
    whole = np.random.default_rng(0).uniform(size=(1, 299, 299, 2)).astype(np.float32)
    np.testing.assert_array_equal(inception.resize(whole), whole)


def test_batch_norms_are_folded():
    """A convolution and its batch norm in use, against the folded kernel and bias."""
    rng, name = np.random.default_rng(0), "Conv2d_3b_1x1"
    tensors = {}
    for each, leaves in inception.shapes().items():
        *size, inside, outside = leaves["kernel"].shape
        if each == "fc":
            tensors["fc.weight"] = np.zeros((outside, inside))
            continue
        tensors[f"{each}.conv.weight"] = rng.normal(size=(outside, inside, *size))
        for norm in inception.NORM:
            tensors[f"{each}.bn.{norm}"] = rng.uniform(0.5, 1.5, outside)
    x = rng.normal(size=64)
    weight, bias, mean, var = (tensors[f"{name}.bn.{norm}"] for norm in inception.NORM)
    convolved = tensors[f"{name}.conv.weight"][..., 0, 0] @ x
    expected = (convolved - mean) / np.sqrt(var + 1e-3) * weight + bias
    folded = inception.from_tensors(tensors)[name]
    found = x @ folded["kernel"][0, 0] + folded["bias"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)  # float32
    del tensors["fc.weight"]
    with pytest.raises(ValueError, match=naming("fc.weight")):
        inception.from_tensors(tensors)


def test_widths_are_those_of_the_paper():
    """The channels into each block, the widths inside the 17x17 ones, and the parameters in all.

    arXiv:1512.00567, table 1, as released: 35x35 blocks of 256, 288 and 288 channels, 17x17 of 768,
    8x8 of 1280, 2048 and 2048. Keras counts 21,802,784 parameters without the last layer: kernels,
    and three numbers of each channel's batch norm.
    """
    shapes = {name: leaves["kernel"].shape for name, leaves in inception.shapes().items()}
    into = {
        name.split(".")[0]: shape[2]
        for name, shape in shapes.items()
        if re.search(r"\.(branch1x1|branch3x3|branch3x3_1)$", name)
    }
    blocks = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
    assert into == dict(
        zip(
            (f"Mixed_{block}" for block in blocks),
            (192, 256, 288, 288, 768, 768, 768, 768, 768, 1280, 2048),
            strict=True,
        )
    )
    inside = [shapes[f"Mixed_6{letter}.branch7x7_1"][-1] for letter in "bcde"]
    assert inside == [128, 160, 160, 192]
    assert shapes["fc"] == (2048, 1008)
    assert len(shapes) == 95
    kernels = [shape for name, shape in shapes.items() if name != "fc"]
    assert sum(math.prod(shape) + 3 * shape[-1] for shape in kernels) == 21_802_784
