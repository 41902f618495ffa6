import numpy as np
import pytest

from diffjax import picture


def test_eight_bits_survive_the_way_to_floats_and_back():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    floats = picture.to_float(images)
    assert (floats.min(), floats.max(), floats.dtype) == (-1, 1, np.float32)
    assert (picture.to_uint8(floats) == images).all()
    assert picture.to_uint8(np.array([-9.0, 9.0])).tolist() == [0, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_holds_every_image_where_it_belongs(channels):
    images = np.random.default_rng(0).integers(0, 255, (7, 60, 50, channels), np.uint8)
    sheet = np.asarray(picture.grid(images, [str(i) for i in range(7)], columns=3, titles=["a", "bb", "ccc"]))
    for i, image in enumerate(images):
        found = [
            (y, x)
            for y in range(sheet.shape[0] - 59)
            for x in range(sheet.shape[1] - 49)
            if (sheet[y, x] == image[0, 0]).all() and (sheet[y : y + 60, x : x + 50] == image).all()
        ]
        assert len(found) == 1
        assert found[0][0] // 70 == i // 3


def test_a_picture_has_one_or_three_channels():
    with pytest.raises(ValueError, match="2 channels"):
        picture.grid(np.zeros((1, 4, 4, 2), np.uint8))
