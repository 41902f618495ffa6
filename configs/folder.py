"""A folder of your images at 64x64: PNG, JPEG or WebP, its sub-folders the classes.

    diffjax train folder --data.path images --workdir runs/mine
    diffjax train folder --data.path images --data.no-labels --workdir runs/mine

The second is for a folder without sub-folders, or to train without the classes that it has.
Hardware: one GPU, or several; `--network.channels`, `--data.size` and `--train.batch` are what to change first.
Expected: no figure, the images being yours. DDPM's recipe at this size (arXiv:2006.11239, appendix B) is its start.
"""

from diffjax.config import Config, Data, Train, UNetConfig

config = Config(
    data=Data(source="folder", path="images", size=64, flip=True),
    network=UNetConfig(channels=96, multipliers=(1, 2, 2, 4), blocks=2, attention=(16, 8), head_width=32, dropout=0.1),
    train=Train(
        steps=200_000, batch=64, learning_rate=1e-4, warmup=2000, decay="none", ema=(0.9999,), log_every=100,
        eval_every=2000, preview_every=2000, save_every=2000,
    ),
)  # fmt: skip
