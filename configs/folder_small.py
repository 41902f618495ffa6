"""A folder of images at 32x32 with a small network, for a first try on a CPU.

    diffjax train folder_small --data.path images --workdir runs/try
    diffjax train folder_small --data.path images --data.conditions --workdir runs/try

The second, with an empty list of conditions, is for a folder without sub-folders, or to ignore its
classes.
Hardware: two CPU cores, at about half the time a step of `mnist_small`: half an hour.
Expected: no figure, since the images are yours; previews show whether colours and shapes are
learned, and `folder` is for what comes after.
"""

from diffjax.config import Config, Data, Train
from diffjax.nn.unet import UNetConfig

config = Config(
    data=Data(source="folder", path="images", size=32, flip=True),
    network=UNetConfig(
        channels=32, multipliers=(1, 1, 2), blocks=1, attention=(8,), heads=4, norm_groups=8
    ),
    train=Train(
        steps=3000,
        batch=32,
        learning_rate=1e-3,
        warmup=200,
        eval_every=500,
        preview_every=500,
        save_every=500,
    ),
)
