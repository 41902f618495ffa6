import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from diffjax.bench import diffusers_baseline, first_image, networks, timing
from diffjax.bench.models import INPUTS, bench_model
from diffjax.bench.networks import Case
from diffjax.evaluation.results import TimingRow


def test_networks_are_timed_with_their_context(tiny, tmp_path, monkeypatch):
    kinds = ("forward", "backward", "train", "ddim", "guided")
    cases = [Case("digits", what, 2, steps=10, dispatched=True) for what in kinds]
    cases.append(Case("digits", "forward", 2, dtype="bfloat16"))
    monkeypatch.setattr(networks, "cases", lambda quick: cases)
    monkeypatch.setattr(networks, "SIDE", 64)
    monkeypatch.setattr(timing, "BLOCK", 0.0)
    text = networks.bench_networks(tmp_path / "bench.json", True, 1)
    rows = json.loads((tmp_path / "bench.json").read_text())
    assert [row["what"] for row in rows] == [
        "forward", "forward + backward", "train step", "train step, 10 per dispatch",
        *3 * ["ddim(eta=0, trailing)"], "forward",
    ]  # fmt: skip
    assert [row["nfe"] for row in rows] == [None] * 4 + [10, 20, 20, None]
    assert [row["guidance"] for row in rows] == [""] * 5 + ["2, one pass", "2, two passes", ""]
    flops = [row["flops"] for row in rows]
    assert flops[2] == flops[3] > flops[1] > flops[0]
    assert flops[4:7] == [10 * flops[0], 20 * flops[0], 20 * flops[0]]
    for row in rows:
        assert {field.name for field in dataclasses.fields(TimingRow)} < set(row)
        assert (row["ratio"] is not None) == diffusers_baseline.is_available()
        assert row["mfu"] == pytest.approx(row["flops"] / row["seconds"] / row["ceiling"])
        for name in ("seconds", "peak_bytes", "compile_seconds", "cached_seconds"):
            assert row[name] > 0
    assert (tmp_path / "bench.md").read_text().strip() in text
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    assert all(f"| {part} |" in text for part in first_image.PARTS)


def test_quick_cases_are_few():
    quick, every = networks.cases(True), networks.cases(False)
    assert {case.network for case in quick} == {"digits", "cifar10"}
    assert {case.network for case in every} == set(INPUTS)
    assert set(quick) < set(every)


@pytest.mark.parametrize("name", INPUTS)
def test_models_have_inputs_of_their_data(name, tiny):
    model = bench_model(name, "bfloat16")
    x, condition = model.x(3), model.condition(3)
    assert x.shape == (3, *model.info.x_shape)
    assert model.info.config.network.dtype == "bfloat16"
    model.info.conditioning.check(condition)
    assert model.network(model.params, x, np.zeros(3), condition).shape == x.shape


def test_the_baseline_samples_the_same_images(tiny):
    """diffusers, with the same weights."""
    pytest.importorskip("diffusers")
    model = bench_model("digits")
    for scale, variants in ((None, networks.ddim), (networks.SCALE, networks.guided)):
        theirs = diffusers_baseline.DiffusersBaseline(model).ddim(3, 10, scale)()
        for variant in variants(model, Case("digits", "ddim", 3, steps=10)):
            np.testing.assert_allclose(variant.run(), theirs, atol=2e-4)


def test_a_training_step_is_one_and_a_dispatch_is_several(tiny, monkeypatch):
    """The batches of a run are as many as its results, of which seconds are counted."""
    program = networks.CompiledProgram(None, 1.0, 1, 1.0, 1.0)
    monkeypatch.setattr(networks, "compile_timed", lambda *arguments, **options: program)
    training = SimpleNamespace(init=lambda key: None, step=None)
    monkeypatch.setattr(networks, "build_training", lambda info: training)
    case = Case("digits", "train", 2, dispatched=True)
    variants = networks.train(bench_model("digits"), case)
    assert [variant.results_per_run for variant in variants] == [1, networks.DISPATCHED]
    for variant in variants:
        steps = variant.results_per_run
        assert variant.calls_per_run == steps
        assert {leaf.shape[0] for leaf in jax.tree.leaves(variant.run._batches)} == {steps}
