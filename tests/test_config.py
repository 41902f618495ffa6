import ast
import dataclasses
import json
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import naming
from hypothesis import given
from hypothesis import strategies as st

from diffjax import loss, process, schedule
from diffjax.build import (
    ModelInfo,
    abstract_params,
    build_module,
    build_optimizer,
    build_schedule,
    build_times,
    count_parameters,
    describe_model,
)
from diffjax.cli import train as train_command
from diffjax.config import (
    SCHEDULES,
    Config,
    Data,
    Diffusion,
    Distillation,
    Train,
    check_resume,
    config_folder,
    config_from_dict,
    config_names,
    config_to_dict,
    flat_fields,
    forgotten_changes,
    load_config,
)
from diffjax.nn.conditioning import UNCONDITIONAL, ClassLabel, Fields, Vector
from diffjax.nn.unet import UNetConfig
from diffjax.testing import assert_schedule

EXPECTED = {
    "digits": ((8, 8, 1), ClassLabel(10)),
    "digits_unconditional": ((8, 8, 1), UNCONDITIONAL),
    "mnist": ((32, 32, 1), ClassLabel(10)),
    "mnist_small": ((32, 32, 1), ClassLabel(10)),
    "cifar10": ((32, 32, 3), UNCONDITIONAL),
    "cifar10_cond": ((32, 32, 3), ClassLabel(10)),
    "cifar10_edm": ((32, 32, 3), UNCONDITIONAL),
    "imagenet64": ((64, 64, 3), ClassLabel(1000)),
}

# ------------------------------------------------------------------------------- own files


@pytest.mark.parametrize("name", config_names())
def test_docstring(name):
    """Commands that parse, the hardware, and the expected result."""
    doc = ast.get_docstring(ast.parse((config_folder() / f"{name}.py").read_text()))
    commands = re.findall(rf"diffjax train ({name} .*)", doc)
    for command in commands:
        train_command.parse("diffjax train", command.split()).experiment.check()
    assert commands
    assert "Hardware:" in doc
    assert "Expected:" in doc


# Of data that are files of the user's: x, and conditions of another number of classes.
FILES = {
    "folder": ((64, 64, 3), ClassLabel(7)),
    "folder_small": ((32, 32, 3), ClassLabel(7)),
    "fashion_unet": ((32, 32, 1), ClassLabel(10)),
    "fashion_dit": ((32, 32, 1), ClassLabel(10)),
    "fashion_autoencoder": ((32, 32, 1), UNCONDITIONAL),
    "fashion_latent_dit": ((8, 8, 4), ClassLabel(10)),
    "imagenet256_dit_xl2": ((32, 32, 4), ClassLabel(1000)),
}


@pytest.mark.parametrize("name", [*EXPECTED, *FILES])
def test_every_config_builds(name, data_dir):
    config = load_config(name)
    config.check()
    if name in FILES:
        assert config.data.path
        info = ModelInfo(config, *FILES[name])
    else:
        data = dataclasses.replace(config.data, dir=str(data_dir))
        info = describe_model(dataclasses.replace(config, data=data))
        found = info.conditioning
        if isinstance(found, ClassLabel):  # in the catalogue some data sets name their classes
            found = dataclasses.replace(found, names=())
        assert (info.x_shape, found) == EXPECTED[name]
    params = abstract_params(info, build_module(info))
    assert ("label" in params) == isinstance(info.conditioning, ClassLabel)
    build_schedule(config)
    build_optimizer(config)


def test_every_name_is_tested():
    assert {*EXPECTED, *FILES} == set(config_names())


def test_small_recipes_are_small():
    """Those for CPUs have few parameters, and no warm-up that takes long."""
    small = ("folder_small", "mnist_small", "digits", "fashion_unet", "fashion_autoencoder")
    for name in (*small, "fashion_dit", "fashion_latent_dit"):
        config = load_config(name)
        info = ModelInfo(config, *(EXPECTED | FILES)[name])
        most = 1_000_000 if name in small else 3_000_000
        assert count_parameters(abstract_params(info, build_module(info))) < most
        assert 10 * config.train.warmup <= config.train.steps <= 5000


def test_recipes_of_papers():
    cifar = load_config("cifar10")
    train = cifar.train
    assert (train.batch, train.steps, train.learning_rate) == (128, 800_000, 2e-4)
    assert (train.warmup, train.ema, train.clip) == (5000, (0.9999,), 1)
    assert (cifar.network.dropout, cifar.data.flip) == (0.1, True)
    imagenet = load_config("imagenet64")
    assert (imagenet.network.dtype, imagenet.train.parallel) == ("bfloat16", "shard_map")


# ------------------------------------------------------------------------------- other files

OWN_FILE = """
import dataclasses

from diffjax.config import load_config

digits = load_config("digits")
config = dataclasses.replace(digits, train=dataclasses.replace(digits.train, steps=7))
"""


def test_file_anywhere(tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text(OWN_FILE)
    config = load_config(str(path))
    assert config.train.steps == 7
    assert config.network == load_config("digits").network
    monkeypatch.chdir(tmp_path)
    assert load_config("mine.py") == load_config("./mine.py") == config


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("config = 1 / 0", ["ZeroDivisionError"]),
        ("config = (", ["SyntaxError"]),
        ("settings = 1", ["config", "Config"]),
        ("config = {'steps': 1}", ["config", "Config"]),
        ("from diffjax.config import Train\nTrain(stepps=1)", ["TypeError", "stepps"]),
        (None, []),
    ],
)
def test_bad_file(tmp_path, content, names):
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=naming(path, *names)):
        load_config(str(path))


def test_unknown_name():
    with pytest.raises(ValueError, match=naming("digit", "digits")):
        load_config("digit")
    with pytest.raises(ValueError, match=naming("zzz", "cifar10", "mnist")):
        load_config("zzz")


# ------------------------------------------------------------------------------- rules

BAD = [
    (Data(source="folder", size=8), ["data.path", "folder"]),
    (Data(source="npz"), ["data.path", "npz"]),
    (Data(path="images"), ["data.path", "folder", "npz"]),
    (Data(skip_damaged=True), ["data.skip_damaged", "tfds", "folder"]),
    (Data(source="folder", path="images"), ["data.size"]),
    (Data(size=0), ["data.size", 0]),
    (Data(pad=-1), ["data.pad", -1]),
    (Data(conditions=("label", "label")), ["data.conditions", "label"]),
    (Diffusion(T=0), ["diffusion.T", 0]),
    (
        Diffusion(zero_terminal_snr=True),
        ["diffusion.zero_terminal_snr", True, "diffusion.prediction", "eps", 1000, "v"],
    ),
    (Diffusion(schedule="flow"), ["diffusion.schedule", "flow", "diffusion.prediction", "eps"]),
    (
        Diffusion(schedule="flow", prediction="edm"),
        ["diffusion.schedule", "flow", "diffusion.prediction", "edm", "log(sigma/alpha)", 1000],
    ),
    (
        Diffusion(zero_terminal_snr=True, prediction="edm"),
        ["diffusion.zero_terminal_snr", True, "diffusion.prediction", "edm", 1000],
    ),
    (
        Diffusion(schedule="flow", prediction="flow", zero_terminal_snr=True),
        ["diffusion.zero_terminal_snr", True, "diffusion.schedule", "flow", 1000],
    ),
    (Diffusion(shift=0.0), ["diffusion.shift", 0]),
    (Diffusion(shift=3.0), ["diffusion.shift", 3, "diffusion.schedule", "linear", "flow"]),
    (
        Diffusion(time_scale=1.0),
        ["diffusion.time_scale", 1, "diffusion.prediction", "eps", "flow"],
    ),
    (Diffusion(sigma_data=float("nan")), ["diffusion.sigma_data", "nan"]),
    (Train(times_mean=0.5), ["train.times_mean", 0.5, "train.times", "uniform", "log_normal"]),
    (Train(times="log_normal", times_std=0.0), ["train.times_std", 0]),
    (Train(times="log_normal", times_mean=float("inf")), ["train.times_mean", "inf"]),
    (Diffusion(schedule="cosine", betas=(0.1, 0.2)), ["diffusion.betas", "cosine", "linear"]),
    (Train(steps=0), ["train.steps", 0]),
    (Train(batch=-3), ["train.batch", -3]),
    (Train(clip=float("nan")), ["train.clip", "nan"]),
    (Train(learning_rate=float("inf")), ["train.learning_rate", "inf"]),
    (Train(warmup=-1), ["train.warmup", -1]),
    (Train(condition_dropout=1.0), ["train.condition_dropout", 1]),
    (Train(ema=()), ["train.ema"]),
    (Train(ema=(0.9, 1.0)), ["train.ema"]),
    (Train(seed=-1), ["train.seed", -1]),
    (Train(seed=2**32), ["train.seed", 2**32]),
    (Train(times="antithetic", batch=7), ["train.batch", 7, "antithetic"]),
    (UNetConfig(channels=0), ["network.channels", 0]),
    (UNetConfig(channels=7), ["network.channels", 7]),
    (UNetConfig(multipliers=()), ["network.multipliers"]),
    (UNetConfig(multipliers=(1, 0)), ["network.multipliers"]),
    (UNetConfig(head_width=0), ["network.head_width", 0]),
    (UNetConfig(norm_groups=0), ["network.norm_groups", 0]),
    (UNetConfig(dropout=1.0), ["network.dropout", 1]),
]
FIELDS = {Data: "data", Diffusion: "diffusion", Train: "train", UNetConfig: "network"}


@pytest.mark.parametrize(("part", "names"), BAD)
def test_check_names_the_field(part, names):
    config = dataclasses.replace(Config(), **{FIELDS[type(part)]: part})
    with pytest.raises(ValueError, match=naming(*names)):
        config.check()


def test_data_names():
    assert (str(Data()), Data().known) == ("digits", True)
    assert str(Data(source="folder", path="a/photos", size=8)) == "photos"
    assert not Data(name="hf:ddpm").known


# ------------------------------------------------------------------------------- stored

trains = st.builds(Train, ema=st.lists(st.floats(0, 0.99), min_size=1, max_size=3).map(tuple))
networks = st.builds(
    UNetConfig,
    multipliers=st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
datas = st.builds(Data, dir=st.none() | st.text(), conditions=st.sampled_from([(), ("a", "b")]))


@given(trains, networks, datas)
def test_round_trip_through_json(train, network, data):
    config = Config(train=train, network=network, data=data)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    for conditioning in (UNCONDITIONAL, Fields((ClassLabel(3), Vector(2)))):
        info = ModelInfo(config, (8, 6, 3), conditioning)
        assert ModelInfo.from_dict(json.loads(json.dumps(info.to_dict()))) == info


def test_network_is_stored_by_name():
    assert config_to_dict(Config())["network"]["kind"] == "unet"


def test_unknown_field():
    stored = config_to_dict(Config())
    stored["train"]["flavour"] = 1
    with pytest.raises(ValueError, match=naming("flavour")):
        config_from_dict(stored)


def test_flat_fields():
    fields = flat_fields(Config(train=Train(steps=9)))
    assert fields["train.steps"] == 9
    assert fields["network.channels"] == 32
    assert fields["data.conditions"] == ("label",)


def test_resume():
    stored = Config()
    assert check_resume(stored, Config(train=Train(steps=9))) == ["train.steps: 1000 -> 9"]
    assert check_resume(stored, stored) == []
    assert check_resume(stored, Config(network=UNetConfig(dropout=0.1)))


def test_the_data_of_an_import_may_be_named_on_resume():
    """They were not known; those of another run are bound."""
    stored = Config(data=Data(name="hf:theirs"))
    (change,) = check_resume(stored, Config(data=Data(name="digits")))
    assert change == "data.name: hf:theirs -> digits"
    with pytest.raises(ValueError, match=naming("data.name", "mnist", "digits")):
        check_resume(Config(), Config(data=Data(name="mnist")))


# All others are bound to the arrays of a checkpoint, or to what they mean.
FREE = {
    "data.dir", "data.path", "data.flip", "data.skip_damaged",
    "network.dropout", "network.dtype", "network.remat",
}  # fmt: skip


def another(value):
    """A value of the same type."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, tuple):
        return (*value[:-1], *map(another, value[-1:] or (0,)))
    return value + ("x" if isinstance(value, str) else 1)


def with_field(config, name, value):
    """The configuration with another value of a field, as in "train.steps"."""
    part, field = name.split(".")
    changed = dataclasses.replace(getattr(config, part), **{field: value})
    return dataclasses.replace(config, **{part: changed})


@pytest.mark.parametrize("name", flat_fields(Config()))
def test_each_field_by_itself(name):
    """A field that is bound is refused by name; another is told, and told as forgotten."""
    stored = Config()
    old = flat_fields(stored)[name]
    changed = with_field(stored, name, another(old))
    if name in FREE or (name.startswith("train.") and name != "train.power_ema"):
        assert check_resume(stored, changed) == [f"{name}: {old} -> {another(old)}"]
        assert check_resume(changed, stored) == [f"{name}: {another(old)} -> {old}"]
    else:
        for pair in ((stored, changed), (changed, stored)):
            with pytest.raises(ValueError, match=naming(name)):
                check_resume(*pair)
    forgotten = forgotten_changes(stored, changed, {"train", f"{name}x", "network", "data"})
    assert [text.split()[0] for text in forgotten] == [name] * (not name.startswith("distillation"))
    assert forgotten_changes(stored, changed, {name}) == []
    assert forgotten_changes(stored, stored, ()) == []


def test_data_of_an_imported_network():
    """They are not known, and may be named; then they are bound like those of any other."""
    imported = Config(data=Data(name="hf:ddpm"))
    known = dataclasses.replace(imported, data=Data(name="cifar10", pad=2))
    assert len(check_resume(imported, known)) == 2
    with pytest.raises(ValueError, match=naming("diffusion.T")):
        check_resume(imported, with_field(known, "diffusion.T", 500))
    with pytest.raises(ValueError, match=naming("data.name", "hf:ddpm", "cifar10")):
        check_resume(known, imported)


@pytest.mark.parametrize(
    ("given_config", "names"),
    [
        (Config(network=UNetConfig(blocks=3)), ["network.blocks", 3, 1]),
        (Config(data=Data(conditions=())), ["data.conditions", "label"]),
        (Config(data=Data(pad=2)), ["data.pad", 2, 0]),
        (Config(diffusion=Diffusion(prediction="v")), ["diffusion.prediction", "v", "eps"]),
        (Config(diffusion=Diffusion(shift=2.0)), ["diffusion.shift", 2, 1]),
        (Config(diffusion=Diffusion(time_scale=1.0)), ["diffusion.time_scale", 1, 1000]),
        (Config(diffusion=Diffusion(sigma_data=1.0)), ["diffusion.sigma_data", 1, 0.5]),
        (Config(distillation=Distillation(steps=4)), ["distillation.steps", 4, 0]),
        (Config(train=Train(ema=(0.9, 0.99))), ["train.ema", 0.9, 0.999]),
    ],
)
def test_resume_with_other_arrays(given_config, names):
    with pytest.raises(ValueError, match=naming(*names)):
        check_resume(Config(), given_config)


# ------------------------------------------------------------------------------- parts


def test_learning_rate_warms_up_and_decays():
    _, rate = build_optimizer(Config(train=Train(steps=100, warmup=10, learning_rate=1.0)))
    rates = [float(rate(n)) for n in (0, 5, 10, 55, 100)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-6)
    train = Train(steps=100, warmup=0, learning_rate=1.0, decay="none")
    _, constant = build_optimizer(Config(train=train))
    assert [float(constant(n)) for n in (0, 100)] == [1, 1]


def test_large_gradients_are_clipped():
    """Through Adam the clip shows in its second moment."""
    optimizer, _ = build_optimizer(Config(train=Train(clip=0.5)))
    params = jnp.zeros(4)
    _, state = optimizer.update(jnp.full(4, 100.0), optimizer.init(params), params)
    assert float(jnp.sum(optax.tree.get(state, "nu"))) == pytest.approx(0.001 * 0.25, rel=1e-4)


@pytest.mark.parametrize("name", typing.get_args(typing.get_type_hints(Diffusion)["schedule"]))
@pytest.mark.parametrize("T", [100, 1000])
def test_every_schedule_preserves_variance_and_reaches_noise(name, T):
    levels = build_schedule(Config(diffusion=Diffusion(schedule=name, T=T)))
    assert_schedule(levels)
    assert schedule.is_variance_preserving(levels)
    assert levels.alpha[-1] < 0.07  # scaled_linear stops there, the others far below
    if name == "flow":
        assert levels.alpha[-1] == 0
        return
    rescaled = Diffusion(schedule=name, T=T, zero_terminal_snr=True)
    assert build_schedule(Config(diffusion=rescaled)).alpha[-1] == 0


@pytest.mark.parametrize(
    ("kind", "field", "built"),
    [
        (Train, "weighting", loss.WEIGHTINGS),
        (Diffusion, "prediction", process.PREDICTIONS),
        (Diffusion, "schedule", SCHEDULES),
    ],
)
def test_every_choice_exists(kind, field, built):
    assert set(typing.get_args(typing.get_type_hints(kind)[field])) <= set(built)


@pytest.mark.parametrize("name", typing.get_args(typing.get_type_hints(Train)["times"]))
def test_times(name):
    times = build_times(Config(train=Train(times=name, batch=8)))
    noisy = schedule.level_at(schedule.linear(1000), slice(1, None))
    t = times(jax.random.key(0), jnp.arange(16, 24, dtype=jnp.uint32), noisy)
    assert ((t >= 1) & (t <= 1000)).all()
    assert ((t[::2] + t[1::2] == 1001).all()) == (name == "antithetic")
    assert (np.unique((np.asarray(t) - 1) // 125).size == 8) or name != "stratified"
