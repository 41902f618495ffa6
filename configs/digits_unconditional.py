"""scikit-learn's 8x8 handwritten digits, unconditional: no labels, no guidance.

    diffjax train digits_unconditional --workdir runs/digits-unconditional

Hardware: two CPU cores, about three minutes.
Expected: a held-out loss near 0.086, and samples most of which are digits.
"""

import dataclasses

from diffjax.config import load_config

digits = load_config("digits")
config = dataclasses.replace(digits, data=dataclasses.replace(digits.data, conditions=()))
