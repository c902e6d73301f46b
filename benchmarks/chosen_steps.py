"""What steps chosen along a Brownian path cost: ``python -m benchmarks.chosen_steps``.

Adaptive solves of a Stratonovich SDE with networks for drift and diagonal diffusion, by Heun's
method, over tolerances: ours eagerly, compiled and with steps of each sample's own, torchsde's (an
error by step doubling, over its ``BrownianInterval``), and diffrax's, jitted, in a process of its
own, over its virtual tree. All stand on one thread. The error is that of y(1), root mean square,
beside the same library's solve of the same path with a tenth of the smallest tolerance (torchsde's:
with 4,096 given steps); evaluations are those of the drift. Alternating turns, medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import flowsde as fs
from flowsde.integrators import StochasticHeun
from flowsde.paths import BrownianTree

from . import reporting
from .overhead import TUNED
from .peers import SDE_PEERS, Apart, installed
from .sde_problems import Pair, TorchSDEForm, diffrax_form
from .timing import alternate, clock, ratio

SIZES = ((64, 4), (512, 16))
TOLERANCES = 1e-2, 1e-3, 1e-4
FINER, STEPS = 0.1, 4_096
Solve = Callable[[Pair, Tensor, float], tuple[Tensor, int]]  # y(1) and evaluations


def ours(per_sample: bool = False, executor: fs.Executor = fs.Eager()) -> Solve:
    made: dict[Any, fs.SDE] = {}  # what is compiled lives as long as its dynamics

    def run(pair: Pair, y0: Tensor, tolerance: float) -> tuple[Tensor, int]:
        if pair not in made:
            made[pair] = fs.SDE(
                pair.f, pair.g, noise="diagonal", stratonovich=True, batched_time=True, rowwise=True
            )
        solution = fs.solve(
            made[pair], y0, integrator=StochasticHeun(), executor=executor, max_steps=1_000_000,
            stepping=fs.Adaptive(tolerance, tolerance, per_sample=per_sample),
            path=BrownianTree(1, 0.0, 1.0),
        )  # fmt: skip
        return solution.y1, solution.stats.evaluations

    return run


OURS: dict[str, Solve] = {
    "flowsde": ours(),
    "flowsde, Compiled": ours(executor=fs.Compiled(options=TUNED)),
    "flowsde, per sample": ours(per_sample=True),
    "flowsde, per sample, Compiled": ours(per_sample=True, executor=fs.Compiled(options=TUNED)),
}


class TorchSDE:
    """torchsde's solves: timed along a new motion each, as the order of its queries decides it;
    set beside given steps along the same one.
    """

    def __init__(self, y0: Tensor) -> None:
        self._motion = self._new(y0)

    @staticmethod
    def _new(y0: Tensor) -> Any:
        from torchsde import BrownianInterval

        form = {"size": y0.shape, "dtype": y0.dtype, "device": y0.device}
        return BrownianInterval(0.0, 1.0, **form, entropy=1)

    def __call__(self, pair: Pair, y0: Tensor, tolerance: float) -> tuple[Tensor, int]:
        return self._run(pair, y0, self._new(y0), tolerance)

    def answer(self, pair: Pair, y0: Tensor, tolerance: float) -> tuple[Tensor, int]:
        return self._run(pair, y0, self._motion, tolerance)

    def fine(self, pair: Pair, y0: Tensor) -> Tensor:
        return self._run(pair, y0, self._motion, None)[0]

    @staticmethod
    def _run(pair: Pair, y0: Tensor, motion: Any, tolerance: float | None) -> tuple[Tensor, int]:
        from torchsde import sdeint

        calls = 0

        def drift(t: Tensor, y: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return pair.f(t, y)

        keywords: dict[str, Any] = {"dt": 1.0 / STEPS}
        if tolerance is not None:
            keywords = {"dt": 0.01, "adaptive": True, "rtol": tolerance, "atol": tolerance}
        sde = TorchSDEForm(drift, pair.g, "stratonovich")
        ends = torch.tensor([0.0, 1.0], dtype=y0.dtype, device=y0.device)
        return sdeint(sde, y0, ends, bm=motion, method="heun", **keywords)[-1], calls


class _Jitted:
    """diffrax's solves, compiled once for each size and tolerance."""

    def __init__(self) -> None:
        self._made: dict[Any, Callable[[], Any]] = {}

    def answer(
        self, weights: dict[str, np.ndarray], y0: np.ndarray, tolerance: float
    ) -> tuple[np.ndarray, int]:
        """y(1), and evaluations: two an attempt."""
        y1, steps = self._run(weights, y0, tolerance)()
        return np.asarray(y1), 2 * int(steps)

    def seconds(self, weights: dict[str, np.ndarray], y0: np.ndarray, tolerance: float) -> float:
        run = self._run(weights, y0, tolerance)
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def _run(
        self, weights: dict[str, np.ndarray], y0: np.ndarray, tolerance: float
    ) -> Callable[[], Any]:
        key = y0.shape, y0.dtype, tolerance
        if key not in self._made:
            self._made[key] = self._compile(weights, y0, tolerance)
            self._made[key]()
        return self._made[key]

    @staticmethod
    def _compile(
        weights: dict[str, np.ndarray], y0: np.ndarray, tolerance: float
    ) -> Callable[[], Any]:
        import diffrax
        import jax
        from jax import numpy as jnp

        jax.config.update("jax_enable_x64", y0.dtype == np.float64)

        f, g = diffrax_form()

        def solve(y: Any, p: Any, key: Any) -> Any:
            shape = jax.ShapeDtypeStruct(y.shape, y.dtype)
            path = diffrax.VirtualBrownianTree(0.0, 1.0, 2.0**-20, shape, key)
            terms = diffrax.MultiTerm(diffrax.ODETerm(f), diffrax.ControlTerm(g, path))
            found = diffrax.diffeqsolve(
                terms, diffrax.Heun(), 0.0, 1.0, None, y, p, max_steps=None,
                stepsize_controller=diffrax.PIDController(tolerance, tolerance, error_order=1.0),
                adjoint=diffrax.ForwardMode(),
            )  # fmt: skip
            return found.ys[-1], found.stats["num_steps"]

        given = jnp.asarray(y0), {name: jnp.asarray(w) for name, w in weights.items()}
        run = jax.jit(solve)
        return lambda: jax.block_until_ready(run(*given, jax.random.PRNGKey(0)))


def rms(x: Any, y: Any) -> float:
    return float(((torch.as_tensor(x) - torch.as_tensor(y)) ** 2).mean().sqrt())


@torch.no_grad()
def measure(
    size: tuple[int, int], names: Sequence[str], jitted: Apart | None, options: Any
) -> list[dict[str, Any]]:
    """For each tolerance and library: error, evaluations, milliseconds."""
    pair = Pair(size[1]).to(device=options.device, dtype=options.real)
    y0 = torch.randn(*size, device=options.device, dtype=options.real)
    fine: dict[str, Any] = dict.fromkeys(OURS, OURS["flowsde"](pair, y0, FINER * TOLERANCES[-1])[0])
    given = (
        {name: p.detach().cpu().numpy() for name, p in pair.named_parameters()},
        y0.cpu().numpy(),
    )
    solves, judged = dict(OURS), dict(OURS)
    if "torchsde" in names:
        theirs = TorchSDE(y0)
        solves["torchsde"], judged["torchsde"] = theirs, theirs.answer
        fine["torchsde"] = theirs.fine(pair, y0)
    if jitted is not None:
        fine["diffrax"] = jitted.ask("answer", *given, FINER * TOLERANCES[-1])[0]
    found = []
    for tolerance in TOLERANCES[:1] if options.small else TOLERANCES:
        answers = {name: solve(pair, y0, tolerance) for name, solve in judged.items()}
        clocks = {
            name: partial(clock, partial(solve, pair, y0, tolerance), options.device)
            for name, solve in solves.items()
        }
        if jitted is not None:
            answers["diffrax"] = jitted.ask("answer", *given, tolerance)
            clocks["diffrax"] = partial(jitted.ask, "seconds", *given, tolerance)
        readings = alternate(clocks, options.turns)
        for name, (y1, evaluations) in answers.items():
            own = readings[name]
            row = {
                "size": str(size), "tolerance": tolerance, "": name,
                "error": rms(y1, fine[name]), "evaluations": evaluations,
                "ms": 1e3 * statistics.median(own),
                "us an evaluation": 1e6 * statistics.median(own) / evaluations,
            }  # fmt: skip
            for peer in readings:
                if peer in ("torchsde", "diffrax"):
                    row[f"faster than {peer}"] = ratio(readings[peer], own)
            found.append(row)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = reporting.options(reporting.parser(__doc__, dtype="float32"), arguments)
    asked = SDE_PEERS if options.peers is None else options.peers
    names, versions = installed([name for name in asked if name in SDE_PEERS])
    jitted = Apart(_Jitted) if "diffrax" in names else None
    found = []
    for size in SIZES[:1] if options.small else SIZES:
        found += measure(size, names, jitted, options)
    print("Stochastic Heun, medians of alternating turns, one thread\n")
    head = list(found[0])
    reporting.table(head, ([row[key] for key in head] for row in found))
    reporting.write("chosen_steps", options, {"peers": versions, "found": found})


if __name__ == "__main__":
    main()
