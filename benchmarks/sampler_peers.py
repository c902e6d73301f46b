"""Diffusion samplers of the libraries beside flowsde, on given ratios of noise to signal.

A peer takes z = x / alpha down ratios s = sigma / alpha; ``ask(s, z)`` is E[x0 | z]. Probability
flows are the same in z whatever the schedule. Peers are imported when they are used.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

__all__ = ["SAMPLER_PEERS", "SamplerPeer", "sampling"]

Ask = Callable[[Tensor, Tensor], Tensor]
Run = Callable[[Ask, Tensor, Tensor], Tensor]


class SamplerPeer(ABC):
    """A library.

    Attributes:
        grids: those that it makes itself.
    """

    grids: tuple[str, ...]

    @abstractmethod
    def samplers(self) -> dict[str, tuple[int, Run]]:
        """Its deterministic ones: how often each asks in a step, and ``run(ask, ratios, z)``."""


class Diffusers(SamplerPeer):
    """Its schedulers, with their sigmas put in place of those of a table of betas."""

    grids = "karras", "uniform lambda", "uniform t", "beta sigma"

    def samplers(self) -> dict[str, tuple[int, Run]]:
        import diffusers

        known: dict[str, tuple[int, Run]] = {
            "DDIM": (1, self._ddim),
            "Heun": (2, self._heun),
        }
        kinds = {
            "DPM++ 2M": ("DPMSolver", {"solver_order": 2}),
            "DPM++ 3M": ("DPMSolver", {"solver_order": 3}),
            "UniPC-2": ("UniPC", {"solver_order": 2}),
            "UniPC-3": ("UniPC", {"solver_order": 3}),
            "DEIS-2": ("DEIS", {"solver_order": 2}),
            "DEIS-3": ("DEIS", {"solver_order": 3}),
        }
        for name, (kind, config) in kinds.items():
            made = getattr(diffusers, f"{kind}MultistepScheduler")
            if kind != "DEIS":  # which would end on a step of first order, as if onto no noise
                config = {**config, "final_sigmas_type": "sigma_min"}
            for ends, lower in (("", False), (", lower order last", True)):
                own = {**config, "lower_order_final": lower, "prediction_type": "sample"}
                known[name + ends] = 1, _multistep(made, own)
        return known

    @staticmethod
    def _ddim(ask: Ask, ratios: Tensor, z: Tensor) -> Tensor:
        from diffusers import DDIMScheduler

        count = len(ratios)
        scheduler = DDIMScheduler(
            num_train_timesteps=count, prediction_type="sample", clip_sample=False
        )
        scheduler.alphas_cumprod = (1.0 / (1.0 + ratios**2)).flip(0)
        scheduler.num_inference_steps = count
        x = z / _norm(ratios[0])
        for n, s in enumerate(ratios[:-1]):
            x = scheduler.step(ask(s, x * _norm(s)), count - 1 - n, x).prev_sample
        return x * _norm(ratios[-1])

    @staticmethod
    def _heun(ask: Ask, ratios: Tensor, z: Tensor) -> Tensor:
        from diffusers import HeunDiscreteScheduler

        scheduler = HeunDiscreteScheduler(prediction_type="sample")
        scheduler.set_timesteps(len(ratios) - 1)
        scheduler.sigmas = ratios.repeat_interleave(2)[1:]
        scheduler.set_begin_index(0)
        for s in scheduler.sigmas[:-1]:
            z = scheduler.step(ask(s, z), scheduler.timesteps[0], z).prev_sample
        return z


def _norm(s: Tensor) -> Tensor:
    """1 / alpha where alpha^2 + sigma^2 = 1."""
    return (1.0 + s * s).sqrt()


def _multistep(made: Callable[..., Any], config: dict[str, Any]) -> Run:
    def run(ask: Ask, ratios: Tensor, z: Tensor) -> Tensor:
        scheduler = made(**config)
        scheduler.set_timesteps(len(ratios) - 1)
        scheduler.sigmas = ratios
        scheduler.set_begin_index(0)
        x = z / _norm(ratios[0])
        for n, s in enumerate(ratios[:-1]):
            x = scheduler.step(ask(s, x * _norm(s)), scheduler.timesteps[n], x).prev_sample
        return x * _norm(ratios[-1])

    return run


def sampling() -> ModuleType:
    """k_diffusion.sampling, without torchvision and skimage, which its package imports to train.

    Of its utils the samplers use one function.
    """
    if "k_diffusion.utils" not in sys.modules:
        spec, package = find_spec("k_diffusion"), ModuleType("k_diffusion")
        assert spec is not None
        package.__path__ = list(spec.submodule_search_locations or ())
        utils = ModuleType("k_diffusion.utils")
        vars(utils)["append_dims"] = lambda x, dims: x.reshape(x.shape + (1,) * (dims - x.ndim))
        sys.modules.update({"k_diffusion": package, "k_diffusion.utils": utils})
    return import_module("k_diffusion.sampling")


class KDiffusion(SamplerPeer):
    """Its functions of (model, x, sigmas)."""

    grids = "karras", "uniform lambda", "uniform t", "uniform sigma"

    def samplers(self) -> dict[str, tuple[int, Run]]:
        functions = sampling()
        asks = {
            "euler": 1, "heun": 2, "dpm_2": 2, "lms": 1, "dpmpp_2m": 1, "dpmpp_3m_sde": 1,
        }  # fmt: skip

        def bound(name: str) -> Run:
            function = getattr(functions, f"sample_{name}")
            still = {"eta": 0.0} if name.endswith("sde") else {}

            def run(ask: Ask, ratios: Tensor, z: Tensor) -> Tensor:
                def model(x: Tensor, sigma: Tensor) -> Tensor:
                    return ask(sigma[0], x)

                if still:
                    still["noise_sampler"] = lambda *ends: torch.zeros_like(z)
                return function(model, z, ratios, disable=True, **still)

            return run

        return {name: (count, bound(name)) for name, count in asks.items()}


SAMPLER_PEERS: dict[str, SamplerPeer] = {"diffusers": Diffusers(), "k_diffusion": KDiffusion()}
