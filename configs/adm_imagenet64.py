"""The configuration `imagenet64` by the name of its paper.

    diffjax train adm_imagenet64 --workdir runs/imagenet64

Hardware: as `imagenet64`.
Expected: as `imagenet64` (arXiv:2105.05233, table 4).
"""

from diffjax.config import load_config

config = load_config("imagenet64")
