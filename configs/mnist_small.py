"""MNIST, class-conditional, with a network of less than a million parameters.

    python train.py mnist_small --workdir runs/mnist

Hardware: one GPU, or a TPU core. Two CPU cores take about a third of a second a step.
Expected: clear digits after a few thousand steps; its metrics have not been measured yet.
"""

from diffjax.experiment import Config, Data, Network, Train

config = Config(
    data=Data(name="mnist"),
    network=Network(channels=32, multipliers=(1, 1, 2), blocks=1, attention=(8,), heads=4, norm_groups=8),
    train=Train(steps=20_000, batch=128, learning_rate=1e-3, warmup=500, save_every=1000, eval_every=1000),
)
