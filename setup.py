"""Builds the wheel: the package, the top-level folder `kernels/` as `gasp_fast.kernels`, and each `csrc/*.cpp` as
one pybind11 module `gasp_fast._NAME`.

`kernels/` has no `__init__.py` and is imported through the link `gasp_fast/kernels`. With an `__init__.py` it would
shadow Hugging Face's package `kernels`, which transformers looks for, whenever Python runs in this folder; without one,
an installed package takes precedence.

The extensions take raw pointers and NumPy arrays and include no torch header. They compile in seconds, and one binary
works with every torch version.
"""

import shutil
import subprocess
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

HERE = Path(__file__).parent
HOPPER = "-gencode=arch=compute_90a,code=sm_90a"


def extensions() -> list[Pybind11Extension]:
    return [
        Pybind11Extension(
            f"gasp_fast._{source.stem}",
            [str(source.relative_to(HERE))],
            depends=[str(header.relative_to(HERE)) for header in sorted(source.parent.glob("*.h"))],
            cxx_std=17,
            # A wheel is portable: each loop has a version per instruction set, chosen at run time (target_clones).
            extra_compile_args=["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wall"],
            extra_link_args=["-fopenmp"],
        )
        for source in sorted((HERE / "csrc").glob("*.cpp"))
    ]


class BuildExtensions(build_ext):
    """Also compiles each `csrc/*.cu` into a library with a C interface, given nvcc and a CUDA build of torch."""

    def run(self) -> None:
        super().run()
        if not can_use_cuda():
            return
        for source in sorted((HERE / "csrc").glob("*.cu")):
            package = HERE if self.inplace else Path(self.build_lib)
            library = package / "gasp_fast" / f"libgasp_{source.stem}.so"
            library.parent.mkdir(parents=True, exist_ok=True)
            command = ["nvcc", "-O3", "-std=c++17", HOPPER, "-shared", "-Xcompiler=-fPIC", "-o", library, source]
            subprocess.run(list(map(str, command)), check=True)


def can_use_cuda() -> bool:
    """Whether nvcc and a CUDA build of torch are present. An isolated build does not see torch."""
    try:
        import torch
    except ImportError:
        return False
    return torch.version.cuda is not None and shutil.which("nvcc") is not None


setup(
    packages=[*find_packages(include=["gasp_fast", "gasp_fast.*"]), "gasp_fast.kernels"],
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtensions},
)
