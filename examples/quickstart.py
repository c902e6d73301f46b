"""The README's example: one denoiser, its samples by two integrators, its exact likelihood."""

import torch

import flowsde as fs
from flowsde.integrators import DPMSolverPP, EulerMaruyama
from flowsde.paths import VP, uniform_lambda

data = torch.tensor([[-1.0, 0.5], [1.0, -0.5]])  # two points; their exact denoiser:


def denoiser(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    alpha, sigma = VP()(t)
    gaps = (x[:, None] - alpha * data).square().sum(-1)
    return (-0.5 * gaps / sigma**2).softmax(-1) @ data


def main() -> None:
    process = fs.LinearSDE(VP())
    noise = fs.Normal(2).sample(1000, seed=0)
    grid = fs.Grid(uniform_lambda(VP(), 1.0, 0.1, 20))
    flow = process.probability_flow(denoiser)
    ode = fs.solve(flow, noise, 1.0, 0.1, integrator=DPMSolverPP(), stepping=grid)
    sde = fs.solve(
        process.reverse_sde(denoiser), noise, 1.0, 0.1, integrator=EulerMaruyama(),
        stepping=fs.Fixed(steps=200), path=fs.Brownian(seed=1),
    )  # fmt: skip
    density = fs.Flow(fs.Normal(2), flow, t0=0.1).log_prob(ode.y1).detach()
    alpha, sigma = VP()(0.1)
    parts = torch.distributions.Normal(alpha * data, sigma).log_prob(ode.y1[:, None]).sum(-1)
    exact = parts.logsumexp(-1) - torch.tensor(2.0).log()
    print(f"means  {ode.y1.mean(0).tolist()} (ODE)  {sde.y1.mean(0).tolist()} (SDE)")
    print(f"log p  {float(density.mean()):.4f}, exact {float(exact.mean()):.4f}")
    assert float((density - exact).abs().max()) < 0.05


if __name__ == "__main__":
    main()
