import ast
import json
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tyro
from helpers import naming
from hypothesis import given
from hypothesis import strategies as st

from diffjax import loss, process, schedule
from diffjax.build import build_optimizer, build_schedule, build_times
from diffjax.cli import common, train
from diffjax.config import (
    SCHEDULES,
    Config,
    Data,
    Diffusion,
    Train,
    UNetConfig,
    check_config,
    check_resume,
    config_folder,
    config_from_dict,
    config_names,
    config_to_dict,
    load_config,
)
from diffjax.testing import assert_schedule
from diffjax.training.setup import build_training

SHAPES = {"digits": ((8, 8, 1), 10), "mnist": ((32, 32, 1), 10), "cifar10": ((32, 32, 3), 10)}
SHAPES |= {"imagenet64": ((64, 64, 3), 1000), "folder": ((64, 64, 3), 7)}
ALIASES = {"ddpm_cifar10": "cifar10", "adm_imagenet64": "imagenet64"}


@pytest.mark.parametrize("name", config_names())
def test_every_configuration_builds_and_tells_commands_that_parse(name):
    """Its state and its loss, in shapes alone, for the images that its data have."""
    config = load_config(name)
    check_config(config)
    doc = ast.get_docstring(ast.parse((config_folder() / f"{name}.py").read_text()))
    commands = re.findall(rf"diffjax train {name} (.*)", doc)
    for command in commands:
        parsed = common.parse(
            train.Options, name, command.split(), train.Options(tyro.MISSING, config=config)
        )
        check_config(parsed.config)
    assert commands
    assert "Hardware:" in doc
    assert "Expected:" in doc
    shape, classes = SHAPES.get(name) or SHAPES[ALIASES.get(name) or name.split("_")[0]]
    training = build_training(config, shape, classes if config.data.labels else 0)
    if name in ALIASES:
        return
    state = jax.eval_shape(training.init, jax.random.key(0))
    like = {
        "image": np.zeros((4, *shape), np.float32),
        "label": np.zeros(4, int),
        "index": np.zeros(4, np.uint32),
    }
    batch = {key: value for key, value in like.items() if key != "label" or config.data.labels}
    assert jax.eval_shape(training.eval_step, state.params, batch).shape == ()


def test_the_recipes_are_those_of_their_papers():
    for name, paper in ALIASES.items():
        assert load_config(name) == load_config(paper)
    cifar = load_config("cifar10")
    train = cifar.train
    assert (train.batch, train.steps, train.learning_rate, train.warmup) == (
        128,
        800_000,
        2e-4,
        5000,
    )
    assert (train.ema, train.clip, cifar.network.dropout, cifar.data.flip) == (
        (0.9999,),
        1,
        0.1,
        True,
    )
    imagenet = load_config("imagenet64")
    assert (imagenet.network.dtype, imagenet.train.parallel) == ("bfloat16", "shard_map")


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (Data(source="folder", size=8), ["data.path", "folder"]),
        (Data(source="npz"), ["data.path", "npz"]),
        (Data(path="images"), ["data.path", "folder", "npz"]),
        (Data(source="folder", path="images"), ["data.size"]),
        (Data(size=0), ["data.size", 0]),
        (Data(pad=-1), ["data.pad", -1]),
    ],
)
def test_data_that_cannot_be_is_named(data, names):
    with pytest.raises(ValueError, match=naming(*names)):
        check_config(Config(data=data))


@given(st.builds(Train), st.lists(st.integers(1, 4), min_size=1).map(tuple), st.none() | st.text())
def test_a_configuration_survives_json(train, multipliers, folder):
    config = Config(train=train, network=UNetConfig(multipliers=multipliers), data=Data(dir=folder))
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_a_stored_configuration_of_another_version():
    assert config_from_dict({"train": {"steps": 7}}).train == Train(steps=7)
    with pytest.raises(ValueError, match=naming("flavour")):
        config_from_dict({"train": {"flavour": 1}})


def test_resuming_may_change_the_training_but_not_the_network():
    stored = Config()
    assert check_resume(stored, Config(train=Train(steps=9))) == ["train.steps: 1000 -> 9"]
    assert check_resume(stored, stored) == []
    with pytest.raises(ValueError, match=naming("network.blocks", 3, 1)):
        check_resume(stored, Config(network=UNetConfig(blocks=3)))


def test_the_learning_rate_warms_up_and_decays():
    _, rate = build_optimizer(Config(train=Train(steps=100, warmup=10, learning_rate=1.0)))
    assert [float(rate(n)) for n in (0, 5, 10, 55, 100)] == pytest.approx(
        [0, 0.5, 1, 0.5, 0], abs=1e-6
    )
    _, constant = build_optimizer(
        Config(train=Train(steps=100, warmup=0, learning_rate=1.0, decay="none"))
    )
    assert [float(constant(n)) for n in (0, 100)] == [1, 1]


def test_large_gradients_are_clipped():
    """Through Adam the clip shows in its second moment."""
    optimizer, _ = build_optimizer(Config(train=Train(clip=0.5)))
    params = jnp.zeros(4)
    _, state = optimizer.update(jnp.full(4, 100.0), optimizer.init(params), params)
    assert float(jnp.sum(optax.tree.get(state, "nu"))) == pytest.approx(0.001 * 0.25, rel=1e-4)


@pytest.mark.parametrize("name", typing.get_args(typing.get_type_hints(Diffusion)["schedule"]))
@pytest.mark.parametrize("T", [100, 1000])
def test_every_named_schedule_keeps_the_variance_and_reaches_noise(name, T):
    levels = build_schedule(Config(diffusion=Diffusion(schedule=name, T=T)))
    assert_schedule(levels)
    assert schedule.is_variance_preserving(levels)
    assert levels.alpha[-1] < 0.07  # scaled_linear stops there, the others far below
    emptied = build_schedule(
        Config(diffusion=Diffusion(schedule=name, T=T, zero_terminal_snr=True))
    )
    assert emptied.alpha[-1] == 0


@pytest.mark.parametrize(
    ("kind", "field", "built"),
    [
        (Train, "weighting", loss.WEIGHTINGS),
        (Diffusion, "prediction", process.PREDICTIONS),
        (Diffusion, "schedule", SCHEDULES),
    ],
)
def test_every_name_that_can_be_asked_for_exists(kind, field, built):
    assert set(typing.get_args(typing.get_type_hints(kind)[field])) <= set(built)


@pytest.mark.parametrize("name", typing.get_args(typing.get_type_hints(Train)["times"]))
def test_levels_are_drawn_as_asked(name):
    times = build_times(Config(train=Train(times=name, batch=8)))
    t = times(jax.random.key(0), jnp.arange(16, 24, dtype=jnp.uint32), 1000)
    assert ((t >= 1) & (t <= 1000)).all()
    assert ((t[::2] + t[1::2] == 1001).all()) == (name == "antithetic")
    assert (np.unique((np.asarray(t) - 1) // 125).size == 8) or name != "stratified"


def test_antithetic_pairs_need_an_even_batch():
    with pytest.raises(ValueError, match=naming("batch", 7, "antithetic")):
        build_times(Config(train=Train(times="antithetic", batch=7)))
