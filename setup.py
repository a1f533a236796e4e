"""Builds the wheel: the package, the top-level `kernels/` folder as `gasp_fast.kernels`, and each `csrc/*.cpp` as
one pybind11 module `gasp_fast._NAME`.

`kernels/` has no `__init__.py` and is reached through the link `gasp_fast/kernels`. A regular package of that name
in the working directory would shadow Hugging Face's `kernels`, which transformers probes; a folder without
`__init__.py` never wins over an installed package.

The extensions see raw pointers and NumPy arrays, never a torch header: they compile in seconds and one binary
serves every torch version.
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
            depends=[str(header.relative_to(HERE)) for header in sorted(source.parent.glob(f"{source.stem}*.h"))],
            cxx_std=17,
            # Loops are vectorised per instruction set at run time (target_clones), so a wheel is portable.
            extra_compile_args=["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wall"],
            extra_link_args=["-fopenmp"],
        )
        for source in sorted((HERE / "csrc").glob("*.cpp"))
    ]


class BuildExtensions(build_ext):
    """Also compiles each `csrc/*.cu` into a library with a plain C interface, where a GPU build of torch can use it."""

    def run(self) -> None:
        super().run()
        for source in sorted((HERE / "csrc").glob("*.cu")) if cuda_is_wanted() else ():
            package = HERE if self.inplace else Path(self.build_lib)
            library = package / "gasp_fast" / f"libgasp_{source.stem}.so"
            library.parent.mkdir(parents=True, exist_ok=True)
            command = ["nvcc", "-O3", "-std=c++17", HOPPER, "-shared", "-Xcompiler=-fPIC", "-o", library, source]
            subprocess.run(list(map(str, command)), check=True)


def cuda_is_wanted() -> bool:
    """nvcc, and a torch that has a use for what it makes (seen only without build isolation)."""
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
