"""`gasp-fast doctor`: its findings in environments with missing or broken parts, and its exit code."""

import ctypes
import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from support import liger_stand_in

from gasp_fast import cli, doctor
from gasp_fast.backbones import torchvision_shim
from gasp_fast.doctor import BROKEN, MISSING, OK, Finding, gpu, installed, packages, trials
from gasp_fast.kernels import engines, rows_cpp

ROOT = Path(__file__).parents[2]


def only(*checks):
    return {"the group": checks}


def run_doctor(tmp_path, *arguments):
    file = tmp_path / "doctor.json"
    code = cli.main(["doctor", "--json", str(file), *arguments])
    return code, json.loads(file.read_text())


def loss():
    yield from trials.loss_against_float64(doctor.LOSS_SELF_TEST)


# ---- whole environments ---------------------------------------------------------------------------------------------


def test_this_environment(tmp_path, capsys):
    code, result = run_doctor(tmp_path)
    printed = capsys.readouterr()
    assert result["loss_works"] and code == (1 if result["broken"] else 0)
    assert list(result["groups"]) == list(doctor.GROUPS)
    findings = [finding for group in result["groups"].values() for finding in group]
    assert result["broken"] == [finding["name"] for finding in findings if finding["state"] == "broken"]
    for finding in findings:
        assert finding["state"] in ("ok", "missing", "broken") and finding["found"]
        assert f"{finding['name']:<17} {finding['found']}\n" in printed.out
        assert not finding["cure"] or f"      {finding['cure']}\n" in printed.out
    torch_finding = next(finding for finding in result["groups"]["loss"] if finding["name"] == "torch")
    assert torch_finding["found"].startswith(torch.__version__)
    assert printed.err == ""


def site_of(folder, *roots):
    """A site folder with the named distributions and everything they require, and nothing else."""
    folder.mkdir()
    waiting, done = list(roots), set()
    while waiting:
        name = waiting.pop()
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        if name in done:
            continue
        done.add(name)
        waiting += [one.name for one in installed.requirements(name) if one.marker is None]
        for top in {file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}:
            target = folder / top
            if not target.exists():
                target.symlink_to(Path(str(package.locate_file(top))))
    return folder


@pytest.fixture
def ours():
    """The folder of gasp-fast's installed metadata. A build leaves a second one, `*.egg-info`, beside the source."""
    files = [(package, file) for package in distributions(name="gasp-fast") for file in package.files or ()]
    return next(Path(str(package.locate_file(file.parts[0]))) for package, file in files if file.name == "METADATA")


def doctor_in(site, preamble=""):
    """The doctor in a Python whose path holds our source, the standard library and `site`."""
    code = f"import sys; sys.path[:0] = [{str(site)!r}, {str(ROOT)!r}]\n{preamble}\n" + (
        "from gasp_fast.cli import main\nsys.exit(main(['doctor', '--json', sys.argv[1]]))"
    )
    command = [sys.executable, "-E", "-S", "-c", code, str(site.parent / "doctor.json")]
    out = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=site.parent)
    file = site.parent / "doctor.json"
    assert file.exists(), out.stderr
    return out, json.loads(file.read_text())


@pytest.mark.slow
def test_with_the_base_requirements_alone_the_loss_works_and_the_rest_is_missing(tmp_path, ours):
    site = site_of(tmp_path / "site", "torch", "numpy", "packaging")
    (site / ours.name).symlink_to(ours)
    out, result = doctor_in(site)
    assert out.stderr == ""
    states = {group: {f["name"]: f for f in findings} for group, findings in result["groups"].items()}
    for group, names in {
        "training": ("transformers", "peft", "accelerate", "deepspeed", "rich"),
        "evaluation": ("transformers", "matplotlib"),
        "scenes and data": ("av", "pycolmap", "pillow"),
    }.items():
        for name in names:
            assert states[group][name]["state"] == "missing"
    extra = shlex.split(states["training"]["peft"]["cure"])
    assert extra[0] == sys.executable and any(word.endswith("[train]") for word in extra)
    assert result["loss_works"] and result["broken"] == [] and out.returncode == 0


def test_without_torch_it_reports_that_and_exits_with_1(tmp_path, ours):
    site = site_of(tmp_path / "site", "packaging")
    (site / ours.name).symlink_to(ours)
    no_init = f"import types; p = types.ModuleType('gasp_fast'); p.__path__ = [{str(ROOT / 'gasp_fast')!r}]"
    out, result = doctor_in(site, f"{no_init}; sys.modules['gasp_fast'] = p")
    assert out.returncode == 1 and out.stderr == ""
    assert not result["loss_works"] and {"torch", "numpy", doctor.LOSS_SELF_TEST} <= set(result["broken"])
    assert "✗ torch" in out.stdout.replace("XX", "✗") and "Traceback" not in out.stdout


# ---- exit code ------------------------------------------------------------------------------------------------------


def test_a_missing_package_is_no_failure_and_a_broken_one_is(tmp_path, monkeypatch, capsys):
    def lacking():
        yield Finding(MISSING, "one", "not installed", "pip install two")
        yield Finding(MISSING, "two", "not installed", "pip install two")

    def wrong():
        yield Finding(BROKEN, "three", "out of range", "pip install three")

    monkeypatch.setattr(doctor, "GROUPS", only(loss, lacking))
    assert run_doctor(tmp_path)[0] == 0
    printed = capsys.readouterr().out
    assert printed.count("pip install two") == 1  # once, below both
    assert printed.endswith("The loss works. Nothing is broken.\n")
    monkeypatch.setattr(doctor, "GROUPS", only(loss, wrong))
    assert run_doctor(tmp_path)[0] == 1
    assert capsys.readouterr().out.endswith("The loss works. Broken: three.\n")
    monkeypatch.setattr(doctor, "GROUPS", only(lacking))  # the loss was not checked
    assert run_doctor(tmp_path)[0] == 1


def test_a_loss_that_is_wrong_is_found(monkeypatch):
    if engines.choose_backend("auto", torch.device("cpu"), torch.float32) != "cpp":
        pytest.skip("the C++ extension is not built")
    assert [finding.state for finding in loss()] == [OK]
    exact = rows_cpp.inverse_norms
    monkeypatch.setattr(rows_cpp, "inverse_norms", lambda *given: exact(*given) * 1.001)
    (finding,) = loss()
    assert finding.state == BROKEN and "DIFFERS" in finding.found


def test_a_check_that_raises_is_a_finding_and_the_others_still_run(monkeypatch):
    def raises():
        yield Finding(OK, "before", "there")
        raise RuntimeError("line one\nline two")

    def lacks():
        import no_such_package  # noqa: F401

        yield

    monkeypatch.setattr(doctor, "GROUPS", only(raises, lacks, loss))
    findings = [finding for _, finding in doctor.examine()]
    assert [finding.state for finding in findings] == [OK, BROKEN, MISSING, OK]
    assert findings[1] == Finding(BROKEN, "raises", "line one line two")
    assert findings[2] == Finding(MISSING, "lacks", "cannot be checked without no_such_package")


# ---- packages -------------------------------------------------------------------------------------------------------


class Finder:
    """A finder of Python's import system, placed before the others: the module is missing, or raises."""

    def __init__(self, name, error=None):
        self.name, self.error = name, error

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        if self.error is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return importlib.util.spec_from_loader(name, self)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        raise self.error


def intercept(monkeypatch, finder):
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    monkeypatch.delitem(sys.modules, finder.name, raising=False)


def test_a_package_whose_files_are_missing_is_broken_and_one_never_installed_is_missing(monkeypatch):
    assert packages.package("filelock", "", "cure").state == OK
    intercept(monkeypatch, Finder("filelock"))
    finding = packages.package("filelock", "", "cure")
    assert (finding.state, finding.cure) == (BROKEN, "cure")  # its metadata is still there
    monkeypatch.setattr(installed, "find", lambda name: None)
    finding = packages.package("filelock", ">=3", "cure")
    assert finding == Finding(MISSING, "filelock", "not installed (needs >=3)", "cure")
    assert packages.package("filelock", ">=3", "cure", required=True).state == BROKEN


def test_a_version_out_of_range_is_broken():
    version = distribution("filelock").version
    assert packages.package("filelock", f"=={version}", "").state == OK
    finding = packages.package("filelock", f">{version}", "cure")
    assert finding == Finding(BROKEN, "filelock", f"{version} is out of range (needs >{version})", "cure")


def test_a_package_made_for_another_torch_is_broken(monkeypatch):
    monkeypatch.setattr(installed, "requirements", lambda name: [Requirement("torch==1.0")])
    finding = packages.package("filelock", "", "cure")
    assert finding.state == BROKEN and f"needs torch==1.0, but {torch.__version__} is installed" in finding.found


def test_a_package_that_fails_when_it_is_tried_is_broken(monkeypatch):
    def fails():
        raise OSError("libfoo.so.7: cannot open shared object file")

    monkeypatch.setitem(trials.OF_PACKAGES, "filelock", fails)
    finding = packages.package("filelock", "", "cure")
    assert finding.state == BROKEN and "libfoo.so.7" in finding.found and finding.cure == "cure"


@pytest.mark.parametrize(
    ("module", "declared", "cuda", "state", "cure"),
    [
        ("AutoProcessor = 1", True, None, OK, ""),
        ("raise ImportError('no nms')", True, None, MISSING, "--index-url https://download.pytorch.org/whl/cpu"),
        ("raise ImportError('no nms')", True, "12.6", MISSING, "--index-url https://download.pytorch.org/whl/cu126"),
        ("raise ImportError('no tokenizers')", False, None, BROKEN, "[train]"),
    ],
)
def test_processors_are_tried_in_a_script_that_does_not_import_us(
    tmp_path, monkeypatch, module, declared, cuda, state, cure
):
    (tmp_path / "transformers.py").write_text(f"import sys\nassert 'gasp_fast' not in sys.modules\n{module}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torchvision_shim, "install", lambda: declared)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    (finding,) = trials.processors_alone()
    assert finding.state == state and cure in finding.cure and bool(finding.cure) == bool(cure)
    if state == BROKEN:
        assert "no tokenizers" in finding.found


def test_ranges_are_those_of_the_installed_distribution():
    listed = [Requirement(line) for line in distribution("gasp-fast").requires or ()]
    assert installed.range_of("torch") == str(next(one.specifier for one in listed if one.name == "torch"))
    added = {one.name for one in installed.requirements_of_extra("train")}
    assert added == {one.name for one in listed if 'extra == "train"' in str(one.marker)} - {"gasp-fast"}
    assert "peft" in added and "torch" not in added
    assert {one.name for one in installed.requirements_of_extra("")} == {one.name for one in listed if not one.marker}


@pytest.mark.parametrize(
    ("version", "wanted", "expected"),
    [
        ("2.13.0+cpu", "==2.13.0", True),
        ("2.13.0+cu130", ">=2.11", True),
        ("6.0.dev1", ">=5.17,<6", False),
        ("2.12.0a1", ">=2.11", True),  # a pre-release counts
        ("1.0", "", True),
        ("not a version", ">=1", False),
    ],
)
def test_a_version_is_in_range_or_not(version, wanted, expected):
    assert installed.satisfies(version, wanted) == expected


class Distribution:
    version = "0.1.0"

    def __init__(self, origin):
        self.origin = origin

    def read_text(self, name):
        return None if self.origin is None else json.dumps(self.origin)


@pytest.mark.parametrize(
    ("origin", "last"),
    [
        (None, ["gasp-fast[train]"]),
        ({"url": "file:///a/gasp.whl", "archive_info": {}}, ["gasp-fast[train] @ file:///a/gasp.whl"]),
        ({"url": "file:///my%20tree", "dir_info": {"editable": True}}, ["-e", "/my tree[train]"]),
    ],
)
def test_the_command_installs_from_where_it_was_installed(monkeypatch, origin, last):
    monkeypatch.setattr(installed, "find", lambda name: Distribution(origin))
    words = shlex.split(installed.install_command("train"))
    assert words == [sys.executable, "-m", "pip", "install", *last]


def test_without_pip_the_command_uses_uv_or_installs_pip_first(monkeypatch):
    monkeypatch.setattr(installed, "has_module", lambda name: name != "pip")
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/uv")
    assert installed.pip_install("x") == f"uv pip install --python {sys.executable} x"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    python = sys.executable
    assert installed.pip_install("x") == f"{python} -m ensurepip && {python} -m pip install x"


# ---- extensions and GPU ---------------------------------------------------------------------------------------------

EXTENSIONS = {"_rows": trials.rows_extension, "_tracks": trials.tracks_extension, "_render": trials.render_extension}


@pytest.mark.parametrize("name", EXTENSIONS)
def test_an_extension_that_raises_on_import_is_broken_and_one_that_is_not_built_is_missing(monkeypatch, name):
    module, check = f"gasp_fast.{name}", EXTENSIONS[name]
    if importlib.util.find_spec(module) is not None:
        assert [finding.state for finding in check()] == [OK]
    intercept(monkeypatch, Finder(module, ImportError("undefined symbol: _Zfoo")))
    (finding,) = check()
    assert finding.state == BROKEN and "undefined symbol: _Zfoo" in finding.found
    assert {"--force-reinstall", "--no-deps"} <= set(shlex.split(finding.cure))
    monkeypatch.setitem(sys.modules, module, None)  # import then fails as if it were not built
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (finding,) = check()
    assert finding.state == MISSING and "not built" in finding.found


def test_an_extension_that_computes_a_wrong_result_is_broken(monkeypatch):
    tracks = pytest.importorskip("gasp_fast._tracks")
    exact = tracks.pool
    monkeypatch.setattr(tracks, "pool", lambda *arguments: exact(*arguments) + 1)
    (finding,) = trials.tracks_extension()
    assert finding.state == BROKEN and "wrong result" in finding.found


@pytest.mark.parametrize(
    ("driver", "built", "available", "state", "cure"),
    [
        (None, None, False, MISSING, ""),
        ((13, 0), None, False, MISSING, "/cu130"),
        ((12, 8), "13.0", False, BROKEN, "/cu126"),
        ((13, 1), "13.0", False, BROKEN, ""),
        ((13, 1), "13.0", True, OK, ""),
    ],
)
def test_torch_against_the_driver(monkeypatch, driver, built, available, state, cure):
    monkeypatch.setattr(gpu, "driver_cuda", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (finding,) = gpu.torch_build()
    assert finding.state == state and (cure in finding.cure if cure else finding.cure == "")


def test_hidden_devices_are_not_broken_ones(monkeypatch):
    monkeypatch.setattr(gpu, "driver_cuda", lambda: (13, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (finding,) = gpu.torch_build()
    assert (finding.state, finding.cure) == (MISSING, "unset CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize(
    ("architectures", "capability", "state"),
    [
        (["sm_80", "sm_90a"], (9, 0), OK),
        (["sm_80"], (8, 6), OK),  # a later minor version
        (["sm_80", "sm_90"], (10, 0), BROKEN),
        (["sm_90", "compute_90"], (10, 0), OK),  # PTX is compiled for later devices
        (["sm_120"], (12, 0), OK),
        (["sm_86"], (8, 0), BROKEN),
    ],
)
def test_a_device_needs_code_in_torch(monkeypatch, architectures, capability, state):
    device = SimpleNamespace(name="GPU", total_memory=80e9, major=capability[0], minor=capability[1])
    monkeypatch.setattr(gpu, "usable", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)
    (finding,) = gpu.devices()
    assert finding.state == state and finding.found.startswith("2 x GPU, 80 GB, compute capability ")


def test_without_a_driver_there_is_nothing_to_fix(monkeypatch):
    def no_library(name):
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    monkeypatch.setattr(gpu, "driver_cuda", gpu.driver_cuda.__wrapped__)
    (finding,) = gpu.driver()
    assert (finding.state, finding.cure) == (MISSING, "")


def test_what_runs_on_this_machine_is_named(monkeypatch):
    monkeypatch.setattr(gpu, "usable", lambda: False)
    attention, layers = gpu.layers_in_use()
    assert attention == Finding(OK, "attention", "SDPA (CPU), where model.attention is auto")
    assert layers.state == OK and layers.found.startswith("transformers' norms, rotary embedding and MLPs")


@pytest.mark.parametrize(
    ("major", "attention", "needed"), [(8, "2", ["Liger", "FlashAttention 2"]), (9, "3", ["Liger"])]
)
def test_on_a_gpu_the_packages_that_make_it_faster_are_named_and_used(monkeypatch, major, attention, needed):
    monkeypatch.setattr(gpu, "usable", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, 0))
    for version in (2, 3):
        monkeypatch.setattr(f"transformers.utils.is_flash_attn_{version}_available", lambda: True)
    liger_stand_in.install(monkeypatch)
    kernel, layers = gpu.layers_in_use()
    assert kernel.found.startswith(f"FlashAttention {attention}, where") and layers.found.startswith("Liger's norms")
    monkeypatch.setattr(installed, "version_of", lambda name: None)
    missing = {finding.name: finding for finding in gpu.attention_and_layers()}
    assert {name for name, finding in missing.items() if finding.cure} == set(needed)
    assert "liger-kernel" in missing["Liger"].cure and missing["Liger"].state == MISSING
