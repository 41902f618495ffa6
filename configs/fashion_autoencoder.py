"""An autoencoder of Fashion-MNIST, from 32x32 grey images to latents of 8x8x4.

    apt-get install dataset-fashion-mnist
    diffjax train fashion_autoencoder --workdir runs/fashion-autoencoder
    diffjax evaluate runs/fashion-autoencoder

The images are files of MNIST's format, padded to 32x32; `--data.path` names another folder of them.
Hardware: two CPU cores; a step takes 0.85 seconds of CPU time.
Expected: not measured yet (`make fashion`).
"""

from diffjax.config import Config, Data, Train
from diffjax.nn.autoencoder import AutoencoderConfig

config = Config(
    data=Data(source="idx", path="/usr/share/datasets/fashion-mnist", pad=2, conditions=()),
    network=AutoencoderConfig(channels=(8, 16, 64), blocks=1, norm_groups=4),
    train=Train(
        steps=2500,
        batch=64,
        learning_rate=2e-3,
        warmup=100,
        ema=(0.99,),
        save_every=500,
        eval_every=500,
        preview_every=500,
    ),
)
