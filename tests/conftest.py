"""Laws are tested in float64, on the device that FLOWSDE_TEST_DEVICE names."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from .systems import DEVICE

settings.register_profile(
    "flowsde", deadline=None, max_examples=15, derandomize=True, print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
settings.load_profile("flowsde")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield
    torch.set_default_dtype(torch.float32)
