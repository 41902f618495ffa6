import dataclasses
import re

import pytest
from helpers import naming

from diffjax import schedule
from diffjax.config import Data, Distillation
from diffjax.inference.autoencoder import TrainedAutoencoder
from diffjax.inference.guidance import Guidance, can_be_guided, check_guidance
from diffjax.nn.autoencoder import AutoencoderConfig
from diffjax.nn.conditioning import ClassLabel

CONSISTENT = Distillation(method="consistency", steps=4)
CONDITIONED = Distillation(method="progressive", steps=2, guidance=3.0)


def test_only_scale_one_alone_is_plain():
    assert Guidance().is_plain
    for fields in (
        {"scale": 2.0}, {"interval": (0.0, 1.0)}, {"rescale": 0.5}, {"negative": "3"},
        {"batched": False}, {"channels": 1},
    ):  # fmt: skip
        assert not Guidance(**fields).is_plain


def test_guidance_is_described(tiny_model):
    guide = tiny_model()
    assert str(Guidance(2.0)) == "2"
    assert str(Guidance(2.5, interval=(0.3, 5.0), rescale=0.7)) == "2.5 in 0.3..5 rescaled 0.7"
    for guidance, words in (
        (Guidance(2.0, negative="5"), ("2", "5")),
        (Guidance(2.0, guide_model=guide), ("2", guide.name, "ema", 7)),
        (Guidance(2.0, batched=False), ("2", "two")),
        (Guidance(2.0, channels=3), ("2", "3")),
    ):
        assert re.search(naming(*words), str(guidance))


def test_guidance_needs_a_trained_null(tiny_model):
    assert can_be_guided(tiny_model().info)
    assert can_be_guided(tiny_model("fields").info)
    without = tiny_model().info._replace(conditioning=ClassLabel(10, has_null_label=False))
    for info in (
        tiny_model("unconditional").info, tiny_model(dropout=0.0).info, without,
        tiny_model(distillation=CONSISTENT).info,
    ):  # fmt: skip
        assert not can_be_guided(info)


@pytest.mark.parametrize(
    ("kind", "guidance"),
    [
        ("unconditional", Guidance()),
        ("label", Guidance(0.0)),
        ("label", Guidance(3.0, interval=(0.3, 5.0), rescale=0.7, batched=False)),
        ("label", Guidance(3.0, negative="5")),
        ("fields", Guidance(3.0, negative="label=1;pose=0,0,1")),
    ],
)
def test_right_guidance_passes(kind, guidance, tiny_model):
    check_guidance(tiny_model(kind), guidance)


def test_a_worse_version_of_the_same_model_may_guide(tiny_model):
    model, guide = tiny_model("unconditional"), tiny_model("unconditional", seed=1)
    check_guidance(model, Guidance(2.0, guide_model=guide))
    check_guidance(tiny_model(dropout=0.0), Guidance(2.0, guide_model=tiny_model()))


def test_a_guide_of_another_autoencoder_is_refused(tiny_model):
    def of_latents(checksum, scaling):
        model = tiny_model()
        autoencoder = TrainedAutoencoder(AutoencoderConfig(scaling=scaling), {}, checksum, "z")
        info = model.info._replace(autoencoder=checksum)
        return model._replace(info=info, autoencoder=autoencoder)

    model = of_latents("a", 1.0)
    check_guidance(model, Guidance(2.0, guide_model=of_latents("a", 1.0)))
    for guide in (of_latents("b", 1.0), of_latents("a", 2.0), tiny_model()):
        with pytest.raises(ValueError, match=naming(guide.name, "autoencoder", model.name)):
            check_guidance(model, Guidance(2.0, guide_model=guide))


def test_a_negative_condition_needs_no_dropout(tiny_model):
    model = tiny_model(dropout=0.0)
    check_guidance(model, Guidance(2.0, negative="5"))
    with pytest.raises(ValueError, match=naming("condition_dropout", 0)):
        check_guidance(model, Guidance(2.0))


@pytest.mark.parametrize(
    ("guidance", "names"),
    [
        (Guidance(float("nan")), ("guidance", "nan")),
        (Guidance(-2.0), ("guidance", -2)),
        (Guidance(interval=(0.3, 5.0)), ("guidance", 1, "0.3..5")),
        (Guidance(2.0, interval=(5.0, 0.3)), ("interval", 5, 0.3)),
        (Guidance(2.0, interval=(-1.0, 0.3)), ("interval", -1, 0.3)),
        (Guidance(2.0, rescale=1.5), ("rescale", 1.5)),
        (Guidance(2.0, channels=0), ("channels", 0, 1)),
        (Guidance(2.0, channels=2), ("channels", 2, 1)),
        (Guidance(2.0, negative="10"), (10, 9)),
        (Guidance(2.0, negative="0,1"), ("negative", "0,1")),
    ],
)
def test_bad_guidance_is_named(guidance, names, tiny_model):
    with pytest.raises(ValueError, match=naming(*names)):
        check_guidance(tiny_model(), guidance)


def test_unconditional_models_cannot_be_guided(tiny_model):
    for guidance in (Guidance(2.0), Guidance(negative="2")):
        with pytest.raises(ValueError, match=naming("unconditional", "guidance")):
            check_guidance(tiny_model("unconditional"), guidance)


def test_distilled_models_take_their_own_guidance(tiny_model):
    conditioned = tiny_model(distillation=CONDITIONED)
    check_guidance(conditioned, Guidance(1.0))
    check_guidance(conditioned, Guidance(3.0))
    consistent = tiny_model(distillation=CONSISTENT)
    check_guidance(consistent, Guidance())
    for model, guidance, names in (
        (conditioned, Guidance(4.0), ("guidance", 4, 1, 3)),
        (conditioned, Guidance(0.5), ("guidance", 0.5)),
        (conditioned, Guidance(2.0, negative="3"), ("guidance",)),
        (consistent, Guidance(2.0), ("guidance", 2)),
        (consistent, Guidance(2.0, guide_model=tiny_model()), ("guidance",)),
    ):
        with pytest.raises(ValueError, match=naming(model.name, *names)):
            check_guidance(model, guidance)


def test_guide_models_of_another_kind_are_named(tiny_model):
    model = tiny_model()
    config = dataclasses.replace(model.info.config, data=Data(name="mnist"))
    other_data = model._replace(name="other", info=model.info._replace(config=config))
    for guidance, names in (
        (Guidance(2.0, guide_model=other_data), ("other", "mnist", "toys")),
        (Guidance(2.0, guide_model=tiny_model(shape=(8, 8, 1))), ("8x8x1", "4x4x1")),
        (Guidance(2.0, guide_model=tiny_model("unconditional")), ("unconditional", 10)),
        (Guidance(2.0, guide_model=tiny_model(distillation=CONSISTENT)), ("distilled",)),
        (Guidance(2.0, guide_model=model._replace(schedule=schedule.cosine(100))), ("schedule",)),
        (Guidance(guide_model=model), ("guidance", 1)),
        (Guidance(2.0, guide_model=model, batched=False), ("negative", "two", "autoguidance")),
        (Guidance(2.0, guide_model=model, negative="1"), ("negative", "two", "autoguidance")),
    ):
        with pytest.raises(ValueError, match=naming(*names)):
            check_guidance(model, guidance)
