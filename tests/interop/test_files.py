"""Weights in one file or in parts, in variants, with an index or without."""

import json

import numpy as np
import pytest
from helpers import naming
from safetensors.numpy import save_file

from diffjax.interop.files import read_json, read_weights

W = "diffusion_pytorch_model"
TENSORS = {name: np.full((2, 3), i, np.float32) for i, name in enumerate("abcde", start=1)}
PLAIN = W + "-{i:05d}-of-{n:05d}.safetensors"
FP16 = W + ".fp16-{i:05d}-of-{n:05d}.safetensors"  # diffusers
OTHER_FP16 = W + "-{i:05d}-of-{n:05d}.fp16.safetensors"  # others, and transformers
INDEX, FP16_INDEX = f"{W}.safetensors.index.json", f"{W}.safetensors.index.fp16.json"


def write(folder, name=f"{W}.safetensors", factor=1.0, dtype=np.float32, **metadata):
    tensors = {key: (factor * value).astype(dtype) for key, value in TENSORS.items()}
    save_file(tensors, folder / name, metadata={"format": "pt", **metadata})


def write_parts(folder, pattern, n=3, left_out=(), index=None, dtype=np.float32):
    names, where = sorted(TENSORS), {}
    for i in range(1, n + 1):
        file = pattern.format(i=i, n=n)
        tensors = {name: TENSORS[name].astype(dtype) for name in names[i - 1 :: n]}
        where |= dict.fromkeys(tensors, file)
        if i not in left_out:
            save_file(tensors, folder / file, metadata={"format": "pt", "step": str(i)})
    if index is not None:
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def check(folder, variant=""):
    found = read_weights(folder, W)
    assert found.variant == variant
    assert set(found.tensors) == set(TENSORS)
    for name, value in found.tensors.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, TENSORS[name])


@pytest.mark.parametrize(
    ("pattern", "index", "variant"),
    [
        (PLAIN, INDEX, ""),
        (PLAIN, None, ""),
        (FP16, FP16_INDEX, "fp16"),
        (FP16, None, "fp16"),
        (OTHER_FP16, FP16_INDEX, "fp16"),
        (OTHER_FP16, f"{W}.fp16.safetensors.index.json", "fp16"),
        (OTHER_FP16, None, "fp16"),
    ],
)
def test_parts_are_joined(tmp_path, pattern, index, variant):
    dtype = np.float16 if variant else np.float32
    write_parts(tmp_path, pattern, index=index, dtype=dtype)
    check(tmp_path, variant)


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("pattern", [PLAIN, FP16, OTHER_FP16])
@pytest.mark.parametrize("part", [1, 3])
def test_a_missing_part_is_named(tmp_path, pattern, index, part):
    index = (FP16_INDEX if "fp16" in pattern else INDEX) if index else None
    write_parts(tmp_path, pattern, left_out=[part], index=index)
    names = [tmp_path, pattern.format(i=part, n=3), *([index] if index else [3])]
    with pytest.raises(ValueError, match=naming(*names)):
        read_weights(tmp_path, W)


def test_an_index_stands_before_a_single_file(tmp_path):
    """The index is preferred, as in diffusers: the single file may be older."""
    write(tmp_path, factor=0)
    write_parts(tmp_path, PLAIN, index=INDEX)
    check(tmp_path)


def test_parts_without_an_index_stand_behind_a_single_file(tmp_path):
    write_parts(tmp_path, PLAIN, n=2, left_out=[2])
    write(tmp_path)
    check(tmp_path)


@pytest.mark.parametrize(
    ("variants", "chosen"),
    [
        (["", "fp16", "ema"], ""),
        (["fp16", "ema", "non_ema"], "ema"),
        (["fp16", "non_ema"], "fp16"),
        (["bf16", "fp32"], "fp32"),
        (["non_ema"], "non_ema"),
    ],
)
def test_variants(tmp_path, variants, chosen):
    """The plain one, else averages before raw weights, and full precision before half."""
    for variant in variants:
        name = f"{W}.{variant}.safetensors" if variant else f"{W}.safetensors"
        write(tmp_path, name, factor=float(variant == chosen))
    check(tmp_path, chosen)


def test_parts_of_one_variant_only(tmp_path):
    """Those of another lie in the same folder, with an index of their own."""
    write(tmp_path, f"{W}.fp16.safetensors", factor=0)
    write_parts(tmp_path, PLAIN, index=INDEX)
    check(tmp_path)


def test_metadata_is_that_of_the_first_part(tmp_path):
    write_parts(tmp_path, PLAIN)
    found = read_weights(tmp_path, W)
    assert found.metadata["step"] == "1"
    assert found.file.name == PLAIN.format(i=1, n=3)


def test_parts_of_two_sets_are_refused(tmp_path):
    write_parts(tmp_path, PLAIN, n=2)
    write_parts(tmp_path, PLAIN, n=3)
    names = PLAIN.format(i=1, n=2), PLAIN.format(i=3, n=3)
    with pytest.raises(ValueError, match=naming(tmp_path, *names)):
        read_weights(tmp_path, W)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}'])
def test_an_index_that_is_none_is_named(tmp_path, text):
    write(tmp_path)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=naming(tmp_path / INDEX)):
        read_weights(tmp_path, W)


def test_an_index_names_files_of_its_folder_only(tmp_path):
    folder = tmp_path / "inside"
    folder.mkdir()
    write(tmp_path, "outside.safetensors")
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=naming(folder, "outside.safetensors")):
        read_weights(folder, W)


def test_json_that_is_no_object_is_named(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=naming(tmp_path / "config.json", "list")):
        read_json(tmp_path / "config.json")
