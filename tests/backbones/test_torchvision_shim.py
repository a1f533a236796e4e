"""torchvision's operators are declared here only where torchvision cannot declare them itself."""

import subprocess
import sys
from pathlib import Path

import pytest

SHIM = Path(__file__).parents[2] / "gasp_fast" / "backbones" / "torchvision_shim.py"
DECLARES = """
import torch
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
FAILS = "import torch\ntorch.library.register_fake('torchvision::nms')(lambda *_: None)\n"  # as torchvision does
PROGRAM = f"""
import sys
sys.path[:0] = [{str(SHIM.parent)!r}]
import torchvision_shim
declared = torchvision_shim.install()
import torchvision
print(declared, torchvision_shim.install())
"""


@pytest.mark.parametrize(
    ("code", "library", "declared"),
    [
        (DECLARES, None, False),  # its library has a name that we do not know
        (FAILS, None, True),
        (FAILS, "_C.so", True),  # a library of another build: none at all
        (FAILS, "_C_stable.so", True),
    ],
)
def test_operators_are_declared_once(tmp_path: Path, code: str, library: str | None, declared: bool) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(code)
    if library:
        (package / library).write_bytes(b"of another build")
    environment = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [str(declared)] * 2, done.stderr[-1000:]


def test_the_torchvision_that_is_installed_can_be_imported() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], env={"PATH": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
