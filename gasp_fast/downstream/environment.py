"""Finds lmms-eval's environment.

lmms-eval 0.7.3 needs other versions of av and wandb than this package does, so it has an environment of its own.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

VERSION = "0.7.3"
VARIABLE = "GASP_FAST_LMMS_EVAL"
DEFAULT = ".venv-eval"
# lmms-eval imports decord and filelock._api, but does not require decord and filelock < 4. It imports qwen-vl-utils for
# Qwen's videos. transformers is that of the export.
PACKAGES = (f"lmms-eval=={VERSION}", "decord", "qwen-vl-utils", "'transformers>=5.17,<6'", "'filelock<4'")


def install_command(folder: Path) -> str:
    return f"python3 -m venv {folder} && {folder}/bin/pip install {' '.join(PACKAGES)}"


def find_python(option: str | None) -> Path:
    """The Python of the environment that `option`, the variable `GASP_FAST_LMMS_EVAL`, or `.venv-eval` names."""
    folder = Path(option or os.environ.get(VARIABLE) or DEFAULT)
    python = folder / "bin" / "python"
    found = _version(python) if python.exists() else None
    if found is None:
        raise OSError(f"no lmms-eval in {folder}; make its environment with: {install_command(folder)}")
    if found != VERSION:
        raise OSError(
            f"{folder} has lmms-eval {found}, but tasks and scores here are those of {VERSION}; make another "
            f"environment with: {install_command(Path(DEFAULT))}"
        )
    return python.absolute()


def _version(python: Path) -> str | None:
    code = "from importlib.metadata import version; print(version('lmms-eval'))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=60)
    return done.stdout.strip() if done.returncode == 0 else None
