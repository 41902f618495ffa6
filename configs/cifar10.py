"""CIFAR-10, unconditional, with DDPM's recipe: 35,746,307 parameters.

    diffjax train cifar10 --workdir runs/cifar10

Hardware: a TPU pod slice or several GPUs; DDPM trained 800,000 steps of 128 images on a TPU v3-8 in
10.6 hours (arXiv:2006.11239, appendix B). `diffjax dry-run cifar10 --target v5e:2x2` estimates the
step on four chips.
Expected: published are FID 3.17 and inception score 9.46 (arXiv:2006.11239, table 1). This run has
not been repeated with diffjax yet.
"""

from diffjax.config import Config, Data, Train
from diffjax.nn.unet import UNetConfig

config = Config(
    data=Data(name="cifar10", conditions=(), flip=True),
    network=UNetConfig(
        channels=128,
        multipliers=(1, 2, 2, 2),
        blocks=2,
        attention=(16,),
        scale_shift=False,
        sin_first=True,
        frequency_shift=1,
        norm_groups=32,
        dropout=0.1,
    ),
    train=Train(
        steps=800_000,
        batch=128,
        learning_rate=2e-4,
        warmup=5000,
        decay="none",
        clip=1.0,
        ema=(0.9999,),
        log_every=100,
        eval_every=5000,
        preview_every=5000,
        save_every=5000,
    ),
)
