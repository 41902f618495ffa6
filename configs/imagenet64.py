"""ImageNet at 64x64, class-conditional, with ADM's network: 296 M parameters.

    diffjax train imagenet64 --workdir runs/imagenet64

Hardware: a TPU pod; ADM trained 540,000 steps of 2048 images (arXiv:2105.05233, table 11).
`diffjax dry-run imagenet64 --target v5e:16x16` estimates the step on 256 chips.
Expected: published is FID 2.07 in 250 steps (arXiv:2105.05233, table 4), with a learned variance,
which diffjax does not train. This run has not been repeated with diffjax yet. ADM has no dropout of
labels, which is for guidance.
"""

from diffjax.config import Config, Data, Diffusion, Train
from diffjax.nn.unet import UNetConfig

config = Config(
    data=Data(name="imagenet_resized/64x64", flip=True),
    network=UNetConfig(
        channels=192,
        multipliers=(1, 2, 3, 4),
        blocks=3,
        attention=(32, 16, 8),
        head_width=64,
        resample_blocks=True,
        norm_groups=32,
        norm_epsilon=1e-5,
        dropout=0.1,
        dtype="bfloat16",
        remat=True,
    ),
    diffusion=Diffusion(schedule="cosine"),
    train=Train(
        steps=540_000,
        batch=2048,
        learning_rate=3e-4,
        warmup=5000,
        decay="none",
        ema=(0.9999,),
        log_every=100,
        parallel="shard_map",
        eval_every=5000,
        preview_every=5000,
        save_every=5000,
    ),
)
