"""A neural SDE that draws paths, and a neural CDE that judges them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..dynamics.differential import CDE, SDE
from ..integrators.explicit import Midpoint
from ..integrators.stochastic import StochasticHeun
from ..nn import MLP
from ..nn.lipschitz import LipSwish
from ..paths.control import Linear
from ..solve import Solver
from ..stepping import Fixed, Grid

__all__ = ["LipSwish", "PathDiscriminator", "PathGenerator"]


class PathGenerator(nn.Module):
    """Paths of a neural SDE: the generator of an SDE-GAN.

        x(t_0) = zeta(v),  v ~ N(0, 1),    dx = mu(t, x) dt + sigma(t, x) o dW,    y = A x + b

    in the sense of Stratonovich, with general noise; mu and sigma end in a tanh.

    Args:
        times: ``(n,)``, increasing, at which a path is seen.
        channels: of y.
        state, noise, width: sizes of x, of v and W, and of the hidden layers.
        solver: by default stochastic Heun in 100 steps.

    Source: Kidger et al. 2021, "Neural SDEs as infinite-dimensional GANs", arXiv 2102.03657.
    """

    times: Tensor

    def __init__(
        self, times: Tensor, channels: int, *, state: int = 16, noise: int = 3, width: int = 16,
        solver: Solver = Solver(StochasticHeun(), Fixed(steps=100)),
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_buffer("times", _checked(times))
        self.noise, self.solver = noise, solver
        self.start = MLP([noise, width, state], LipSwish)
        drift = _Field([state + 1, width, state])
        spread = _Field([state + 1, width, state * noise], (state, noise))
        self.sde = SDE(
            drift, spread, noise="general", noise_size=noise, stratonovich=True, batched_time=True
        )
        self.readout = nn.Linear(state, channels)

    def forward(self, count: int, *, generator: torch.Generator) -> Tensor:
        """Paths ``(count, n, channels)``."""
        weight = self.readout.weight
        seed = torch.randn(
            (count, self.noise), generator=generator, device=weight.device, dtype=weight.dtype
        )
        t0, t1 = float(self.times[0]), float(self.times[-1])
        ys = self.solver.solve(
            self.sde, self.start(seed).to(seed.dtype), t0, t1, save_at=self.times,
            generator=generator,
        ).ys  # fmt: skip
        assert isinstance(ys, Tensor)
        return self.readout(ys.transpose(0, 1))


class PathDiscriminator(nn.Module):
    """A neural CDE that gives a path one number: the critic of an SDE-GAN.

        h(t_0) = xi(t_0, y(t_0)),    dh = f(t, h) d(t, y(t)),    D = m . h(t_1)

    of the path through the points given, straight between them. Of one channel the score is
    continuous in the largest distance of two paths (Doss 1977, Sussmann 1978), so that it hardly
    sees how rough a path is; ``Solver(Euler(), Grid(times))`` adds up in the sense of Ito, which
    sees the squares of steps. ``clip()`` after every step of
    training keeps its linear maps from stretching, and with LipSwish between them its fields too:
    no gradient penalty is needed.

    Args:
        times: ``(n,)``, increasing, of the points.
        channels: of y.
        state, width: sizes of h and of the hidden layers.
        solver: by default the midpoint rule from point to point.

    Source: Kidger et al. 2021, "Efficient and accurate gradients for neural SDEs", arXiv
    2105.13493, section 5.
    """

    times: Tensor

    def __init__(
        self, times: Tensor, channels: int, *, state: int = 16, width: int = 16,
        solver: Solver | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_buffer("times", _checked(times))
        self.solver = solver or Solver(Midpoint(), Grid(times))
        self.start = MLP([channels + 1, width, state], LipSwish)
        self.field = _Field([state + 1, width, state * (channels + 1)], (state, channels + 1))
        self.readout = nn.Linear(state, 1)

    def forward(self, y: Tensor) -> Tensor:
        """``(batch,)`` scores of paths ``(batch, n, channels)``."""
        y = y.to(torch.promote_types(y.dtype, self.readout.weight.dtype))  # autocast narrows it
        t = self.times.to(y.dtype)[:, None].expand(*y.shape[:2], 1)
        points = torch.cat((t, y), -1)
        cde = CDE(self.field, Linear(self.times, points), batched_time=True, rowwise=True)
        t0, t1 = float(self.times[0]), float(self.times[-1])
        end = self.solver.solve(cde, self.start(points[:, 0]).to(points.dtype), t0, t1).y1
        return self.readout(end)[:, 0]

    @torch.no_grad()
    def clip(self) -> None:
        """Puts the entries of every linear map with b outputs into [-1/b, 1/b]: |Ax| <= |x| in the
        sum of moduli.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                limit = 1.0 / module.out_features
                module.weight.clamp_(-limit, limit)


class _Field(nn.Module):
    """tanh of a network of (t, x), in a shape of its own."""

    def __init__(self, sizes: list[int], shape: tuple[int, ...] = (-1,)) -> None:
        super().__init__()
        self.net, self.shape = MLP(sizes, LipSwish), shape

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        out = self.net(torch.cat((t.expand(len(x))[:, None], x), -1))
        return out.tanh().unflatten(-1, self.shape)


def _checked(times: Tensor) -> Tensor:
    if times.ndim != 1 or len(times) < 2 or not bool((times.diff() > 0).all()):
        raise ValueError("times is (n,), increasing, of two times at least")
    return times
