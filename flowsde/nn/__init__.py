"""Networks for the fields: small, plain, and at home with 0-d and ``(batch,)`` times."""

from .conv import ConvConcatSquash, ConvNet
from .embedding import FourierTime
from .lipschitz import LipschitzMLP
from .masked import MaskedMLP
from .mlp import MLP, ConcatSquash, TimeGates, TimeMLP
from .unet import UNet

__all__ = [
    "MLP", "ConcatSquash", "ConvConcatSquash", "ConvNet", "FourierTime", "LipschitzMLP",
    "MaskedMLP", "TimeGates", "TimeMLP", "UNet",
]  # fmt: skip
