"""CIFAR-10, unconditional, with EDM's training: 57,443,075 parameters.

    diffjax train cifar10_edm --workdir runs/cifar10_edm
    diffjax sample runs/cifar10_edm --sampler "heun(spacing=karras):18"

Hardware: a TPU pod slice or several GPUs; EDM trained 390,625 steps of 512 images on 8 V100s
(arXiv:2206.00364, appendix F). `diffjax dry-run cifar10_edm --target v5e:2x4` estimates the step on
eight chips.
Expected: not measured yet. Published is FID 1.97 in 35 evaluations (arXiv:2206.00364, table 2),
with the network DDPM++ and an augmentation of geometric changes, of which only the mirror is here.
"""

from diffjax.config import Config, Data, Diffusion, Train
from diffjax.nn.unet import UNetConfig

config = Config(
    data=Data(name="cifar10", conditions=(), flip=True),
    network=UNetConfig(
        channels=128,
        multipliers=(2, 2, 2),
        blocks=4,
        attention=(16,),
        norm_groups=32,
        norm_epsilon=1e-6,
        dropout=0.13,
    ),
    diffusion=Diffusion(schedule="edm", prediction="edm", sigma_data=0.5),
    train=Train(
        steps=390_625,
        batch=512,
        learning_rate=1e-3,
        warmup=19_531,
        decay="none",
        clip=1.0,
        ema=(0.9993,),
        weighting="edm",
        times="log_normal",
        times_mean=-1.2,
        times_std=1.2,
        log_every=100,
        eval_every=5000,
        preview_every=5000,
        save_every=5000,
    ),
)
