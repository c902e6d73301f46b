"""Natural-image patches, made of scikit-learn's two photographs as BSDS300 is made of its own.

Grey 8x8 patches, dequantised, on a scale of one, their means removed and a pixel dropped, since it
follows from the others: 63 numbers (Zoran and Weiss 2011; Papamakarios et al. 2017,
arXiv 1705.07057). The right quarter of each photograph is held out.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

__all__ = ["DIM", "SIDE", "image", "patches", "values"]

SIDE, DIM = 8, 63


def values() -> tuple[Tensor, Tensor]:
    """Grey levels 0 .. 255 of every second patch each way: ``(n, 64)`` to train on, and held out.

    Needs scikit-learn, and Pillow to read the photographs.
    """
    from sklearn.datasets import load_sample_images

    train, held = [], []
    for photograph in load_sample_images().images:
        grey = torch.tensor(photograph, dtype=torch.get_default_dtype()).mean(-1).round()
        cut = 3 * grey.shape[1] // 4
        for part, into in ((grey[:, :cut], train), (grey[:, cut:], held)):
            tiles = part.unfold(0, SIDE, 2).unfold(1, SIDE, 2)
            into.append(tiles.reshape(-1, SIDE * SIDE))
    return torch.cat(train), torch.cat(held)


def patches(values: Tensor, generator: Generator) -> Tensor:
    """``(n, 63)`` of grey levels ``(n, 64)``."""
    noise = torch.rand(values.shape, generator=generator, dtype=values.dtype)
    x = (values + noise) / 256.0
    return (x - x.mean(-1, keepdim=True))[:, :DIM]


def image(x: Tensor) -> Tensor:
    """``(n, 8, 8)`` of ``(n, 63)``: the dropped pixel makes the mean zero."""
    return torch.cat((x, -x.sum(-1, keepdim=True)), -1).reshape(-1, SIDE, SIDE)
