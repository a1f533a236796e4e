"""The C++ extensions `gasp_fast._tracks` and `gasp_fast._render`.

They are imported by name. A plain `from gasp_fast import _tracks` would make this folder depend on the package's
`__init__.py`, and through it on the loss and the heads, which the import contracts forbid.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

Backend = Literal["auto", "cpp", "numpy"]


def tracks_extension(backend: Backend) -> Any | None:
    """`gasp_fast._tracks`, or None where NumPy computes: on request, or under "auto" if the extension is not built."""
    if backend not in ("auto", "cpp", "numpy"):
        raise ValueError(f'backend = {backend!r}; known are "auto", "cpp" and "numpy"')
    if backend == "numpy":
        return None
    try:
        return importlib.import_module("gasp_fast._tracks")
    except ImportError:
        if backend == "cpp":
            raise ValueError('backend = "cpp": gasp_fast._tracks is not built; run: pip install -e .') from None
        return None


def render_extension() -> Any:
    """`gasp_fast._render`, the renderer of the synthetic scenes; it has no substitute in NumPy."""
    try:
        return importlib.import_module("gasp_fast._render")
    except ImportError as error:
        raise OSError(
            "gasp_fast._render, the renderer, is not built here; gasp-fast doctor says how to build it"
        ) from error
