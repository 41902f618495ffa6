"""Networks, and what they are conditioned on.

Importing this package registers the networks that come with diffjax.
"""

from diffjax.nn import unet

__all__ = ["unet"]
