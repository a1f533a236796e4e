"""Builds the wheel: the package, the top-level `kernels/` folder as `gasp_fast.kernels`, and each `csrc/*.cpp` as
one pybind11 module `gasp_fast._NAME`.

`kernels/` has no `__init__.py` and is reached through the link `gasp_fast/kernels`. A regular package of that name
in the working directory would shadow Hugging Face's `kernels`, which transformers probes; a folder without
`__init__.py` never wins over an installed package.

The extensions see raw pointers and NumPy arrays, never a torch header: they compile in seconds and one binary
serves every torch version.
"""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

HERE = Path(__file__).parent


def extensions() -> list[Pybind11Extension]:
    return [
        Pybind11Extension(
            f"gasp_fast._{source.stem}",
            [str(source.relative_to(HERE))],
            cxx_std=17,
            # Loops are vectorised per instruction set at run time (target_clones), so a wheel is portable.
            extra_compile_args=["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wall"],
            extra_link_args=["-fopenmp"],
        )
        for source in sorted((HERE / "csrc").glob("*.cpp"))
    ]


setup(
    packages=[*find_packages(include=["gasp_fast", "gasp_fast.*"]), "gasp_fast.kernels"],
    ext_modules=extensions(),
    cmdclass={"build_ext": build_ext},
)
