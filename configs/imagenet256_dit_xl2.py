"""ImageNet at 256x256 in latents of 32x32x4, with DiT-XL/2: 675 M parameters.

    diffjax encode hf:AUTOENCODER --data.config images.py --mirror --out latents
    diffjax train imagenet256_dit_xl2 --data.path latents --workdir runs/imagenet256

AUTOENCODER is one of the hub, as stabilityai/sd-vae-ft-ema; images.py is a configuration of a
folder of images, as `folder` with data.size 256. The network is class-conditional.
Hardware: a TPU pod; DiT trained 7,000,000 steps of 256 images (arXiv:2212.09748, section 5.1).
`diffjax dry-run imagenet256_dit_xl2 --target v5e:16x16 --x-shape 32,32,4 --classes 1000` estimates
the step on 256 chips, without data.
Expected: published are FID 9.62, and 2.27 with guidance scale 1.5, in 250 steps (arXiv:2212.09748,
table 2), with a learned variance, which diffjax does not train: this network has none, and
674,816,272 parameters. This run has not been repeated with diffjax yet.
"""

from diffjax.config import Config, Data, Train
from diffjax.nn.dit import dit

config = Config(
    data=Data(source="latents", path="latents", flip=True),
    network=dit("XL", patch=2, dtype="bfloat16", remat=True, scan=True),
    train=Train(
        steps=7_000_000,
        batch=256,
        learning_rate=1e-4,
        warmup=0,
        decay="none",
        ema=(0.9999,),
        condition_dropout=0.1,
        log_every=100,
        parallel="shard_map",
        eval_every=10_000,
        preview_every=10_000,
        save_every=10_000,
    ),
)
