"""The configuration `imagenet64` by the name of its paper.

    python train.py adm_imagenet64 --workdir runs/imagenet64

Hardware: as `imagenet64`.
Expected: as `imagenet64` (arXiv:2105.05233, table 4).
"""

from configs.imagenet64 import config

__all__ = ["config"]
