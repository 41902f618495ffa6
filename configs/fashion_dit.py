"""Fashion-MNIST in pixels with flow matching: a small DiT.

    apt-get install dataset-fashion-mnist
    diffjax train fashion_dit --workdir runs/fashion-dit

The network predicts eps - x0 on the path alpha = 1 - sigma (arXiv:2209.03003), and levels are drawn
with a normal logsnr (arXiv:2403.03206).
Hardware: two CPU cores.
Expected: not measured yet (`make fashion`).
"""

from diffjax.config import Config, Data, Diffusion, Train
from diffjax.nn.dit import DiTConfig

config = Config(
    data=Data(source="idx", path="/usr/share/datasets/fashion-mnist", pad=2),
    network=DiTConfig(width=160, depth=6, heads=4, patch=4, frequency_shift=1.0),
    diffusion=Diffusion(schedule="flow", prediction="flow"),
    train=Train(
        steps=4000,
        batch=64,
        learning_rate=1e-3,
        warmup=300,
        times="log_normal",
        save_every=500,
        eval_every=500,
    ),
)
