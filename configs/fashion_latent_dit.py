"""Fashion-MNIST in the latents of an autoencoder, with flow matching: a small DiT.

    diffjax train fashion_autoencoder --workdir runs/fashion-autoencoder
    diffjax encode runs/fashion-autoencoder --out runs/fashion-latents
    diffjax train fashion_latent_dit --workdir runs/fashion-latent-dit
    diffjax sample runs/fashion-latent-dit --sampler "ddim:50" --guidance 2 --num 30

The latents are 8x8x4; `--data.path` names another folder of them.
Hardware: two CPU cores.
Expected: not measured yet (`make fashion`).
"""

from diffjax.config import Config, Data, Diffusion, Train
from diffjax.nn.dit import DiTConfig

config = Config(
    data=Data(source="latents", path="runs/fashion-latents"),
    network=DiTConfig(width=160, depth=6, heads=4, patch=1, frequency_shift=1.0),
    diffusion=Diffusion(schedule="flow", prediction="flow"),
    train=Train(
        steps=4000,
        batch=64,
        learning_rate=1e-3,
        warmup=300,
        times="log_normal",
        save_every=500,
        eval_every=500,
    ),
)
