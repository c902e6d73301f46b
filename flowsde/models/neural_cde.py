"""Neural controlled differential equations: recurrent networks in continuous time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._state import contract
from ..dynamics.differential import CDE
from ..nn import MLP
from ..paths.base import Path
from ..paths.control import Piecewise
from ..solution import Solution
from ..solve import Solver
from ..stepping import Adaptive
from ._latent import check_channels

__all__ = ["NeuralCDE"]


class NeuralCDE(nn.Module):
    """A hidden state that a path through data drives.

        h(t_0) = xi(X(t_0)),    dh = f(h) dX(t),    y = A h + b

    with f ``(hidden, channels)``, a network that ends in a tanh. Several layers are one equation:
    each drives the next, dh_2 = f_2(h_2) dh_1, and the last one is read. What the times are called
    does not matter to it: time is a channel of the path.

    For long series give it ``paths.LogSignature(times, values, depth, window)``: the log-ODE
    method, of steps as long as windows.

    Args:
        channels: of the path.
        outputs: logits or values.
        hidden, width, depth: sizes of h and of the networks' hidden layers, of which f has so many.
        layers: of h.
        rank: f(h) = U(h) V(h)^T of so low a rank, never written out; None for any matrix.
        solver: by default adaptive steps, which end on the path's knots. Where each sample has
            times of its own they are taken by the numbers of its rows, in which the batch shares
            its knots, and every sample chooses its own steps between them. So are times with a
            gradient: of a solver that you give, only steps that end on the knots themselves, as
            ``Grid(path.knots)``'s do, carry the times' gradient.

    Raises:
        TypeError: on what is no path of the library.

    Source: Kidger et al. 2020, arXiv 2005.08926; Morrill et al. 2021, arXiv 2009.08295 (log-ODE).
    """

    def __init__(
        self, channels: int, outputs: int, *, hidden: int = 32, width: int = 32, depth: int = 3,
        layers: int = 1, rank: int | None = None, solver: Solver | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.channels = channels
        drivers = [channels, *[hidden] * (layers - 1)]
        fields = (_Matrix(hidden, driver, width, depth, rank) for driver in drivers)
        self.field, self.solver = _Stack(fields), solver
        self.initial = MLP([channels, width, layers * hidden], nn.ReLU)
        self.readout = nn.Linear(hidden, outputs)

    def forward(self, path: Path) -> Tensor:
        """Outputs at the path's end, ``(batch, outputs)``: a class, a value of the whole series."""
        return self._read(self._solve(path).y1)

    def online(self, path: Path) -> Tensor:
        """Outputs as observations arrive, ``(batch, n, outputs)``, in one solve.

        Raises:
            TypeError: on a path that looks ahead: the outputs would know what comes.
        """
        if not _known(path).causal:
            raise TypeError(
                f"this {type(path).__name__} looks ahead: give HermiteCubic(...) or Linear(...), "
                "which do not where no value is missing, or Rectilinear(...), which never does"
            )
        ys = self._solve(path, arriving=True).ys
        assert isinstance(ys, Tensor)
        return self._read(ys.transpose(0, 1))

    def _read(self, h: Tensor) -> Tensor:
        return self.readout(h[..., -self.readout.in_features :])

    def _solve(self, path: Path, arriving: bool = False) -> Solution:
        path, solver = _known(path), self.solver
        if solver is None:
            own = False
            if isinstance(path, Piecewise) and (path.times.ndim == 2 or path.times.requires_grad):
                own, path = path.times.ndim == 2, path.by_row()
            knots, jumps = path.knots.detach(), path.jumps.detach()
            solver = Solver(stepping=Adaptive(1e-4, 1e-6, own, step_at=knots, jump_at=jumps))
        t0, t1 = path.arrivals[..., 0], path.arrivals[..., -1]
        more = {"save_at": path.arrivals} if arriving else {}
        cde = CDE(self.field, path, products=True, batched_time=True, rowwise=True)
        start = path.evaluate(t0)
        check_channels(start, self.channels, self.readout.weight, ", of which time is one")
        return solver.solve(cde, self.initial(start).to(start.dtype), t0, t1, **more)


def _known(path: Path) -> Path:
    if not isinstance(path, Path):
        raise TypeError(
            f"NeuralCDE is driven by a path; got {type(path).__name__}: give one of Linear(times, "
            "values), HermiteCubic(times, values) or, of torchcde's, TorchCDE(path)"
        )
    return path


class _Stack(nn.ModuleList):
    """Of each layer what drives it, and of all their moves side by side."""

    def forward(self, t: Tensor, y: Tensor, dx: Tensor) -> Tensor:
        moves = []
        for matrix, h in zip(self, y.chunk(len(self), -1), strict=True):
            dx = matrix(h, dx)
            moves.append(dx)
        return dx if len(moves) == 1 else torch.cat(moves, -1)


class _Matrix(nn.Module):
    """tanh of a network of h, in the shape of a matrix or of two low ones, times dx."""

    def __init__(
        self, hidden: int, channels: int, width: int, depth: int, rank: int | None
    ) -> None:
        super().__init__()
        size = hidden * channels if rank is None else (hidden + channels) * rank
        self.net = MLP([hidden, *[width] * depth, size], nn.ReLU)
        self.channels, self.rank = channels, rank

    def forward(self, h: Tensor, dx: Tensor) -> Tensor:
        out = self.net(h).tanh()
        if self.rank is None:
            return contract(out.unflatten(-1, (-1, self.channels)), dx)
        matrix = out.unflatten(-1, (-1, self.rank))
        v, u = matrix.split([self.channels, h.shape[-1]], -2)
        return contract(u, contract(v.mT, dx))
