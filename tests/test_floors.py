"""Who may import whom: the house has floors, and nobody reaches up."""

import ast
from pathlib import Path

import pytest

import flowsde

ROOT = Path(flowsde.__file__).parent
FLOORS = [
    {"_scalar", "_random", "_once", "_files", "nn"},
    {"_state", "errors", "series"},
    {"_increment", "_batch"},
    {"paths"},
    {"dynamics", "stepping", "solution"},
    {"transforms", "integrators"},
    {"_outset"},
    {"_plan"},
    {"_save"},
    {"events"},
    {"_loop"},
    {"_tape", "_graft", "_graph"},
    {"_backsolve", "_retrace", "_leap", "_sweep"},
    {"adjoint", "executor"},
    {"solve", "bases"},
    {"steady"},
    {"flow"},
    {"accuracy", "objectives"},
    {"models"},
    {"training"},
    {"fitting"},
    {"interop", "compat"},
    {"__init__"},
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}


def top_imports(path: Path) -> set[str]:
    """Units of flowsde that a module imports at its top, or names for its types only."""
    package = path.relative_to(ROOT.parent).with_suffix("").parts
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level]
            parts = [*base, *(node.module or "").split(".")] if node.module else list(base)
            names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            found.update(names)
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_reach_down(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    unit = parts[0]
    assert unit in LEVEL, f"{unit} has no floor: give it one"
    for other in top_imports(path) - {unit}:
        assert LEVEL[other] < LEVEL[unit] or (unit, other) == ("integrators", "stepping"), (
            f"{unit} imports {other}, which stands no lower"
        )


def test_integrators_know_no_schedule_and_no_model() -> None:
    for path in (ROOT / "integrators").glob("*.py"):
        assert not top_imports(path) & {"paths", "transforms", "models"}, path


def test_only_state_uses_the_pytree_library() -> None:
    users = [p.name for p in ROOT.rglob("*.py") if "_pytree" in p.read_text()]
    assert users == ["_state.py"]
