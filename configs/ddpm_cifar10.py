"""The configuration `cifar10` by the name of its paper.

    python train.py ddpm_cifar10 --workdir runs/cifar10

Hardware: as `cifar10`.
Expected: as `cifar10` (arXiv:2006.11239, table 1).
"""

from configs.cifar10 import config

__all__ = ["config"]
