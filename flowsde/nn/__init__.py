"""Networks for the fields: small, plain, and at home with 0-d and ``(batch,)`` times."""

from .conv import ConvConcatSquash
from .embedding import FourierTime
from .mlp import MLP, ConcatSquash, TimeGates, TimeMLP
from .unet import UNet

__all__ = ["MLP", "ConcatSquash", "ConvConcatSquash", "FourierTime", "TimeGates", "TimeMLP", "UNet"]
