import dataclasses
import json
import re

import numpy as np
import pytest
from helpers import check_mistake

from diffjax.bench import first_image, loop, networks, peers, timing, training
from diffjax.cli import bench as bench
from diffjax.config import Config, Data, Train, UNetConfig
from diffjax.evaluation.results import TimingRow

TINY = Config(network=UNetConfig(channels=4, multipliers=(1,), blocks=1, attention=(), norm_groups=1))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Times are not what is tested, but that each is there; and what does not depend on the machine is right."""
    monkeypatch.setattr("diffjax.bench.subject.load_config", lambda name: TINY)


def test_the_figures_are_measured_and_printed(capsys, monkeypatch):
    monkeypatch.setattr(loop, "ROWS", 20)
    bench.main(["sampler", "--pairs", "1"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[4:]]
    figures = {what: figure for what, figure, _ in rows}
    assert len(figures) == 10
    assert figures["compilations of 12 plans of 11 samplers"] == "4"
    assert float(figures["DDIM-50 / 50 forwards"]) > 0
    assert any("forward, digits network" in what for what in figures)


def test_every_kind_of_guidance_is_timed_with_its_evaluations(capsys):
    bench.main(["guidance", "--pairs", "1"])
    lines = capsys.readouterr().out.splitlines()[4:]
    nfe = {cells[1].strip(): int(cells[2]) for cells in (line.split("|") for line in lines)}
    assert nfe.pop("plain conditional") == 20
    inside = next(name for name in nfe if "rows" in name)
    assert 20 < nfe.pop(inside) < 40
    assert len(nfe) == 8
    assert set(nfe.values()) == {40}


def test_comparisons_take_turns():
    calls = []
    found = timing.compare(lambda: calls.append("a"), lambda: calls.append("b"), 3)
    assert calls == ["a", "b"] * 4
    assert found.ratio > 0


def test_bad_input_is_named(capsys):
    check_mistake(bench.main, "sampler --pairs 0", ("pairs", "0"), capsys)


def test_what_training_costs_is_measured_with_its_context(tmp_path, capsys, monkeypatch, in_suite_data):
    small = dataclasses.replace(TINY, train=Train(batch=8))
    nowhere = Data(source="npz", path=str(tmp_path / "nowhere.npz"), pad=2)
    configs = {"digits": small, "mnist_small": dataclasses.replace(small, data=nowhere)}
    monkeypatch.setattr("diffjax.bench.subject.load_config", configs.get)
    monkeypatch.setattr(training, "BLOCK", 2)
    monkeypatch.setattr(training, "DISPATCHED", 2)
    digits, random = training.trainers(None)
    assert re.fullmatch(r"digits, [\d,]+ parameters \| 8 of 8x8x1 \| digits", str(digits))
    monkeypatch.setattr(bench, "trainers", lambda npz: [random])
    bench.main(["training", "--pairs", "2"])
    head, _, *table = capsys.readouterr().out.splitlines()
    assert re.search(r"8 x cpu \(\d+ cores\), float32, jax [\d.]+\D+\b2\b\D+\b2\b", head)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:]]
    for network, batch, images, _, value, spread, _ in rows:
        assert re.fullmatch(r"mnist_small, [\d,]+ parameters", network)
        assert (batch, images) == ("8 of 32x32x1", "2,000 random images, no nowhere.npz here")
        assert float(value.split()[0].rstrip("%")) > 0
        assert re.fullmatch(r"\d+%", spread)
    figures = {what: float(value.split()[0].rstrip("%")) for _, _, _, what, value, *_ in rows}
    assert len(figures) == 9
    assert [goal for *_, goal in rows if goal] == ["at most 1.10", "at most 3%"]
    # A ratio of medians, both rounded to three digits.
    share = figures["a save, while training stands still"] / (200 * figures["step, 1 per dispatch"])
    assert figures["a save / the 200 steps from one to the next"] == pytest.approx(100 * share, rel=0.02)
    assert int(random.state.step) == 3 * 3 * 2 + 3  # two turns after a first, of three ways, and as many saves


def test_a_file_that_cannot_be_trained_on_is_named(tmp_path, capsys, in_suite_data):
    check_mistake(bench.main, "training --npz {tmp}/gone.npz", "{tmp}/gone.npz", capsys, tmp=tmp_path)
    check_mistake(bench.main, "sampler --npz x.npz", ("npz", "training", "sampler"), capsys)


def test_networks_are_timed_with_their_context(tmp_path, capsys, monkeypatch):
    kinds = ("forward", "backward", "train", "ddim", "guided")
    chosen = [networks.Case("digits", what, 2, steps=10, dispatched=True) for what in kinds]
    chosen.append(networks.Case("digits", "forward", 2, dtype="bfloat16"))
    monkeypatch.setattr(networks, "cases", lambda quick: chosen)
    monkeypatch.setattr(networks, "SIDE", 64)
    monkeypatch.setattr(timing, "BLOCK", 0.0)
    bench.main(["--quick", "--pairs", "1", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    rows = json.loads((tmp_path / "bench.json").read_text())
    assert [row["what"] for row in rows] == [
        "forward", "forward + backward", "train step", "train step, 10 per dispatch", *3 * ["ddim(eta=0, trailing)"],
        "forward",
    ]  # fmt: skip
    assert [row["nfe"] for row in rows] == [None] * 4 + [10, 20, 20, None]
    assert [row["guidance"] for row in rows] == [""] * 5 + ["2, one pass", "2, two passes", ""]
    flops = [row["flops"] for row in rows]
    assert flops[2] == flops[3] > flops[1] > flops[0]
    assert flops[4:7] == [10 * flops[0], 20 * flops[0], 20 * flops[0]]
    for row in rows:
        assert {field.name for field in dataclasses.fields(TimingRow)} < set(row)
        assert (row["ratio"] is not None) == peers.available()
        assert row["mfu"] == pytest.approx(row["flops"] / row["seconds"] / row["ceiling"])
        assert min(row["seconds"], row["peak_bytes"], row["compile_seconds"], row["cached_seconds"]) > 0
    assert (tmp_path / "bench.md").read_text().strip() in said
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    assert all(f"| {part} |" in said for part in first_image.PARTS)


def test_a_peer_has_the_same_weights_and_samples_the_same_images():
    pytest.importorskip("diffusers")
    it = networks.subject("digits")
    theirs = peers.Peer(it.config, it.image_shape, it.classes, it.params).ddim(3, 10)()
    (ours,) = networks.ddim(it, networks.Case("digits", "ddim", 3, steps=10))
    np.testing.assert_allclose(ours.run(), theirs, atol=2e-4)
