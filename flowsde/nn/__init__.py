"""Networks for the fields: small, plain, and at home with 0-d and ``(batch,)`` times."""

from .convolution import ConvNet
from .embedding import FourierTime
from .lipschitz import LipschitzMLP
from .masked import MaskedMLP
from .mlp import MLP, ConcatSquash, TimeMLP
from .unet import UNet

__all__ = [
    "MLP",
    "ConcatSquash",
    "ConvNet",
    "FourierTime",
    "LipschitzMLP",
    "MaskedMLP",
    "TimeMLP",
    "UNet",
]
