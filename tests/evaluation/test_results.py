import dataclasses

import pytest
from helpers import naming

from diffjax.evaluation.results import SamplingRow, as_dict, markdown

ROW = SamplingRow(
    sampler="ddim(eta=0, trailing)", steps=50, nfe=100, guidance=2.0, guided="2 in 0.3..5",
    compile_seconds=1.5, run_seconds=4.0, images=10,
    batch=5, network="unet of x", parameters=1234, weights="ema, step 7", image_size="8x8x1", device="1 x cpu",
    dtype="float32",
)  # fmt: skip


def test_a_row_without_its_context_cannot_be_built():
    values = dataclasses.asdict(ROW)
    for name in values:
        with pytest.raises(TypeError, match=naming(name)):
            SamplingRow(**{key: value for key, value in values.items() if key != name})


def test_the_table_shows_all_of_a_row():
    head, rule, line = markdown([ROW]).splitlines()
    assert len(head) == len(rule) == len(line)
    for word in ("ddim(eta=0, trailing)", "50", "100", "2", "1.50", "4.00", "2.5", "unet of x, 1,234 parameters"):
        assert f" {word} " in line
    for word in ("10 of 8x8x1", "ema, step 7", "5", "1 x cpu", "float32"):
        assert f" {word} " in line
    assert as_dict(ROW)["images_per_second"] == 2.5
