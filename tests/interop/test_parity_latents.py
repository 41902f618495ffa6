"""DiT, AutoencoderKL and whole pipelines against diffusers, where it is installed.

max|difference| / max|output| is printed, and at most 2e-4 in float32 with full matmul precision.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffjax import sampler, schedule
from diffjax.build import build_module
from diffjax.cli import main
from diffjax.inference.guidance import Guidance
from diffjax.inference.model import load_model
from diffjax.inference.pipeline import Pipeline, Request
from diffjax.interop import autoencoder_kl, hub

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def diffusers():
    """diffusers, with random numbers of one seed."""
    library = pytest.importorskip("diffusers", reason="the parity extra is not installed")
    pytest.importorskip("torch").manual_seed(0)
    library.utils.logging.set_verbosity_error()
    return library


def randomize(model):
    """Change all parameters, of which many are zeros or ones at first."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def share_embedders(model):
    """Published files have one embedding in all blocks."""
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model


def to_torch(x):
    import torch

    return torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2)


def from_torch(x):
    return x.permute(0, 2, 3, 1).numpy()


def compare(name, ours, theirs, largest=2e-4):
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"{name}: {error:.1e} of the largest")
    assert ours.shape == theirs.shape
    assert error <= largest


# ----------------------------------------------------------------------------- DiT

DIT = {
    "2 heads of 8, patch 2, 8x8x4": {},
    "1 head of 12, patch 4": {
        "num_attention_heads": 1, "attention_head_dim": 12, "patch_size": 4,
    },
    "4 heads of 18, learned variance": {
        "num_attention_heads": 4, "attention_head_dim": 18, "out_channels": 8,
    },
    "patch 8, 16x16x3, 3 classes": {
        "patch_size": 8, "sample_size": 16, "in_channels": 3, "num_embeds_ada_norm": 3,
    },
    "patch 1, 4x4x8, norms of 1e-6": {
        "patch_size": 1, "sample_size": 4, "in_channels": 8, "norm_eps": 1e-6,
    },
    "5 blocks, 16x16x4, 1000 classes": {
        "num_layers": 5, "sample_size": 16, "num_embeds_ada_norm": 1000,
    },
}  # fmt: skip
TINY_DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
}


@pytest.mark.parametrize("name", DIT)
def test_dit_here_and_back(diffusers, tmp_path, name):
    import torch

    model = share_embedders(randomize(diffusers.DiTTransformer2DModel(**TINY_DIT | DIT[name])))
    model.save_pretrained(tmp_path / "theirs")
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "theirs")
    if "1 head" in name:  # as it is published: under the old name, without norm_eps
        path = tmp_path / "theirs" / "config.json"
        config = json.loads(path.read_text()) | {"_class_name": "Transformer2DModel"}
        del config["norm_eps"]
        path.write_text(json.dumps(config))
    found = hub.load(tmp_path / "theirs")
    info, module = found.info, build_module(found.info)
    r, classes = np.random.default_rng(0), info.conditioning.classes
    x, t = r.normal(size=(3, *info.x_shape)).astype(np.float32), np.array([0, 500, 999])
    label = np.array([0, classes - 1, classes])
    with jax.default_matmul_precision("highest"):
        inputs = {"params": found.params}, x, jnp.asarray(t), label
        ours = np.asarray(jax.jit(module.apply)(*inputs))
    hub.save(tmp_path / "back", info, found.params, found.weights, found.step)
    back = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "back").eval()
    for folder, again in (("theirs", model), ("back", back)):
        with torch.no_grad():
            output = again(to_torch(x), torch.from_numpy(t), torch.from_numpy(label)).sample
        compare(f"DiT, {name}, {folder}", ours, from_torch(output))


# ----------------------------------------------------------------------------- autoencoders

AUTOENCODERS = {
    "2 levels of 8 and 16": {},
    "4 levels, 2 blocks, grey": {
        "block_out_channels": (8, 8, 16, 16), "layers_per_block": 2, "in_channels": 1,
        "out_channels": 1,
    },
    "1 level, 3 latent channels": {"block_out_channels": (16,), "latent_channels": 3},
    "no attention": {"mid_block_add_attention": False},
    "no quant convolutions": {"use_quant_conv": False, "use_post_quant_conv": False},
    "shifted, 16 latent channels": {
        "shift_factor": 0.1159, "scaling_factor": 0.3611, "latent_channels": 16,
        "use_quant_conv": False,
    },
    "3 levels, names and shapes of 2022": {"block_out_channels": (8, 16, 32)},
}  # fmt: skip


def make_autoencoder(diffusers, **fields):
    levels = len(fields.get("block_out_channels", (8, 16)))
    given = {
        "block_out_channels": (8, 16),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": 4,
    }
    return randomize(diffusers.AutoencoderKL(**given | fields))


def write_old_names(folder):
    """The attention layers of files of 2022: other names, and convolutions of 1x1."""
    tensors, old = {}, {}
    for name, value in load_file(folder / WEIGHTS).items():
        words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        new = name
        for now, before in words.items():
            new = new.replace(f".{now}.", f".{before}.")
        changed = value[:, :, None, None] if new != name and value.ndim == 2 else value
        tensors[new] = np.ascontiguousarray(changed)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    path = folder / "config.json"
    old = json.loads(path.read_text())
    for name in ("scaling_factor", "shift_factor", "latents_mean", "use_quant_conv"):
        del old[name]
    path.write_text(json.dumps(old))


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoder_here_and_back(diffusers, tmp_path, name):
    import torch

    model = make_autoencoder(diffusers, **AUTOENCODERS[name])
    model.save_pretrained(tmp_path / "theirs")
    if "2022" in name:
        write_old_names(tmp_path / "theirs")
    config, params = autoencoder_kl.load(tmp_path / "theirs")
    assert config.scaling == model.config.scaling_factor
    assert config.shift == (model.config.shift_factor or 0)
    channels = model.config.in_channels
    x = np.random.default_rng(0).uniform(-1, 1, (2, 24, 16, channels)).astype(np.float32)
    module = config.build(x.shape[1:])
    with jax.default_matmul_precision("highest"):
        moments = module.apply({"params": params}, x, method="encode")
        latents = np.array(moments[..., : config.latent_channels])
        images = np.asarray(module.apply({"params": params}, latents, method="decode"))
    autoencoder_kl.save(tmp_path / "back", config, params)
    back = diffusers.AutoencoderKL.from_pretrained(tmp_path / "back").eval()
    for folder, again in (("theirs", model), ("back", back)):
        with torch.no_grad():
            posterior = again.encode(to_torch(x)).latent_dist
            theirs = torch.cat([posterior.mean, posterior.logvar], dim=1)
            decoded = again.decode(to_torch(latents)).sample
        compare(f"AutoencoderKL, {name}, moments, {folder}", moments, from_torch(theirs))
        compare(f"AutoencoderKL, {name}, images, {folder}", images, from_torch(decoded))


# ----------------------------------------------------------------------------- pipelines


def run_theirs(pipe, latents, labels, monkeypatch):
    """The final latents, and the images of 0..255, of guided DDIM in 10 steps."""
    import diffusers.pipelines.dit.pipeline_dit as module

    found, decode = [], pipe.vae.decode
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: to_torch(latents))
    monkeypatch.setattr(pipe.vae, "decode", lambda z: (found.append(z), decode(z))[1])
    pipe.set_progress_bar_config(disable=True)
    images = pipe(labels, guidance_scale=4.0, num_inference_steps=10, output_type="np").images
    return from_torch(found[0]) * pipe.vae.config.scaling_factor, 255 * images


def run_ours(source, latents, labels):
    """Sample from a source at the levels of diffusers' DDIM, by leading spacing."""
    model = load_model(source)
    plan = sampler.ddim(model.schedule, schedule.leading(model.schedule, 10))
    request = Request(
        num=len(latents), batch=8, seed=0, condition=np.array(labels, np.int32),
        guidance=Guidance(4.0), x=latents,
    )  # fmt: skip
    with jax.default_matmul_precision("highest"):
        samples = Pipeline.for_model(model)(model.params, plan, request)
    return samples.x, samples.images


def check_pipelines(name, ours, theirs):
    compare(f"DiTPipeline, {name}, latents of DDIM-10", ours[0], theirs[0], 1e-3)
    away = np.abs(ours[1] - theirs[1]).max()
    print(f"DiTPipeline, {name}, images: within {away:.2f} of 255")
    assert away <= 2


def test_whole_pipeline_here_and_back(diffusers, tmp_path, monkeypatch):
    """Guided from the same latents: theirs here, ours there, through a run folder."""
    transformer = diffusers.DiTTransformer2DModel(
        **TINY_DIT | {"num_embeds_ada_norm": 1000, "out_channels": 8}
    )
    pipe = diffusers.DiTPipeline(
        share_embedders(randomize(transformer)),
        make_autoencoder(diffusers),
        diffusers.DDIMScheduler(clip_sample=False),
    )
    pipe.save_pretrained(tmp_path / "theirs")
    index = tmp_path / "theirs" / "model_index.json"  # published ones have the names of classes
    names = {"id2label": {str(i): f"name {i}, other {i}" for i in range(1000)}}
    index.write_text(json.dumps(json.loads(index.read_text()) | names))
    labels = [207, 3, 999]
    latents = np.random.default_rng(0).normal(size=(3, 8, 8, 4)).astype(np.float32)
    theirs = run_theirs(pipe, latents, labels, monkeypatch)
    ours = run_ours(f"hf:{tmp_path / 'theirs'}", latents, labels)
    check_pipelines("theirs here", ours, theirs)
    conditioning = load_model(f"hf:{tmp_path / 'theirs'}").info.conditioning
    assert conditioning.parse("name 207, other 207,3,other 999", 3).tolist() == labels
    main(["convert", f"hf:{tmp_path / 'theirs'}", str(tmp_path / "run")])
    check_pipelines("their run", run_ours(tmp_path / "run", latents, labels), theirs)
    main(["convert", str(tmp_path / "run"), f"hf:{tmp_path / 'back'}"])
    back = diffusers.DiTPipeline.from_pretrained(tmp_path / "back")
    assert back.get_label_ids(["other 207"]) == [207]
    back.scheduler = pipe.scheduler  # ours has the trailing spacing
    check_pipelines("back", ours, run_theirs(back, latents, labels, monkeypatch))


def test_our_classes_in_their_pipeline(diffusers, tmp_path, monkeypatch):
    """A network of 3 classes: its null label is where DiTPipeline takes it, at 1000."""
    transformer = diffusers.DiTTransformer2DModel(**TINY_DIT | {"num_embeds_ada_norm": 3})
    share_embedders(randomize(transformer)).save_pretrained(tmp_path / "theirs")
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "theirs")
    make_autoencoder(diffusers).save_pretrained(tmp_path / "vae")
    found = hub.load(tmp_path / "theirs")
    coder = autoencoder_kl.load(tmp_path / "vae")
    hub.save(tmp_path / "ours", found.info, found.params, "ema", 5, coder)
    pipe = diffusers.DiTPipeline.from_pretrained(tmp_path / "ours")
    pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    latents = np.random.default_rng(0).normal(size=(3, 8, 8, 4)).astype(np.float32)
    labels = [2, 0, 1]
    ours = run_ours(f"hf:{tmp_path / 'ours'}", latents, labels)
    check_pipelines("3 classes", ours, run_theirs(pipe, latents, labels, monkeypatch))
    again = load_model(f"hf:{tmp_path / 'ours'}")
    assert (again.info.conditioning.classes, again.weights, again.step) == (3, "ema", 5)
