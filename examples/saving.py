"""Files that are written whole or not at all: aside first, then in place of the old ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["picture", "record"]


def picture(figure: Any, path: Path) -> None:
    """Saves a figure of matplotlib, and closes it."""
    from matplotlib import pyplot as plt

    figure.tight_layout()
    aside = path.with_suffix(".part.png")
    figure.savefig(aside, dpi=110)
    aside.replace(path)
    plt.close(figure)


def record(found: Any, path: Path) -> None:
    """Writes what was found, as JSON."""
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(found, indent=1))
    aside.replace(path)
