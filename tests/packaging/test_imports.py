"""The import contracts of pyproject.toml: they hold, and an import against their direction breaks them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def package(tmp_path):
    """A copy in which the link gasp_fast/kernels is a package, as `make lint` makes it."""
    copy = tmp_path / "gasp_fast"
    shutil.copytree(ROOT / "gasp_fast", copy, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (copy / "kernels" / "__init__.py").touch()
    return copy


def lint(package):
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache", "--no-logo", "--config", str(ROOT / "pyproject.toml")]
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    return subprocess.run(command, cwd=package.parent, env=environment, capture_output=True, text=True, timeout=120)


def test_the_import_contracts_hold(package):
    done = lint(package)
    assert done.returncode == 0 and " 0 broken" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("kernels/engines.py", "import gasp_fast.loss.matches"),
        ("loss/config.py", "from gasp_fast.supervision.heads import HeadsConfig"),
        ("supervision/heads.py", "from gasp_fast.backbones.base import Backbone"),  # neither imports the other
        ("data/scenes/scene.py", "from gasp_fast.loss.matches import Matches"),
        ("downstream/lmms/run.py", "from gasp_fast.files import read_json"),
        ("training/config.py", "def later():\n    import gasp_fast.cli.plan"),
    ],
)
def test_one_import_against_the_direction_breaks_them(package, module, statement):
    with (package / module).open("a") as file:
        file.write(f"\n{statement}\n")
    done = lint(package)
    assert done.returncode == 1 and "BROKEN" in done.stdout, done.stdout + done.stderr


def test_a_folder_that_no_layer_names_breaks_them(package):
    (package / "miscellaneous.py").write_text("")
    assert lint(package).returncode == 1
