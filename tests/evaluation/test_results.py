import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from helpers import naming

from diffjax import sampler, schedule
from diffjax.checkpoint import tree_sha256
from diffjax.data.codec import Codec
from diffjax.evaluation import results
from diffjax.evaluation.results import (
    Context,
    LikelihoodRow,
    ModelContext,
    NetworkContext,
    QualityContext,
    QualityRow,
    ReconstructionContext,
    ReconstructionRow,
    SamplingRow,
    TimingRow,
    as_dict,
    median_and_spread,
    sampling_row,
    table_markdown,
)
from diffjax.inference.guidance import Guidance
from diffjax.inference.pipeline import Clip, DynamicThreshold, Request, Samples

NETWORK = {
    "network": "unet of x", "parameters": 1234, "image_size": "8x8x1", "dtype": "float32",
}  # fmt: skip
MODEL = NETWORK | {"weights": "ema, step 7", "device": "1 x cpu", "versions": "jax 1"}
SAMPLING = MODEL | {
    "sampler": "ddim(eta=0, trailing)", "clipping": "clipped", "steps": 50, "guidance": 2.0,
    "guided": "2 in 0.3..5", "images": 500, "batch": 100, "seed": 0,
}  # fmt: skip
SAMPLING_ROW = SamplingRow(**SAMPLING, nfe=100, compile_seconds=1.5, run_seconds=200.0)
QUALITY_ROW = QualityRow(
    **SAMPLING, extractor="cnn-64, 98%", reference="digits, train, 1,597 images",
    fd=3.25, kd=0.01, kd_error=0.002, inception_score=8.5, precision=0.75, recall=0.5,
    class_accuracy=0.991, real_class_accuracy=0.976, nfe=100, ms_per_image=1.5, spread=0.03,
    batches=5, compile_seconds=0.5,
)  # fmt: skip
LIKELIHOOD_ROW = LikelihoodRow(
    **MODEL, measure="probability flow, tsit5 to 0.0001, 1 probe", bits_per_dim=3.5, error=0.02,
    spread=0.003, repeats=3, evaluations=61.0, derivatives=61.0, given="condition", images=64,
    data="digits, held out",
)  # fmt: skip
RECONSTRUCTION_ROW = ReconstructionRow(
    **MODEL, latent_size="4x4x2", scaling=0.5, images=100, batch=16, data="digits, held out",
    extractor="cnn-64, 98%", reference="digits, train, 1,597 images",
    fd=3.25, kd=0.01, kd_error=0.002, inception_score=8.5, precision=0.75, recall=0.5,
    class_accuracy=0.991, real_class_accuracy=0.976, psnr=23.456, ssim=None, images_fd=1.25,
    latent_std=1.75,
)  # fmt: skip
TIMING_ROW = TimingRow(
    **NETWORK, what="forward", steps=None, nfe=None, guidance="", seconds=0.5, spread=0.03,
    repeats=9, flops=1e9, ceiling=4e9, peak_bytes=2_000_000, compile_seconds=1.0,
    cached_seconds=0.1, peer="diffusers 1", peer_seconds=1.0, ratio=2.0, batch=16, device="1 x cpu",
)  # fmt: skip
ROWS = {
    SamplingRow: (SAMPLING_ROW, Context), QualityRow: (QUALITY_ROW, QualityContext),
    LikelihoodRow: (LIKELIHOOD_ROW, ModelContext), TimingRow: (TIMING_ROW, NetworkContext),
    ReconstructionRow: (RECONSTRUCTION_ROW, ReconstructionContext),
}  # fmt: skip


@pytest.mark.parametrize(("row", "context"), ROWS.values(), ids=lambda value: type(value).__name__)
def test_row_needs_context(row, context):
    """No field has a default, and none of its context may be empty."""
    values = dataclasses.asdict(row)
    for name in values:
        with pytest.raises(TypeError, match=naming(name)):
            type(row)(**{key: value for key, value in values.items() if key != name})
    for field in dataclasses.fields(context):
        for empty in ("", None):
            with pytest.raises(ValueError, match=naming(field.name)):
                dataclasses.replace(row, **{field.name: empty})


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("sampler", "ddim", "sampler 'ddim'"),
        ("batches", 4, "batches 4 5"),
        ("ms_per_image", math.nan, "ms_per_image nan"),
        ("nfe", 0, "nfe 0"),
        ("steps", 0, "steps 0"),
        ("images", 0, "images 0"),
    ],
)
def test_row_needs_meaning(field, value, words):
    with pytest.raises(ValueError, match=naming(*words.split())):
        dataclasses.replace(QUALITY_ROW, **{field: value})


# ------------------------------------------------------------------------------- contexts


def plan_of(model, steps=3):
    return sampler.ddim(model.schedule, schedule.trailing(model.schedule, steps))


def test_context_of_request(digits_model):
    model = digits_model()
    request = Request(num=5, batch=8, seed=3, guidance=Guidance(2.0, interval=(0.3, 5.0)))
    context = Context.of(model, plan_of(model), "ddim(eta=0, trailing)", request)
    assert (context.images, context.batch, context.seed, context.steps) == (5, 8, 3, 3)
    assert (context.guidance, context.guided) == (2.0, "2 in 0.3..5")
    assert (context.network, context.image_size) == ("unet of x", "8x8x1")
    assert context.parameters == sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert context.weights == f"ema, step 7, sha256:{tree_sha256(model.params)[:8]}"
    assert context.dtype == "float32"
    assert f"jax {jax.__version__}" in context.versions
    assert context.device.startswith("8 x cpu")


def test_context_describes_clipping(digits_model):
    model = digits_model()

    def clipping(bound, model=model):
        request = Request(num=5, batch=8, seed=3, bound=bound)
        return Context.of(model, plan_of(model), "ddim(eta=0)", request).clipping

    assert clipping(Clip()) == "clipped"
    assert clipping(None) == "unclipped"
    assert clipping(DynamicThreshold(0.995)) == "thresholded 0.995"
    latents = model._replace(codec=Codec(model.codec.encode, model.codec.decode, None))
    assert clipping(Clip(), latents) == "unclipped"


def test_weights_are_hashed_once(digits_model, monkeypatch):
    calls, describe = [], results.describe_weights

    def counted(model):
        calls.append(model)
        return describe(model)

    monkeypatch.setattr(results, "describe_weights", counted)
    model = digits_model()
    other = model._replace(params=jax.tree.map(lambda leaf: leaf + 1, model.params))
    results._WEIGHTS.clear()
    first, second, third = (ModelContext.of_model(each) for each in (model, model, other))
    assert len(calls) == 2
    assert first == second
    assert first.weights != third.weights
    # One array of many is another.
    leaves, tree = jax.tree.flatten(model.params)
    changed = jax.tree.unflatten(tree, [*leaves[:-1], leaves[-1] + 1])
    assert ModelContext.of_model(model._replace(params=changed)).weights != first.weights
    assert ModelContext.of_model(model._replace(step=8)).weights != first.weights
    known = len(results._WEIGHTS)
    del calls[:], other
    assert len(results._WEIGHTS) < known  # what is gone takes no memory


def test_table_of_reconstructions():
    """Figures stand under their heads; what is unknown is empty."""
    head, _, line = table_markdown([RECONSTRUCTION_ROW]).splitlines()
    cells = [[cell.strip() for cell in text.split("|")[1:-1]] for text in (head, line)]
    found = dict(zip(*cells, strict=True))
    expected = {
        "latents": "4x4x2", "PSNR dB": "23.46", "SSIM": "", "FD": "3.25", "std of latents": "1.75",
        "FD of the images": "1.25", "scaling": "0.5", "images": "100 of 8x8x1, digits, held out",
        "weights": "ema, step 7", "class accuracy": "99.1%", "real class accuracy": "97.6%",
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    of_inception = dataclasses.replace(RECONSTRUCTION_ROW, extractor="inception-v3")
    head = table_markdown([of_inception]).splitlines()[0]
    assert "FID of the images" in head
    assert as_dict(RECONSTRUCTION_ROW) == dataclasses.asdict(RECONSTRUCTION_ROW)


def test_quality_row_of_context():
    """A row contains its context, by which it is found again."""
    assert QUALITY_ROW.context in {QUALITY_ROW.context}
    for name, value in vars(QUALITY_ROW.context).items():
        changed = f"{value}()" if isinstance(value, str) else value + 1
        other = dataclasses.replace(QUALITY_ROW, **{name: changed})
        assert other.context != QUALITY_ROW.context
    assert dataclasses.replace(QUALITY_ROW, fd=1.0, spread=0.5).context == QUALITY_ROW.context
    assert QualityRow(**as_dict(QUALITY_ROW)) == QUALITY_ROW


def test_sampling_row(digits_model):
    model = digits_model()
    request = Request(num=5, batch=8, seed=3)
    x = np.zeros((5, 8, 8, 1), np.float32)
    samples = Samples(x, None, 3, 0.5, (1.0, 1.5), model.codec)
    row = sampling_row(model, samples, plan_of(model), "ddim(eta=0, trailing)", request)
    assert (row.nfe, row.compile_seconds, row.run_seconds) == (3, 0.5, 2.5)
    assert as_dict(row)["images_per_second"] == 2.0
    assert as_dict(row)["guided"] == "1"


# ------------------------------------------------------------------------------- figures and tables


def test_median_and_spread():
    assert median_and_spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 1 / 3)
    assert median_and_spread([2.0]) == (2.0, 0.0)


def test_mfu_is_share_of_ceiling():
    assert TIMING_ROW.mfu == 0.5
    assert as_dict(TIMING_ROW)["mfu"] == 0.5
    assert dataclasses.replace(TIMING_ROW, flops=None).mfu is None


def cells_of(row):
    head, rule, line = table_markdown([row]).splitlines()
    assert len(head) == len(rule) == len(line)
    heads, cells = ([text.strip() for text in part.split("|")[1:-1]] for part in (head, line))
    return dict(zip(heads, cells, strict=True))


def test_table_of_samples():
    cells = cells_of(SAMPLING_ROW)
    assert cells["sampler"] == "ddim(eta=0, trailing)"
    assert (cells["steps"], cells["NFE"], cells["guidance"]) == ("50", "100", "2 in 0.3..5")
    assert (cells["compile s"], cells["run s"], cells["images/s"]) == ("1.50", "200.00", "2.5")
    assert (cells["images"], cells["batch"], cells["seed"]) == ("500 of 8x8x1", "100", "0")
    assert cells["network"] == "unet of x, 1,234 parameters"
    rest = ("ema, step 7", "1 x cpu", "float32", "clipped")
    assert (cells["weights"], cells["device"], cells["dtype"], cells["clipping"]) == rest


def test_table_of_quality():
    cells = cells_of(QUALITY_ROW)
    expected = {
        "ms/image": "1.5 ± 3%", "FD": "3.25", "KD": "0.01 ± 0.002", "inception score": "8.50",
        "precision": "0.750", "recall": "0.500", "class accuracy": "99.1%",
        "real class accuracy": "97.6%", "batch": "5 of 100",
        "features": "cnn-64, 98%", "real images": "digits, train, 1,597 images", "NFE": "100",
        "clipping": "clipped", "weights": "ema, step 7", "versions": "jax 1", "device": "1 x cpu",
    }  # fmt: skip
    assert {name: cells[name] for name in expected} == expected
    without = dataclasses.replace(QUALITY_ROW, inception_score=None, class_accuracy=None)
    assert cells_of(without)["class accuracy"] == cells_of(without)["inception score"] == ""


def test_distances_are_named_by_features():
    of_inception = dataclasses.replace(QUALITY_ROW, extractor="inception-v3-2015 sha256:01234567")
    assert cells_of(of_inception)["FID"] == "3.25"
    assert cells_of(of_inception)["KID"] == "0.01 ± 0.002"
    head = table_markdown([of_inception, QUALITY_ROW]).splitlines()[0]
    assert re.search(r"\| FD +\|", head)


def test_table_of_likelihoods():
    cells = cells_of(LIKELIHOOD_ROW)
    assert (cells["bits/dim"], cells["given"]) == ("3.500 ± 0.020", "condition")
    assert cells["spread over repeats"] == "0.0030 of 3"
    assert cells["images"] == "64 of 8x8x1, digits, held out"
    once = dataclasses.replace(LIKELIHOOD_ROW, spread=None)
    assert cells_of(once)["spread over repeats"] == ""


def test_table_of_times():
    cells = cells_of(TIMING_ROW)
    assert (cells["ms"], cells["diffusers ms"], cells["MFU"]) == ("500", "1,000", "50%")
    assert (cells["batch"], cells["steps"], cells["peak MB"]) == ("16 of 8x8x1", "", "2")
    assert cells_of(dataclasses.replace(TIMING_ROW, seconds=0.0123456))["ms"] == "12.3"
