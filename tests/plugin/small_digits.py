"""The digits and the smallest network, for programs that are started in processes."""

from diffjax.config import Config, Data
from diffjax.nn import registry
from tests.plugin.small import SmallConfig

registry.register("small", SmallConfig)
config = Config(data=Data(name="digits"), network=SmallConfig())
