"""The library's models in the clothes of others."""

from .distributions import FlowDistribution, FlowTransform

__all__ = ["FlowDistribution", "FlowTransform"]
