"""The configuration `cifar10` by the name of its paper.

    diffjax train ddpm_cifar10 --workdir runs/cifar10

Hardware: as `cifar10`.
Expected: as `cifar10` (arXiv:2006.11239, table 1).
"""

from diffjax.config import load_config

config = load_config("cifar10")
