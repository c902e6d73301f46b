"""Other libraries' functions, solved here, beside the originals."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
import torchcde
import torchdiffeq
import torchsde
from torch import Tensor, nn

import flowsde as fs
from flowsde import compat
from flowsde.compat import ode

T = torch.tensor
GIVEN, CHOSEN = sorted(ode._GIVEN), sorted(ode._CHOSEN)


class Field(nn.Module):
    """Turns, and bends with time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.inner(y)) * torch.cos(t)


def slopes(ys: Any, *by: Tensor) -> list[Tensor]:
    loss = sum(y.square().sum() for y in (ys if isinstance(ys, tuple) else (ys,)))
    return [ys if isinstance(ys, Tensor) else ys[0], *torch.autograd.grad(loss, by)]


def near(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        gap, size = ((x.detach().abs().max()) for x in (a - b, b))
        assert float(gap) < tolerance * (1.0 + float(size))


@pytest.mark.parametrize(
    ("mine", "its"),
    [
        (compat.odeint, torchdiffeq.odeint),
        (compat.odeint_adjoint, torchdiffeq.odeint_adjoint),
        (compat.odeint_event, torchdiffeq.odeint_event),
        (compat.sdeint, torchsde.sdeint),
        (compat.sdeint_adjoint, torchsde.sdeint_adjoint),
        (compat.cdeint, torchcde.cdeint),
    ],
    ids=lambda f: f.__name__,
)
def test_signatures_are_those_that_users_know(mine: Any, its: Any) -> None:
    """Names, order, kinds and defaults; extra solver states are torchsde's own."""
    ours, theirs = (
        [p for p in inspect.signature(f).parameters.values() if p.kind is not p.VAR_KEYWORD]
        for f in (mine, its)
    )
    theirs = [p for p in theirs if not p.name.startswith("extra")]
    assert [(p.name, p.kind) for p in ours] == [(p.name, p.kind) for p in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.name == "odeint_interface" or a.default == b.default


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("method", GIVEN)
def test_given_steps_are_the_same(method: str, down: bool) -> None:
    field, y0 = Field(), torch.randn(4, 3, requires_grad=True)
    t = T([0.0, 0.3, 0.5, 1.1, 2.0])
    t = (t.flip(0) if down else t).requires_grad_()
    by = [y0, t, *field.parameters()]
    found = [slopes(lib.odeint(field, y0, t, method=method), *by) for lib in (compat, torchdiffeq)]
    near(*found, 1e-12)
    for options in ({"step_size": 0.3}, {"grid_constructor": lambda f, y, t: t[[0, 2, 4]]}):
        cubic = {"interp": "cubic", **options}
        states = [
            lib.odeint(field, y0, t.detach(), method=method, options=cubic)
            for lib in (compat, torchdiffeq)
        ]
        near(states[:1], states[1:], 1e-12)


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("method", CHOSEN)
def test_chosen_steps_lead_to_the_same_place(method: str, down: bool) -> None:
    field, y0 = Field(), torch.randn(4, 3, requires_grad=True)
    t = T([0.0, 0.3, 0.5, 1.1, 2.0])
    t = (t.flip(0) if down else t).requires_grad_()
    by, order = [y0, t, *field.parameters()], ode._CHOSEN[method].order
    tolerance = 1e-6 if order == 2 else 1e-9
    truth = slopes(torchdiffeq.odeint(field, y0, t, rtol=1e-12, atol=1e-12), *by)
    for run in (compat.odeint, compat.odeint_adjoint):
        ys = run(field, y0, t, method=method, rtol=tolerance, atol=tolerance)
        near(slopes(ys, *by), truth, 1e-3 if order < 4 else 1e-6)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_tuples(method: str) -> None:
    w = torch.randn(2, 2, requires_grad=True)

    def field(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return y[1].sum(-1, keepdim=True) * t, -(y[0] @ w.sum(0, keepdim=True))

    y0, t = (torch.randn(3, 1), torch.randn(3, 2)), torch.linspace(0.0, 1.0, 7)
    found = [
        slopes(lib.odeint(field, y0, t, method=method), w) for lib in (compat, torchdiffeq)
    ]  # fmt: skip
    near(*found, 1e-6 if method == "dopri5" else 1e-12)
    one = compat.odeint(field, y0, t[:1])
    assert isinstance(one, tuple)
    assert torch.equal(one[1], y0[1][None])


def test_options_reach_the_steps() -> None:
    times: list[float] = []

    def field(t: Tensor, y: Tensor) -> Tensor:
        times.append(float(t))
        return torch.where(t < 0.4, 1.0, -1.0) * torch.ones_like(y)

    def run(**options: Any) -> Tensor:
        times.clear()
        ends: Tensor = compat.odeint(
            field, torch.zeros(1), T([0.0, 1.0]), method="dopri5", options=options
        )
        return ends[-1]

    assert float(run(jump_t=T([0.4]))) == pytest.approx(-0.2, abs=1e-12)
    few = len(times)
    assert float(run()) == pytest.approx(-0.2, abs=1e-3)
    assert len(times) > 2 * few
    run(jump_t=[0.4], first_step=0.01)
    assert any(0.0 < t < 0.01 for t in times)
    run(jump_t=[0.4], max_step=0.05)
    assert len(times) > 6 * 20
    run(jump_t=[0.4], step_t=T([0.123]))
    assert 0.123 in times
    seen: list[int] = []
    run(norm=lambda e: seen.append(e.ndim) or e.abs().max())  # type: ignore[func-returns-value]
    assert set(seen) == {1}
    with pytest.raises(fs.MaxStepsReached):
        run(max_num_steps=2)
    scipy = compat.odeint(
        lambda t, y: -y, torch.ones(1), T([0.0, 1.0]), method="scipy_solver",
        options={"solver": "Radau"},
    )  # fmt: skip
    assert float(scipy[-1]) == pytest.approx(0.36788, abs=1e-4)


FALL = 9.8


def falling(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return y[1], torch.full_like(y[1], -FALL)


@pytest.mark.parametrize("interface", [compat.odeint, compat.odeint_adjoint])
@pytest.mark.parametrize(
    "more", [{}, {"method": "rk4", "options": {"step_size": 0.01}}], ids=["chosen", "given"]
)
def test_events_come_when_they_come(interface: Any, more: dict[str, Any]) -> None:
    """t* = sqrt(2 h / g), v* = -sqrt(2 g h), far beyond the first unit of time too."""
    for height in (10.0, 500.0):
        h, zero = T(height, requires_grad=True), T(0.0)
        at, (heights, speeds) = compat.odeint_event(
            falling, (h, zero), zero, event_fn=lambda t, y: y[0], odeint_interface=interface, **more
        )
        assert float(at.detach()) == pytest.approx((2 * height / FALL) ** 0.5, rel=1e-9)
        assert heights.detach().tolist() == pytest.approx([height, 0.0], abs=1e-9)
        assert float(speeds[1].detach()) == pytest.approx(-((2 * height * FALL) ** 0.5), rel=1e-9)
        (when,) = torch.autograd.grad(at, h, retain_graph=True)
        (speed,) = torch.autograd.grad(speeds[1], h)
        assert float(when) == pytest.approx((2 * height * FALL) ** -0.5, rel=1e-6)
        assert float(speed) == pytest.approx(-((FALL / 2 / height) ** 0.5), rel=1e-6)


def test_events_run_back_too_and_the_first_number_counts() -> None:
    start, zero = T(0.5, requires_grad=True), T(0.0)
    levels = lambda t, y: torch.stack((y[0] - 5.0, y[0] - 20.0))
    at, _ = compat.odeint_event(
        falling, (T(10.0), zero), start, event_fn=levels, reverse_time=True
    )  # fmt: skip
    assert float(at.detach()) == pytest.approx(0.5 - (2 * 5.0 / FALL) ** 0.5)
    (moved,) = torch.autograd.grad(at, start)
    assert float(moved) == pytest.approx(1.0)
    for more in ({}, {"method": "rk4"}):
        with pytest.raises(fs.MaxStepsReached, match="did not cross zero in 50 steps, up to t = "):
            compat.odeint_event(
                falling, (T(1.0), zero), zero, event_fn=lambda t, y: y[0] - 2.0, **more,
                options={"max_num_steps": 50, **({"step_size": 0.1} if more else {})},
            )  # fmt: skip
    with pytest.raises(ValueError, match="zero at"):
        compat.odeint_event(falling, (T(1.0), zero), zero, event_fn=lambda t, y: y[0] - 1.0)


def test_times_of_events_keep_their_digits() -> None:
    """Whatever torch's default dtype; whole numbers are times too."""
    torch.set_default_dtype(torch.float32)
    y0, start = torch.ones(1, dtype=torch.float64), T(100.0, dtype=torch.float64)
    half = lambda t, y: y - 0.5
    with torch.no_grad():
        at, _ = compat.odeint_event(lambda t, y: -y, y0, start, event_fn=half)
    assert at.dtype == torch.float64
    assert float(at) == pytest.approx(100.0 + math.log(2.0), abs=1e-8)
    at, _ = compat.odeint(lambda t, y: -y, torch.ones(1), T([0, 1]), event_fn=half)
    assert float(at) == pytest.approx(math.log(2.0), abs=1e-6)
    assert compat.odeint(lambda t, y: -y, torch.ones(1), T([0, 1])).shape == (2, 1)


def test_functions_of_tuples_return_lists_and_options_may_be_none() -> None:
    y0, t = (torch.ones(2), torch.zeros(3)), T([0.0, 1.0])
    ends = compat.odeint(
        lambda t, y: [-y[0], torch.ones_like(y[1])], y0, t, method="dopri5",
        options={"first_step": None, "step_t": None, "jump_t": None, "norm": None},
    )  # fmt: skip
    assert torch.allclose(ends[0][1], torch.ones(2) * math.exp(-1.0))
    assert torch.allclose(ends[1][1], torch.ones(3))
    with pytest.raises(TypeError, match="all parts"):
        compat.odeint(lambda t, y: y, y0, t, rtol=(1e-3, 1e-4))  # type: ignore[arg-type]


def test_step_sizes_are_numbers_without_a_gradient() -> None:
    size = T(0.1, requires_grad=True)
    with pytest.raises(ValueError, match="no gradient comes back by dt"):
        compat.odeint(
            lambda t, y: -y, torch.ones(1), T([0.0, 1.0]), method="rk4", options={"step_size": size}
        )
    made, y0 = Sde("diagonal", "ito"), torch.ones(5, 3)
    for more in ({"ts": TS.clone().requires_grad_()}, {"dt": size}):
        with pytest.raises(TypeError, match="no gradient passes by ts or dt"):
            compat.sdeint(**{"sde": made, "y0": y0, "ts": TS, **more})  # type: ignore[arg-type]


def test_gradients_of_scipys_solves_come_back_by_an_adjoint() -> None:
    field, y0, t = Field(), torch.randn(4, 3), T([0.0, 0.5, 2.0])
    by = list(field.parameters())
    near(*(
        slopes(compat.odeint_adjoint(field, y0, t, method=m, rtol=1e-9, atol=1e-9), *by)
        for m in ("scipy_solver", "dopri5")
    ), 1e-6)  # fmt: skip
    with pytest.raises(TypeError, match="SciPy"):
        compat.odeint(field, y0, t, method="scipy_solver")


@pytest.mark.parametrize("method", ["reversible_heun", "midpoint"])
def test_gradients_reach_what_an_sde_was_told(method: str) -> None:
    """A context that is no parameter, as of a latent SDE."""
    made, y0 = Sde("diagonal", "stratonovich"), torch.randn(5, 3)
    context = torch.randn(5, 3, requires_grad=True)
    plain = made.f
    made.f = lambda t, y: plain(t, y) + context.sin()  # type: ignore[method-assign]
    found = [
        slopes(run(made, y0, TS, bm=fs.Brownian(1), method=method, dt=DT), context, made.rate)
        for run in (compat.sdeint, compat.sdeint_adjoint)
    ]
    near(*found, 1e-12)


def test_what_is_not_there_is_refused_with_the_cure() -> None:
    y0, t = torch.ones(2), T([0.0, 1.0])
    decay = lambda t, y: -y
    for times in (T([0.0, 1.0, 0.5]), T([0.0, 0.0]), T(1.0), [0.0, 1.0]):
        with pytest.raises(ValueError, match="strictly rising or falling"):
            compat.odeint(decay, y0, times)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Adams\(\)"):
        compat.odeint(decay, y0, t, method="implicit_adams")
    with pytest.raises(ValueError, match="one of the two"):
        compat.odeint(
            decay, y0, t, method="rk4",
            options={"step_size": 0.1, "grid_constructor": lambda f, y, t: t},
        )  # fmt: skip
    for method, options in (
        ("rk4", {"perturb": True}), ("rk4", {"jump_t": T([0.5])}), ("rk4", {"interp": "none"}),
        ("dopri5", {"step_size": 0.1}), ("dopri5", {"dtype": torch.float32}),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=r"options|perturb|interp|dtype"):
            compat.odeint(decay, y0, t, method=method, options=options)
    with pytest.raises(ValueError, match="step_size"):
        compat.odeint_event(decay, y0, t[0], event_fn=lambda t, y: y - 0.5, method="rk4")
    with pytest.raises(ValueError, match="a start and a time"):
        compat.odeint(decay, y0, torch.linspace(0, 1, 3), event_fn=lambda t, y: y[0] - 0.5)

    class Told(Field):
        def callback_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
            """What torchdiffeq calls."""

    with pytest.raises(TypeError, match="progress="):
        compat.odeint(Told(), torch.ones(1, 3), t)


class Sde(nn.Module):
    """Of every kind, in torchsde's words."""

    def __init__(self, noise: str, kind: str) -> None:
        super().__init__()
        self.noise_type, self.sde_type = noise, kind
        self.rate, self.matrix = nn.Parameter(T(0.7)), nn.Parameter(0.3 * torch.randn(3, 2))

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return -self.rate * y + torch.sin(t)

    def h(self, t: Tensor, y: Tensor) -> Tensor:
        return -y

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        if self.noise_type == "additive":
            return self.rate * self.matrix.expand(len(y), 3, 2)
        if self.noise_type == "general":
            return self.rate * self.matrix * torch.sigmoid(y).unsqueeze(-1)
        size = 0.3 * torch.sigmoid(self.rate * y) + 0.1 * self.matrix.square().sum()
        return size if self.noise_type == "diagonal" else size.unsqueeze(-1)


def motion(kind: str, more: int = 0) -> torchsde.BrownianInterval:
    size = {"diagonal": 3 + more, "scalar": 1}.get(kind, 2)
    return torchsde.BrownianInterval(
        0.0, 1.0, (5, size), dtype=torch.float64, entropy=3,
        levy_area_approximation="space-time",
    )  # fmt: skip


TS = T([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
DT = 2.0**-5


@pytest.mark.parametrize("noise", ["diagonal", "scalar", "additive", "general"])
@pytest.mark.parametrize("kind", ["ito", "stratonovich"])
def test_sdes_of_torchsde_on_its_paths(noise: str, kind: str) -> None:
    made, y0 = Sde(noise, kind), torch.randn(5, 3, requires_grad=True)
    by = [y0, *made.parameters()]
    methods = {
        "ito": ["euler", *(["milstein", "srk"] if noise != "general" else []), None],
        "stratonovich": ["midpoint", "heun", "euler_heun", "reversible_heun", None],
    }[kind]
    for method in methods:
        # SRA1's integrals of a g that is constant are another sum than torchsde's
        loose = 1e-2 if noise == "additive" and method in ("srk", None) and kind == "ito" else 1e-10
        runs = [
            run(made, y0, TS, bm=motion(noise), method=method, dt=DT)
            for run in (torchsde.sdeint, compat.sdeint, compat.sdeint_adjoint)
        ]
        theirs, ours, back = (slopes(ys, *by) for ys in runs)
        near(ours, theirs, loose)
        near(back, ours, 1e-12)


def test_divergences_between_the_times() -> None:
    made, y0 = Sde("diagonal", "ito"), torch.randn(5, 3)
    found = [
        lib.sdeint(made, y0, TS, bm=motion("diagonal", 1), method="euler", dt=DT, logqp=True)
        for lib in (compat, torchsde)
    ]
    near(list(found[0]), list(found[1]), 1e-10)
    assert found[0][1].shape == (3, 5)


def test_paths_are_drawn_from_torchs_own_generator() -> None:
    made, y0 = Sde("diagonal", "ito"), torch.randn(5, 3)
    ends = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        ends.append(compat.sdeint(made, y0, TS, method="milstein", dt=DT)[-1])
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])
    same = fs.Brownian(7)
    assert torch.equal(*(compat.sdeint(made, y0, TS, bm=same, dt=DT) for _ in range(2)))


@pytest.mark.parametrize("method", ["srk", "milstein"])
@torch.no_grad()
def test_steps_chosen_along_the_path(method: str) -> None:
    made, y0 = Sde("diagonal", "ito"), torch.randn(5, 3)
    path = fs.BrownianTree(3, 0.0, 1.0, levy="H")
    fine = compat.sdeint(made, y0, TS, bm=path, method="srk", dt=2.0**-11)
    errors = [
        float((compat.sdeint(
            made, y0, TS.tolist(), bm=path, method=method, adaptive=True, rtol=0.0,
            atol=tol, dt=0.1,
        ) - fine).square().mean().sqrt())
        for tol in (1e-1, 1e-2, 1e-3)
    ]  # fmt: skip
    assert errors[2] < errors[0] / 3
    assert errors[2] < 5e-3


def test_sdes_by_other_names_and_forms() -> None:
    made, y0 = Sde("scalar", "ito"), torch.randn(5, 3)

    class Both:
        noise_type, sde_type = "scalar", "ito"

        def f_and_g(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return made.f(t, y), made.g(t, y)

    class Renamed:
        noise_type, sde_type = "scalar", "ito"
        down, noise = staticmethod(made.f), staticmethod(made.g)

    plain = compat.sdeint(made, y0, TS, bm=fs.Brownian(1), dt=DT)
    names = {"drift": "down", "diffusion": "noise"}
    assert torch.equal(plain, compat.sdeint(Both(), y0, TS, bm=fs.Brownian(1), dt=DT))
    assert torch.equal(plain, compat.sdeint(Renamed(), y0, TS, fs.Brownian(1), dt=DT, names=names))
    free = {"grad_free": True}
    runs = [
        compat.sdeint(made, y0, TS, fs.Brownian(1), "milstein", dt=DT, options=o)
        for o in ({}, free)
    ]
    assert 0.0 < float((runs[0] - runs[1]).detach().abs().max()) < 1e-2


def test_sdes_that_cannot_be_are_told() -> None:
    made, y0 = Sde("diagonal", "ito"), torch.randn(5, 3)
    for bad, match in (
        ({"method": "adams"}, "method is one of"), ({"y0": y0[0]}, r"\(batch, d\)"),
        ({"ts": [1.0, 0.0]}, "strictly rising"), ({"sde": nn.Identity()}, "noise_type"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            compat.sdeint(**{"sde": made, "y0": y0, "ts": TS, **bad})  # type: ignore[arg-type]
    lone = nn.Identity()
    lone.noise_type, lone.sde_type, lone.g = "diagonal", "ito", made.g  # type: ignore[assignment]
    for bad, match in (
        ({"options": {"grad_free": True}}, "no options"), ({"names": {"f": "g"}}, "names are of"),
        ({"sde": lone}, "has a drift"), ({"method": "midpoint"}, "StochasticMidpoint"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=match):
            compat.sdeint(**{"sde": made, "y0": y0, "ts": TS, **bad})  # type: ignore[arg-type]


class Matrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 6)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.inner(z)).unflatten(-1, (3, 2))


class Product(Matrix):
    def prod(self, t: Tensor, z: Tensor, dx: Tensor) -> Tensor:
        return (self(t, z) @ dx.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("make", [Matrix, Product])
@pytest.mark.parametrize("lead", [(4,), (2, 4), ()])
def test_controls_of_torchcde(lead: tuple[int, ...], make: Any, adjoint: bool) -> None:
    times, func = torch.linspace(0.0, 1.0, 6), make()
    x, z0 = torch.randn(*lead, 6, 2), torch.randn(*lead, 3, requires_grad=True)
    control = torchcde.CubicSpline(torchcde.natural_cubic_coeffs(x, times), times)
    by, at = [z0, *func.parameters()], T([0.0, 0.4, 1.0])
    rk4 = {"method": "rk4", "options": {"step_size": 0.2}}
    ours = compat.cdeint(control, func, z0, at, adjoint=adjoint, **rk4)
    theirs = torchcde.cdeint(control, func, z0, at, adjoint=False, **rk4)  # its adjoint errs
    assert ours.shape == (*lead, 3, 3)
    near(slopes(ours, *by), slopes(theirs, *by), 1e-11)
    tight = {"rtol": 1e-10, "atol": 1e-10}
    ours = compat.cdeint(X=control, func=func, z0=z0, t=at, adjoint=adjoint, **tight)
    theirs = torchcde.cdeint(X=control, func=func, z0=z0, t=at, adjoint=False, **tight)
    near(slopes(ours, *by), slopes(theirs, *by), 1e-6)


def test_our_controls_and_what_does_not_fit() -> None:
    times, func, z0 = torch.linspace(0.0, 1.0, 6), Matrix(), torch.randn(4, 3)
    control = fs.paths.Linear(times, torch.randn(4, 6, 2))
    jumps = {"method": "dopri5", "options": {"jump_t": control.jumps}}
    ours = compat.cdeint(control, func, z0, times[[0, -1]], **jumps)
    cde = fs.CDE(func, control)
    stepping = fs.Adaptive(1e-9, 1e-9, jump_at=control.jumps)
    assert torch.allclose(ours[:, -1], fs.solve(cde, z0, stepping=stepping).y1, atol=1e-3)
    with pytest.raises(ValueError, match="backend"):
        compat.cdeint(control, func, z0, times, backend="torchsde")
    with pytest.raises(TypeError, match="derivative"):
        compat.cdeint(func, func, z0, times)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="concatenate"):
        compat.cdeint(control, func, (z0, z0), times)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"\(\.\.\., d, channels\)"):
        compat.cdeint(control, lambda t, z: z, z0, times)
