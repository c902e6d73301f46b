"""A noise schedule that is trained."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import _random
from .._scalar import Scalar
from .schedule import Schedule

__all__ = ["LearnedSchedule"]


class LearnedSchedule(Schedule, nn.Module):
    """Variance preserving, lambda(t) by a network that can only fall:

        lambda(t) = first - drop (n(t) - n(0)) / (n(1) - n(0)),    drop > 0
        n(t) = t + sum_k h_k sigmoid(r_k t - c_k),                 h_k, r_k > 0

    The ends and all of h, r, c are parameters; at the start lambda is all but straight. Where they
    ask for a gradient and one is recorded, results at host floats are 0-d tensors that carry it.

    Args:
        first, last: lambda at t = 0 and at t = 1.
        width: number of sigmoids.

    Source: Kingma et al. 2021, "Variational diffusion models", arXiv 2107.00630, appendix H.
    """

    def __init__(self, first: float = 6.65, last: float = -2.5, width: int = 64) -> None:
        super().__init__()
        if not first > last:
            raise ValueError(f"lambda falls from first to last; got {first} to {last}")
        self.first = nn.Parameter(torch.tensor(first))
        self.log_drop = nn.Parameter(torch.tensor(math.log(first - last)))
        self.log_rate = nn.Parameter(torch.full((width,), math.log(4.0)))
        self.center = nn.Parameter(torch.linspace(0.0, 4.0, width))
        self.log_height = nn.Parameter(torch.full((width,), -math.log(width)))

    def _network(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """n and its rate."""
        height, rate = self.log_height.exp(), self.log_rate.exp()
        part = (rate * t[..., None] - self.center).sigmoid()
        slope = height * rate * part * (1.0 - part)
        return t + (height * part).sum(-1), 1.0 + slope.sum(-1)

    def _lambda(self, t: Scalar) -> tuple[Tensor, Tensor]:
        """lambda and its rate."""
        if not isinstance(t, Tensor):
            device = self.first.device
            t = torch.tensor(t, dtype=_random.widest(device), device=device)
        value, rate = self._network(t)
        low, high = self._network(torch.arange(2, dtype=t.dtype, device=t.device))[0]
        scale = self.log_drop.exp() / (high - low)
        return self.first - scale * (value - low), -scale * rate

    def alpha(self, t: Scalar) -> Scalar:
        return _as(t, (2.0 * self._lambda(t)[0]).sigmoid().sqrt())

    def sigma(self, t: Scalar) -> Scalar:
        return _as(t, (-2.0 * self._lambda(t)[0]).sigmoid().sqrt())

    def dalpha(self, t: Scalar) -> Scalar:
        lam, rate = self._lambda(t)
        return _as(t, rate * (2.0 * lam).sigmoid().sqrt() * (-2.0 * lam).sigmoid())

    def dsigma(self, t: Scalar) -> Scalar:
        lam, rate = self._lambda(t)
        return _as(t, -rate * (-2.0 * lam).sigmoid().sqrt() * (2.0 * lam).sigmoid())

    def half_log_snr(self, t: Scalar) -> Scalar:
        return _as(t, self._lambda(t)[0])

    def time(self, lam: Scalar) -> Scalar:
        wide = _random.widest(self.first.device)
        wanted = torch.as_tensor(lam, dtype=wide, device=self.first.device)
        with torch.no_grad():
            low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
            for _ in range(24):
                middle = 0.5 * (low + high)
                early = self._lambda(middle)[0] > wanted
                low, high = torch.where(early, middle, low), torch.where(early, high, middle)
        t = 0.5 * (low + high)
        for _ in range(2):  # Newton's method, which makes the derivatives right as it converges
            value, rate = self._lambda(t)
            t = t - (value - wanted) / rate
        return _as(lam, t)


def _as(t: Scalar, value: Tensor) -> Scalar:
    """As t was given: a tensor of its kind, or a float unless a gradient would be lost."""
    if isinstance(t, Tensor):
        return value.to(t.dtype)
    return value if value.requires_grad else float(value)
