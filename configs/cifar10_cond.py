"""CIFAR-10, class-conditional: DDPM's recipe with a tenth of the labels withheld, so that it can be guided.

    diffjax train cifar10_cond --workdir runs/cifar10-cond

Hardware: as `cifar10`, a TPU pod slice or several GPUs.
Expected: not measured yet, and no paper trains just this; a step costs what one of `cifar10` costs. For scale,
classifier-free guidance was published on ImageNet (arXiv:2207.12598, tables 1 and 2).
"""

import dataclasses

from diffjax.config import Config, load_config

cifar10 = load_config("cifar10")
config: Config = dataclasses.replace(cifar10, data=dataclasses.replace(cifar10.data, labels=True))
