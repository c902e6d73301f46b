"""Training under data parallelism: the hooks of DDP and FSDP fire, whichever adjoint is taken."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowsde as fs
from flowsde.integrators import Integrator, Kvaerno3, ReversibleRK, Tsit5

dist = pytest.importorskip("torch.distributed")
if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch was built without gloo", allow_module_level=True)
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

MODES = [
    (fs.Direct(), Tsit5()), (fs.Checkpointed(), Tsit5()), (fs.Checkpointed(1), Kvaerno3()),
    (fs.Reversible(), ReversibleRK(Tsit5())), (fs.Backsolve(), Tsit5()),
]  # fmt: skip


def named(value: Any) -> str:
    return type(value).__name__


class Field(nn.Module):
    """Weights used twice, one frozen, one used late only, and a buffer."""

    def __init__(self, late: float) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 8), nn.Linear(8, 3)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.late, self.after = nn.Parameter(torch.randn(3)), late
        self.register_buffer("scale", torch.full((3,), 0.5))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        h = torch.tanh(self.inner(y)) @ self.inner.weight  # shared with the layer itself
        k = self.scale * (self.outer(torch.tanh(self.inner(y))) + h + self.frozen)
        return k + self.late * y if float(t) > self.after else k


class Model(nn.Module):
    def __init__(self, adjoint: fs.Adjoint, method: Integrator, late: float) -> None:
        super().__init__()
        self.ode = fs.ODE(Field(late))
        self.solver = fs.Solver(method, fs.Fixed(steps=2), adjoint)

    def forward(self, y0: Tensor) -> Tensor:
        return self.solver.solve(self.ode, y0).y1


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    """A group of this process alone."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def train(model: nn.Module, trained: nn.Module, y0: Tensor) -> list[Tensor]:
    """The weights after two steps."""
    optimiser = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        optimiser.zero_grad()
        model(y0).square().sum().backward()
        optimiser.step()
    return [p.detach() for p in trained.parameters()]


def _noted(sizes, bucket):  # type: ignore[no-untyped-def]  # DDP wants no annotation as a string
    """A reduction over one process, which notes how much passes it."""
    sizes.append(bucket.buffer().numel())
    done: Any = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


@pytest.mark.parametrize("late", [0.5, 2.0], ids=["late", "never"])
@pytest.mark.parametrize(("adjoint", "method"), MODES, ids=named)
def test_data_parallel_training_takes_the_same_steps(
    group: Any, adjoint: fs.Adjoint, method: Integrator, late: float
) -> None:
    """Each gradient passes DDP's reduction once; a weight that no step uses has a zero one."""
    y0, plain = torch.randn(5, 3), Model(adjoint, method, late)
    copied = deepcopy(plain)
    parallel = DistributedDataParallel(copied, find_unused_parameters=True)
    sizes: list[int] = []
    parallel.register_comm_hook(sizes, _noted)
    wanted, found = train(plain, plain, y0), train(parallel, copied, y0)
    assert sum(sizes) == 2 * sum(p.numel() for p in plain.parameters() if p.requires_grad)
    for a, b in zip(wanted, found, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("adjoint", "method"), MODES, ids=named)
def test_sharded_training_takes_the_same_steps(
    group: Any, adjoint: fs.Adjoint, method: Integrator
) -> None:
    """Weights that are gathered for the forward, freed after it and gathered again on the way
    back, where steps are taken again.
    """
    y0, plain = torch.randn(5, 3), Model(adjoint, method, 0.5)
    sharded = deepcopy(plain)
    fully_shard(sharded, mesh=dist.init_device_mesh("cpu", (1,)), reshard_after_forward=True)
    wanted, found = train(plain, plain, y0), train(sharded, sharded, y0)
    for a, b in zip(wanted, found, strict=True):
        assert torch.allclose(a, b.full_tensor(), rtol=1e-12, atol=1e-12)
