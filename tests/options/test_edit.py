"""Options of `diffjax edit`: the images, plans and requests that arrive in the pipeline."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from diffjax import sampler, schedule, solvers
from diffjax.data import image_io
from diffjax.inference.editing import trailing_from
from diffjax.inference.pipeline import Pipeline
from tests.options.observations import observes
from tests.options.probe import SHAPE, calls, is_same

LEVELS = schedule.cosine(20)
EDITS = {
    "reconstruct": "--steps 4",
    "interpolate": "--steps 4 --between 1",
    "vary": "--start 10 --steps 4",
    "inpaint": "--steps 4 --resample 1",
}


def edited(run, edit, *words, out=None):
    """What arrives in the pipeline, call by call: params, plan and request. All of x is grey."""
    arrived = calls(
        (Pipeline, "__call__"), "edit", edit, run, EDITS[edit], *words,
        "--out", out or run / "edited.png", function=_grey,
    )  # fmt: skip
    return [SimpleNamespace(params=a[1], plan=a[2], request=a[3]) for a, _ in arrived]


def _grey(pipeline, params, plan, request, hooks):
    hooks.progress(plan.steps)
    return SimpleNamespace(x=np.zeros((request.num, *SHAPE), np.float32))


def images_of(run, edit, *words):
    """The images that are edited, and their condition."""
    found = edited(run, edit, *words)[0]
    request, first = found.request, jax.tree.map(lambda leaf: leaf[0], found.plan.level)
    if edit == "vary":  # pixels are -1 or 1
        noise = noise_of(request.seed, request.num)
        x = np.sign(request.x - first.sigma * noise).astype(np.float32)
        return x, request.condition
    return request.x if request.inpaint is None else request.inpaint[0], request.condition


def every(*names):
    return [f"edit {edit} {name}" for edit in EDITS for name in names]


@pytest.mark.parametrize("edit", EDITS)
@observes(*every("model", "--weights", "--checkpoint"))
def test_weights(edit, run, other_run):
    """The parameters are those of the run, the checkpoint and the average that are named."""
    cases = {"": 0.5, "--weights raw": 0.4, "--checkpoint 3 --weights 0.5": 0.3}
    for words, value in cases.items():
        found = edited(run, edit, words)
        assert {float(each.params["idle"]) for each in found} == {np.float32(value)}
    assert float(edited(other_run, edit)[0].params["idle"]) == np.float32(0.95)


@pytest.mark.parametrize("edit", EDITS)
@observes(*every("--images", "--num", "--condition", "--data.path"))
def test_images(edit, run, images, tmp_path):
    """The images are the files, or so many that are held out of the data, with their conditions."""
    pairs = 2 if edit == "interpolate" else 1
    stored = np.load(images)
    known = {image.tobytes() for image in image_io.to_float(stored["x"])}
    x, condition = images_of(run, edit, "--num 6 --condition 7,7,2,2,4,4")
    assert len(x) == 6 // pairs
    assert {image.tobytes() for image in x} <= known
    assert condition.tolist() == [7, 7, 2, 2, 4, 4][::pairs]
    assert (images_of(run, edit)[1] == 10).all()  # no condition is the null label
    with (tmp_path / "digits").open("wb") as file:
        np.savez(file, x=stored["x"][:, ::-1], y=stored["y"])
    moved, _ = images_of(run, edit, "--num 6 --data.path", tmp_path / "digits")
    turned = {image[::-1].tobytes() for image in moved}
    assert turned <= known
    files = []
    for i, image in enumerate(stored["x"][:4]):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(image[..., 0]).save(files[-1])
    x, _ = images_of(run, edit, "--images", *files)
    assert np.array_equal(x, image_io.to_float(stored["x"][:4][::pairs]))


@pytest.mark.parametrize("edit", EDITS)
@observes(*every("--out", "--out-dir", "--overwrite", "--report"))
def test_files(edit, run, tmp_path, capsys):
    """The picture, the edited images and the report are where they are named."""
    out, folder, report = (tmp_path / name for name in ("a/b.png", "images", "report.md"))
    words = f"--out-dir {folder} --report {report} --num 4"
    edited(run, edit, words, out=out)
    assert Image.open(out).size[0] > 100
    assert "4 " in report.read_text() or "2 pairs" in report.read_text()
    files = sorted(folder.iterdir())
    assert len(files) == {"interpolate": 2 * 3}.get(edit, 4)  # the ends of pairs are encoded too
    assert {np.asarray(Image.open(path)).shape for path in files} == {SHAPE[:2]}
    for path in files:
        path.write_text("another")
    with pytest.raises(SystemExit):
        edited(run, edit, words, out=out)
    assert {path.read_text() for path in files} == {"another"}
    edited(run, edit, words, "--overwrite", out=out)
    assert {np.asarray(Image.open(path)).max() for path in files} == {128}


@observes("edit reconstruct --steps", "edit interpolate --steps", "edit interpolate --between")
def test_encoding(run):
    """Images are encoded and decoded in so many steps, with so many images between."""
    found = [each.plan for each in edited(run, "reconstruct", "--steps 3,6")]
    expected = []
    for steps in (3, 6):
        t = schedule.linspace(LEVELS, steps)
        expected += [sampler.encode(LEVELS, t), sampler.ddim(LEVELS, t)]
    assert [is_same(*pair) for pair in zip(found, expected, strict=True)] == [True] * 4
    found = [each.plan for each in edited(run, "interpolate", "--steps 5 --between 3")]
    t = schedule.linspace(LEVELS, 5)
    expected = [sampler.encode(LEVELS, t)] * 2 + [sampler.ddim(LEVELS, t)] * 5
    assert [is_same(*pair) for pair in zip(found, expected, strict=True)] == [True] * 7


@observes(
    "edit vary --start", "edit vary --steps", "edit vary --eta", "edit vary --guidance",
    "edit vary --seed",
)  # fmt: skip
def test_vary(run):
    """Images are noised up to each level by the seed, and sampled from there by DDIM."""
    words = "--start 8,16 --steps 10 --eta 0.4 --guidance 2.5 --condition 3 --seed 21 --num 5"
    found = edited(run, "vary", words)
    x, _ = images_of(run, "inpaint", "--num 5")
    for each, (level, steps) in zip(found, [(8, 4), (16, 8)], strict=True):
        plan = sampler.ddim(LEVELS, trailing_from(LEVELS, level, steps), 0.4)
        assert is_same(each.plan, plan)
        noise = noise_of(21, 5)
        start = plan.level.alpha[0] * x + plan.level.sigma[0] * noise
        assert np.allclose(each.request.x, start, atol=1e-5)
        assert (each.request.seed, each.request.guidance.scale) == (21, 2.5)
        assert each.request.condition.tolist() == [3] * 5


@observes("edit vary --variants", "edit inpaint --variants")
@pytest.mark.parametrize("edit", ["vary", "inpaint"])
def test_variants(edit, run):
    """So many variants of each image, each from the next seed."""
    found = edited(run, edit, "--num 3 --seed 30 --variants 4")
    assert [each.request.seed for each in found] == [30, 31, 32, 33]
    assert [each.request.num for each in found] == [3] * 4


def noise_of(seed, num):
    keys = sampler.image_keys(jax.random.key(seed), np.arange(num))
    return np.asarray(sampler.noise(keys, SHAPE))


@observes(
    "edit inpaint --mask", "edit inpaint --steps", "edit inpaint --eta", "edit inpaint --resample",
    "edit inpaint --guidance", "edit inpaint --seed",
)  # fmt: skip
def test_inpaint(run, tmp_path):
    """The part is generated by DDIM, whose steps are repeated."""
    words = "--steps 5 --eta 0.3 --resample 3 --guidance 1.5 --condition 3 --seed 22 --num 4"
    (found,) = edited(run, "inpaint", "--mask bottom", words)
    plan = sampler.ddim(LEVELS, schedule.trailing(LEVELS, 5), 0.3)
    assert is_same(found.plan, solvers.repaint(plan, 3))
    assert (found.request.seed, found.request.guidance.scale) == (22, 1.5)
    unknown = {
        "left": np.s_[:, :4], "right": np.s_[:, 4:], "top": np.s_[:4], "bottom": np.s_[4:],
        "center": np.s_[2:6, 2:6],
    }  # fmt: skip
    white = np.zeros((8, 8), np.uint8)
    white[1:3, 5:] = 255
    Image.fromarray(white).save(tmp_path / "mask.png")
    for name, part in {**unknown, tmp_path / "mask.png": np.s_[1:3, 5:]}.items():
        mask = np.ones((8, 8))
        mask[part] = 0
        (found,) = edited(run, "inpaint", "--num 2 --mask", name)
        assert np.array_equal(
            found.request.inpaint[1], np.broadcast_to(mask[..., None], (2, *SHAPE))
        )
