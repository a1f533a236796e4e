"""Makes torchvision importable next to a torch build that cannot load torchvision's compiled operators.

The torchvision of the package index is compiled for CUDA. Beside a CPU build of torch its library does not load, its
operators stay undeclared, and `import torchvision` then stops with "operator torchvision::nms does not exist" because
it attaches shape functions to them. transformers' image and video processors use none of those operators, only
torchvision's transforms, which are plain Python. So it is enough to declare the two operators that get shape
functions. Nothing changes where torchvision can load its library (any matching build).

Call `install()` before anything imports torchvision.
"""

from __future__ import annotations

import importlib.util
import sys
from contextlib import suppress
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declarations: torch.library.Library | None = None  # operators live as long as the library object that declares them


def install() -> bool:
    """Declare torchvision's operators if its library cannot be loaded. Returns whether they are declared here."""
    global _declarations
    if _declarations is not None:
        return True
    spec = importlib.util.find_spec("torchvision")
    if spec is None or _operators_load(Path(str(spec.origin)).parent):
        return False
    _declarations = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        _declarations.define(schema)
    return True


def _operators_load(package: Path) -> bool:
    """Whether torchvision declares its operators itself. Loads its own library, as `import torchvision` does."""
    libraries = [path for path in package.glob("_C*") if path.suffix in (".so", ".pyd")]
    for library in libraries:  # _C, or _C_stable from 0.29 on
        with suppress(OSError):  # it is of another build
            torch.ops.load_library(str(library))
    if libraries or hasattr(torch.ops.torchvision, "nms"):
        return hasattr(torch.ops.torchvision, "nms")
    try:  # the library has another name: operators that are declared twice would end the process
        importlib.import_module("torchvision")
    except Exception:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        return False
    return True
