"""MNIST, class-conditional, padded from 28x28 to 32x32.

For CPUs there is `mnist_small`.

    diffjax train mnist --workdir runs/mnist

Hardware: one GPU, or a TPU core.
Expected: not measured yet. The images are those of http://yann.lecun.com/exdb/mnist, from
tensorflow-datasets.
"""

from diffjax.config import Config, Data, Train
from diffjax.nn.unet import UNetConfig

config = Config(
    data=Data(name="mnist", pad=2),
    network=UNetConfig(
        channels=64, multipliers=(1, 2, 2), blocks=2, attention=(8,), heads=4, dropout=0.1
    ),
    train=Train(
        steps=30_000,
        batch=128,
        learning_rate=5e-4,
        warmup=1000,
        ema=(0.9995,),
        log_every=100,
        eval_every=1000,
        preview_every=1000,
        save_every=1000,
    ),
)
