"""Fashion-MNIST in pixels, with DDPM's process: a UNet for CPUs.

    apt-get install dataset-fashion-mnist
    diffjax train fashion_unet --workdir runs/fashion-unet

The network has less than a million parameters. The images are files of MNIST's format, padded to
32x32; `--data.path` names another folder of them.
Hardware: two CPU cores, at about 0.8 seconds a step.
Expected: not measured yet (`make fashion`).
"""

from diffjax.config import Config, Data, Train
from diffjax.nn.unet import UNetConfig

config = Config(
    data=Data(source="idx", path="/usr/share/datasets/fashion-mnist", pad=2),
    network=UNetConfig(
        channels=32, multipliers=(1, 1, 2), blocks=1, attention=(8,), heads=4, norm_groups=8
    ),
    train=Train(
        steps=3000, batch=64, learning_rate=1e-3, warmup=300, save_every=500, eval_every=500
    ),
)
