"""The library's models in the clothes of others, and theirs in its own."""

from .diffusers import as_scheduler, from_diffusers
from .distributions import FlowDistribution, FlowTransform
from .k_diffusion import as_sampler

__all__ = ["FlowDistribution", "FlowTransform", "as_sampler", "as_scheduler", "from_diffusers"]
