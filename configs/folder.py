"""A folder of image files at 64x64, with one sub-folder per class.

    diffjax train folder --data.path images --workdir runs/mine
    diffjax train folder --data.path images --data.conditions --workdir runs/mine

The second, with an empty list of conditions, is for a folder without sub-folders, or to ignore its
classes.
Hardware: one GPU or several; `--network.channels`, `--data.size` and `--train.batch` are what to
change first.
Expected: no figure, since the images are yours. It is DDPM's recipe at this size (arXiv:2006.11239,
appendix B).
"""

from diffjax.config import Config, Data, Train
from diffjax.nn.unet import UNetConfig

config = Config(
    data=Data(source="folder", path="images", size=64, flip=True),
    network=UNetConfig(
        channels=96,
        multipliers=(1, 2, 2, 4),
        blocks=2,
        attention=(16, 8),
        head_width=32,
        dropout=0.1,
    ),
    train=Train(
        steps=200_000,
        batch=64,
        learning_rate=1e-4,
        warmup=2000,
        decay="none",
        ema=(0.9999,),
        log_every=100,
        eval_every=2000,
        preview_every=2000,
        save_every=2000,
    ),
)
