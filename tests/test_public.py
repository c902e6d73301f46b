"""What is public is documented, and importing it is light."""

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import flowsde

MODULES = ["flowsde"] + [
    m.name for m in pkgutil.walk_packages(flowsde.__path__, "flowsde.")
    if not any(part.startswith("_") for part in m.name.split(".")[1:])
]  # fmt: skip


def public(name: str) -> list[object]:
    module = importlib.import_module(name)
    assert module.__doc__, name
    assert list(module.__all__) or name, name
    return [getattr(module, item) for item in module.__all__]


@pytest.mark.parametrize("name", MODULES)
def test_every_public_thing_has_a_docstring(name: str) -> None:
    for thing in public(name):
        if isinstance(thing, ModuleType) or not (
            inspect.isclass(thing) or inspect.isfunction(thing)
        ):
            continue
        label = f"{name}.{thing.__name__}"
        assert inspect.getdoc(thing), label
        assert len(inspect.getdoc(thing) or "") > 12, label
        if inspect.isclass(thing) and thing.__module__.startswith("flowsde"):
            for key, member in vars(thing).items():
                inherited = any(key in vars(base) for base in thing.__mro__[1:])
                if inspect.isfunction(member) and not key.startswith("_") and not inherited:
                    assert inspect.getdoc(member) or _obvious(key), f"{label}.{key}"


def _obvious(name: str) -> bool:
    """Parts whose class or parent says what they are."""
    return name in {"forward", "alpha", "scale", "clock", "update"}


@pytest.mark.parametrize("name", MODULES)
def test_functions_with_arguments_say_what_they_raise_or_return(name: str) -> None:
    for thing in public(name):
        if inspect.isfunction(thing) and thing.__module__ == "flowsde.solve":
            text = inspect.getdoc(thing) or ""
            assert "Args:" in text
            assert "Raises:" in text


def test_the_readme_runs() -> None:
    """Its code, as it stands: the samples are the data's, and so is their density."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    torch.set_default_dtype(torch.float32)  # as a reader's is
    exec(block, names)
    for solution in (names["ode"], names["sde"]):
        assert 0.4 < float(solution.y1.std()) < 0.7
    alpha, sigma = names["VP"]()(0.1)
    law = torch.distributions.Normal(0.0, (0.25 * alpha**2 + sigma**2) ** 0.5)
    assert torch.allclose(names["log_p"], law.log_prob(names["ode"].y1).sum(1), atol=0.02)


def test_import_is_light() -> None:
    heavy = ("torchdiffeq", "torchsde", "torchcde", "matplotlib", "sklearn", "accelerate", "scipy")
    code = f"import sys, flowsde; print([m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # torch itself may bring one of them; then it is not ours
    bare = code.replace("sys, flowsde", "sys, torch")
    base = subprocess.run([sys.executable, "-c", bare], capture_output=True, text=True, check=True)
    assert out.stdout == base.stdout
