"""Builds the wheel: the package, the top-level folder `kernels/` as `gasp_fast.kernels`, and each `csrc/*.cpp` as
one pybind11 module `gasp_fast._NAME`.

`kernels/` has no `__init__.py` and is imported through the link `gasp_fast/kernels`. With an `__init__.py` it would
shadow Hugging Face's package `kernels`, which transformers looks for, whenever Python runs in this folder; without one,
an installed package takes precedence.

The extensions take raw pointers and NumPy arrays and include no torch header. They compile in seconds, and one binary
works with every torch version.
"""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_namespace_packages, setup

HERE = Path(__file__).parent


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


setup(
    # Also folders without code: recipes, templates.
    packages=find_namespace_packages(include=["gasp_fast", "gasp_fast.*"], exclude=["*.__pycache__*"]),
    ext_modules=extensions(),
    cmdclass={"build_ext": build_ext},
)
