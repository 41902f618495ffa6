"""Options of `diffjax dry-run`, `demo`, `convert` and `bench`."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from diffjax.bench import dry_run as benchmark
from diffjax.bench import first_image, networks, timing
from diffjax.bench import guidance as guidance_bench
from diffjax.bench import sampling as sampler_bench
from diffjax.bench import training as training_bench
from diffjax.bench.models import BenchModel
from diffjax.cli import bench, convert, dry_run, main
from diffjax.config import flat_fields
from diffjax.inference.model import load_model
from diffjax.inference.pipeline import Pipeline
from diffjax.interop import hub
from diffjax.nn.conditioning import UNCONDITIONAL, ClassLabel, Vector
from tests.options.observations import observes
from tests.options.probe import call, calls, words_of, write_run
from tests.options.values import DATA, DIFFUSION, NETWORK, TRAIN, words_from

CONFIG = DATA | NETWORK | DIFFUSION | TRAIN


@observes("dry-run config", "dry-run --target", *(f"dry-run --{name}" for name in CONFIG))
def test_dry_run(images, monkeypatch):
    """Every option of a configuration is in that which is compiled, for the devices named.

    For TPUs the words are given to a child process, which compiles.
    """
    monkeypatch.setattr(benchmark, "check_target", lambda target: None)  # it asks for libtpu
    arrived = call((subprocess, "run"), "dry-run digits --target v5e:4x4 --train.batch 48")
    assert arrived.args_[0][-5:] == words_of("digits --target v5e:4x4 --train.batch 48")
    monkeypatch.setenv(dry_run.CHILD, "1")
    shift = {name: CONFIG[name] for name in ("diffusion.shift", "diffusion.prediction")}
    shift |= {"diffusion.schedule": ("flow", "flow")}
    for values in ({name: CONFIG[name] for name in CONFIG if name != "diffusion.shift"}, shift):
        command = f"dry-run digits --target v5e:4x4 {words_from(values)}"
        (config,) = call((dry_run, "describe_model"), command).args_
        found = flat_fields(config)
        expected = {name.replace("-", "_"): value for name, (_, value) in values.items()}
        assert {name: found[name] for name in expected} == expected
    named = "dry-run cifar10 --data.source npz --data.size 6 --data.pad 2 --data.conditions pose"
    info, target = call(
        (benchmark, "report"), named, f"--data.path {images} --target v5e:4x4"
    ).args_[:2]
    assert (info.x_shape, info.conditioning, target) == ((10, 10, 1), Vector(3, "pose"), "v5e:4x4")
    assert info.config.network.channels == 128
    assert info.config.data.path == str(images)


@observes("dry-run --x-shape", "dry-run --classes")
def test_dry_run_without_data(monkeypatch):
    """What x is, and its number of classes, in place of data that are not there."""
    monkeypatch.setattr(dry_run, "describe_model", None)
    words = "dry-run folder --target cpu --data.path nowhere"
    for options, shape, conditioning in (
        ("--x-shape 6,4,3 --classes 7", (6, 4, 3), ClassLabel(7)),
        ("--x-shape 2,2,1 --data.conditions", (2, 2, 1), UNCONDITIONAL),
    ):
        info, _ = call((benchmark, "report"), words, options).args_
        assert (info.x_shape, info.conditioning) == (shape, conditioning)
        assert info.config.data.path == "nowhere"


@observes("demo model", "demo --num", "demo --seed")
def test_demo(images, tmp_path):
    """The first sampler runs the model for so many images, from the seed."""
    values = {"a": 0.2, "b": 0.3}
    for name, value in values.items():
        run = write_run(tmp_path / name, images, {1: (0.1, value, 0.5)}, T=60)
        _, params, _, request, _ = call(
            (Pipeline, "__call__"), "demo", run, "--num 30 --seed 17"
        ).args_
        assert float(params["idle"]) == np.float32(value)
        assert (request.num, request.seed) == (30, 17)
        assert (request.condition == np.arange(30) % 10).all()


@observes(
    "convert source", "convert destination", "convert --weights", "convert --checkpoint",
    "convert --data", "convert --autoencoder",
)  # fmt: skip
def test_convert(run, other_run, tmp_path, monkeypatch):
    """The weights that are named arrive in the folder; an imported network has the data."""
    cases = {"": (7, 0.5), "--weights raw": (7, 0.4), "--checkpoint 3 --weights 0.5": (3, 0.3)}
    for words, (step, value) in cases.items():
        place = hub, "save"
        folder, info, params, *_ = call(place, "convert", run, f"hf:{tmp_path}/x", words).args_
        assert folder == tmp_path / "x"
        assert float(params["idle"]) == np.float32(value)
        assert info.config.data.source == "npz"
        assert load_model(run, step).step == step
    other = call((hub, "save"), "convert", other_run, f"hf:{tmp_path}/x").args_[2]
    assert float(other["idle"]) == np.float32(0.95)
    opened = []

    def load(source, *args):
        opened.append(source)
        return load_model(run)

    monkeypatch.setattr(convert, "load_model", load)
    monkeypatch.setattr(convert, "is_autoencoder", lambda source: False)
    for name in ("one", "two"):
        main(words_of("convert hf:somewhere", tmp_path / name, "--data", name))
        model = load_model(tmp_path / name)
        assert (model.info.config.data.name, model.step) == (name, 7)
        assert float(model.params["idle"]) == np.float32(0.5)
    assert opened == ["hf:somewhere"] * 2
    monkeypatch.setattr(convert, "load_autoencoder", lambda source: f"loaded {source}")
    words = "convert somewhere.pt", tmp_path / "three", "--autoencoder hf:vae"
    assert call((convert, "load_model"), *words).args_[0::3] == ("somewhere.pt", "loaded hf:vae")


# ------------------------------------------------------------------------------- bench


def test_repeats():
    """Every function is called as often as is asked for, and twice before."""
    counts = [0, 0]

    def counted(i):
        counts[i] += 1
        return np.zeros(1)

    timing.compare(lambda: counted(0), lambda: counted(1), 5)
    assert counts == [5 + 1, 5 + 1] or counts == [5 + 2, 5 + 2]


@observes("bench networks --pairs", "bench networks --quick", "bench networks --out")
def test_bench_networks(tmp_path, monkeypatch):
    """So many repeats, fewer cases and repeats if it is quick, into the folder."""
    monkeypatch.setattr(first_image, "measure", lambda name: [])
    for option, most, quick in (("", 99, False), ("--quick", 3, True)):
        for pairs in (2, 7):
            words = f"bench networks --pairs {pairs} --out {tmp_path}/{pairs} {option}"
            cases, repeats = call((networks, "measure"), words).args_
            assert repeats == min(pairs, most)
            assert cases == networks.cases(quick)
            out, *_ = call((bench, "bench_networks"), words).args_
            assert out == tmp_path / str(pairs) / "bench.json"
    assert len(networks.cases(True)) < len(networks.cases(False))
    assert {case.network for case in networks.cases(True)} == {"digits", "cifar10"}


@observes("bench sampler --pairs", "bench guidance --pairs")
def test_bench_pairs(run, monkeypatch):
    """So many pairs arrive in the comparison."""
    model = load_model(run)
    parts = model.info, model.network, model.params, model.schedule, model.parameterization
    monkeypatch.setattr(guidance_bench, "bench_model", lambda name: BenchModel(name, *parts))
    for place, name in ((sampler_bench, "sampler"), (guidance_bench, "guidance")):
        for pairs in (4, 6):
            assert call((place, "compare"), f"bench {name} --pairs {pairs}").args_[2] == pairs


@observes("bench training --pairs", "bench training --npz")
def test_bench_training(monkeypatch):
    """The second training has the images of the file, and so many turns, nine at most."""
    loaded = []
    monkeypatch.setattr(training_bench, "load_data", lambda config: loaded.append(config.data))
    monkeypatch.setattr(training_bench, "Trainer", lambda *args: SimpleNamespace(name=args[0]))
    for pairs, repeats in ((4, 4), (6, 6), (15, 9)):
        words = f"bench training --pairs {pairs} --npz some/file.npz"
        arrived = call((training_bench, "measure"), words)
        assert arrived.args_[1] == repeats
    assert [data.source for data in loaded[:2]] == ["tfds", "npz"]
    assert Path(loaded[1].path) == Path("some/file.npz")
    loaded.clear()
    calls((bench, "bench_training"), "bench training", result="")
    assert [data.name for data in loaded] == ["digits", "mnist"]
    assert {data.source for data in loaded} == {"tfds"}


@observes(*(f"bench {name} --report" for name in ("sampler", "guidance", "training")))
def test_bench_report(tmp_path, monkeypatch):
    """What is measured is written to the file."""
    monkeypatch.setattr(bench, "trainers", lambda path: [])
    for name in ("sampler", "guidance", "training"):
        path = tmp_path / f"{name}.md"
        words = f"bench {name} --report {path}"
        calls((bench, f"bench_{name}"), words, result=f"| {name} |\n|---|\n| 3 |")
        assert name in path.read_text()
