"""Networks, and what they are conditioned on.

Importing this package registers the networks that come with diffjax.
"""

from diffjax._lazy import modules_of
from diffjax.nn import autoencoder, dit, unet

__all__ = ["autoencoder", "dit", "unet"]

__getattr__, __dir__ = modules_of(__name__, __path__)
