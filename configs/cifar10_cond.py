"""CIFAR-10, class-conditional: DDPM's recipe with dropout of labels.

    diffjax train cifar10_cond --workdir runs/cifar10-cond

Hardware: as `cifar10`, a TPU pod slice or several GPUs.
Expected: not measured yet, and no paper trains exactly this; a step costs as much as one of
`cifar10`. For scale, classifier-free guidance was published on ImageNet (arXiv:2207.12598, tables 1
and 2).
"""

import dataclasses

from diffjax.config import load_config

cifar10 = load_config("cifar10")
config = dataclasses.replace(cifar10, data=dataclasses.replace(cifar10.data, conditions=("label",)))
