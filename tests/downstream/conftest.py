"""lmms-eval's environment, made once in build/: a virtual environment that also sees the packages of this one."""

import fcntl
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support.answering import build_answering
from support.benchmark_data import write_all

from gasp_fast.downstream.environment import PACKAGES, VERSION

ENVIRONMENT = Path(__file__).parents[2] / "build" / f"lmms-eval-{VERSION}"


@pytest.fixture(scope="session")
def environment():
    """The folder of the environment. torch and transformers are this environment's: a second torch takes minutes."""
    ENVIRONMENT.parent.mkdir(exist_ok=True)
    with open(ENVIRONMENT.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another file's tests may be making it
        if not (ENVIRONMENT / "complete").exists():
            install()
            (ENVIRONMENT / "complete").touch()
    return ENVIRONMENT


def install():
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
    paths = sysconfig.get_paths(vars={"base": str(ENVIRONMENT), "platbase": str(ENVIRONMENT)})
    Path(paths["purelib"], "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    wanted = [package.strip("'") for package in PACKAGES if not package.startswith("'transformers")]
    command = [str(ENVIRONMENT / "bin" / "python"), "-m", "pip", "install", "-q", "--no-compile", *wanted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    if done.returncode:
        pytest.skip(f"lmms-eval cannot be installed here: {done.stderr.strip().splitlines()[-1][:200]}")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def answering(tmp_path_factory):
    """Makes tiny models that always give the same answer: `answering("qwen2_5_vl", "B")`."""
    folder, made = tmp_path_factory.mktemp("answering"), {}

    def make(family, answer):
        if (family, answer) not in made:
            made[family, answer] = build_answering(folder / f"{family}-{answer}", family, answer)
        return made[family, answer]

    return make
