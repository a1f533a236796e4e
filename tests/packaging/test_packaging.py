"""The installed package: a light import, a wheel that works without the source tree, no conflict over `kernels`."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTALLED = Path(__file__).with_name("installed.py")
TASKS = ROOT / "gasp_fast" / "downstream" / "lmms" / "tasks"


def python(code, cwd, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TRITON"))}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, timeout=240
    )


@pytest.mark.alone
def test_importing_the_loss_needs_torch_alone_and_is_quick():
    code = """
import sys, time, torch, json
start = time.process_time()
import gasp_fast
took = time.process_time() - start
packages = {"transformers", "peft", "deepspeed", "triton", "PIL", "matplotlib", "pycolmap", "av", "rich"}
heavy = packages & set(sys.modules)
print(json.dumps([took, sorted(heavy)]))
"""
    out = python(code, ROOT)
    assert out.returncode == 0, out.stderr
    took, heavy = json.loads(out.stdout.splitlines()[-1])
    assert took < 0.5
    import torch  # a CUDA build of torch imports triton itself

    assert heavy == [] or torch.cuda.is_available()


def test_the_public_names_are_there():
    names = [
        "CorrespondenceHead",
        "GaspCallback",
        "GaspLoss",
        "LossConfig",
        "attach",
        "Matches",
        "build_tracks",
        "frame_match",
        "gasp_loss",
        "open_scene",
    ]
    code = f"import gasp_fast; print(all(hasattr(gasp_fast, n) and n in dir(gasp_fast) for n in {names}))"
    assert python(code, ROOT).stdout.strip() == "True"


def test_a_name_whose_extra_is_not_installed_says_what_to_install():
    code = """
import sys
sys.modules["PIL"] = None  # as if it were not installed
import gasp_fast
for name in ("attach", "open_scene"):
    try:
        getattr(gasp_fast, name)
    except ModuleNotFoundError as error:
        print(error)
"""
    done = python(code, ROOT)
    of_attach, of_open_scene = done.stdout.splitlines()
    assert of_attach.startswith("gasp_fast.attach needs PIL") and "pip install 'gasp-fast[train]'" in of_attach
    assert of_open_scene.startswith("gasp_fast.open_scene needs PIL") and "'gasp-fast[data]'" in of_open_scene


@pytest.mark.parametrize("installed", [False, True])
def test_our_kernels_folder_never_shadows_hugging_faces_package(tmp_path, installed):
    """In the repository's root, where the working directory contains a folder `kernels/`."""
    if installed:  # in place of the real package, last on the path
        package = tmp_path / "site" / "kernels"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("__version__ = '9.9.9'\ndef get_kernel(name): return name\n")
    code = f"""
import sys
sys.path.append({str(tmp_path / "site")!r})
import transformers
from transformers.utils import is_kernels_available
import importlib
try:
    found = importlib.import_module("kernels")
    print("file", getattr(found, "__file__", None))
except ImportError:
    print("file", None)
print("available", is_kernels_available())
import gasp_fast.kernels.engines
print("ours", gasp_fast.kernels.engines.__file__)
"""
    out = python(code, ROOT)
    assert out.returncode == 0, out.stderr
    pairs = [line.split(" ", 1) for line in out.stdout.splitlines() if " " in line]
    lines = {name: value for name, value in pairs if name in ("file", "available", "ours")}
    if installed:
        assert lines["file"] == str(tmp_path / "site" / "kernels" / "__init__.py")
    else:
        assert lines["file"] == "None" and lines["available"] == "False"
    assert lines["ours"].endswith("engines.py")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the files in git, through an sdist, as for a release."""
    work = tmp_path_factory.mktemp("build")
    source = work / "source"
    source.mkdir()
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    tar = subprocess.run(["tar", "--null", "-T-", "-cf-"], cwd=ROOT, input=listed, capture_output=True, check=True)
    subprocess.run(["tar", "-xf-"], cwd=source, input=tar.stdout, check=True)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(work / "dist"), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert list((work / "dist").glob("*.tar.gz"))
    return next((work / "dist").glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_works_outside_the_source_tree_and_without_a_compiler(wheel, tmp_path):
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True, timeout=120)
    assert {path.name for path in site.iterdir()} >= {"gasp_fast"}
    assert not any((site / name).exists() for name in ("tests", "kernels", "benchmarks"))
    tasks = {path.relative_to(ROOT) for path in TASKS.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert len(tasks) > 8 and all((site / task).is_file() for task in tasks)
    shutil.copy(INSTALLED, tmp_path)
    out = python("import installed; installed.main()", tmp_path, PYTHONPATH=str(site), PATH=str(tmp_path))
    assert out.returncode == 0 and str(site) in out.stdout, out.stdout + out.stderr
    listed = python("from gasp_fast.cli import main; main(['recipes'])", tmp_path, PYTHONPATH=str(site))
    assert "qwen2_5_vl_7b " in listed.stdout and "deepspeed = zero1, zero2" in listed.stdout, listed.stderr


@pytest.mark.slow
def test_the_wheel_declares_its_extras_and_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(archive.read(n).decode() for n in archive.namelist() if n.endswith("METADATA"))
        entry = next(archive.read(n).decode() for n in archive.namelist() if n.endswith("entry_points.txt"))
    for extra in ("train", "eval", "gpu", "dev"):
        assert f"Provides-Extra: {extra}" in metadata
    assert "gasp-fast = gasp_fast.cli:main" in entry
    assert "License-Expression: Apache-2.0" in metadata


def test_wheels_of_a_release_are_built_for_every_python_that_is_named():
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = [line.split(" :: ")[-1] for line in project["project"]["classifiers"] if "Python :: 3." in line]
    assert project["tool"]["cibuildwheel"]["build"] == [f"cp{version.replace('.', '')}-*" for version in named]
    assert project["project"]["requires-python"] == f">={named[0]}"
