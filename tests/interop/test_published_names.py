"""The names of published tensors, in which a mistake made both ways would not show."""

import jax
import numpy as np
from safetensors.numpy import load_file

from diffjax.build import ModelInfo, abstract_params, build_module
from diffjax.config import Config
from diffjax.interop import hub
from diffjax.nn.conditioning import UNCONDITIONAL
from diffjax.nn.unet import UNetConfig


def published_layers():
    """The tensors of diffusers' UNet2DModel of two levels, 8 and 16 wide, attention in the second.

    Written down from its source: (out, in, height, width) of a convolution, (out, in) of a layer.
    """

    def resnet(name, inside, outside):
        found = {f"{name}.norm1": (inside,), f"{name}.conv1": (outside, inside, 3, 3)}
        found |= {f"{name}.time_emb_proj": (outside, 32), f"{name}.norm2": (outside,)}
        found |= {f"{name}.conv2": (outside, outside, 3, 3)}
        shortcut = {f"{name}.conv_shortcut": (outside, inside, 1, 1)}
        return found | (shortcut if inside != outside else {})

    def attention(name, width):
        names = ("to_q", "to_k", "to_v", "to_out.0")
        return {f"{name}.group_norm": (width,)} | {f"{name}.{n}": (width, width) for n in names}

    return {
        "conv_in": (8, 1, 3, 3),
        "time_embedding.linear_1": (32, 8),
        "time_embedding.linear_2": (32, 32),
        **resnet("down_blocks.0.resnets.0", 8, 8),
        "down_blocks.0.downsamplers.0.conv": (8, 8, 3, 3),
        **resnet("down_blocks.1.resnets.0", 8, 16),
        **attention("down_blocks.1.attentions.0", 16),
        **resnet("mid_block.resnets.0", 16, 16),
        **attention("mid_block.attentions.0", 16),
        **resnet("mid_block.resnets.1", 16, 16),
        **resnet("up_blocks.0.resnets.0", 16 + 16, 16),
        **resnet("up_blocks.0.resnets.1", 16 + 8, 16),
        **attention("up_blocks.0.attentions.0", 16),
        **attention("up_blocks.0.attentions.1", 16),
        "up_blocks.0.upsamplers.0.conv": (16, 16, 3, 3),
        **resnet("up_blocks.1.resnets.0", 16 + 8, 8),
        **resnet("up_blocks.1.resnets.1", 8 + 8, 8),
        "conv_norm_out": (8,),
        "conv_out": (1, 8, 3, 3),
    }


def test_published_names(tmp_path):
    """A file has the names and shapes of diffusers."""
    network = UNetConfig(
        channels=8,
        multipliers=(1, 2),
        blocks=1,
        attention=(4,),
        head_width=4,
        norm_groups=2,
        scale_shift=False,
    )
    info = ModelInfo(Config(network=network), (8, 8, 1), UNCONDITIONAL)
    params = jax.tree.map(
        lambda leaf: np.ones(leaf.shape), abstract_params(info, build_module(info))
    )
    hub.save(tmp_path, info, params, "ema", 7)
    (file,) = tmp_path.rglob("*.safetensors")
    tensors = load_file(file)
    shapes = {name: value.shape for name, value in tensors.items() if name.endswith("weight")}
    assert shapes == {f"{name}.weight": shape for name, shape in published_layers().items()}
    biases = {name: value.shape for name, value in tensors.items() if name not in shapes}
    assert biases == {f"{name}.bias": shape[:1] for name, shape in published_layers().items()}
