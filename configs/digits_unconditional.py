"""scikit-learn's 8x8 handwritten digits without their labels: no classes, no guidance.

    diffjax train digits_unconditional --workdir runs/digits-unconditional

Hardware: two CPU cores, about three minutes.
Expected: a held-out loss near 0.086, and samples most of which are digits.
"""

import dataclasses

from diffjax.config import Config, load_config

digits = load_config("digits")
config: Config = dataclasses.replace(digits, data=dataclasses.replace(digits.data, labels=False))
