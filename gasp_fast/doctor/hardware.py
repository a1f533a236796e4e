"""Processor, memory, disk, compilers, and the cache of models. Uses the standard library only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from gasp_fast.processes import proc_line, processor_name, usable_cores

from . import installed
from .finding import MISSING, OK, Finding


def processor() -> Iterator[Finding]:
    flags = cpu_flags()
    known = [label for flag, label in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags][:1]
    if flags:
        known.append("AMX" if "amx_tile" in flags else "no AMX")
    yield Finding(OK, "CPU", ", ".join([processor_name(), f"{usable_cores()} cores", *known]))


def memory() -> Iterator[Finding]:
    total, free = (proc_line("/proc/meminfo", name) for name in ("MemTotal", "MemAvailable"))
    if total and free:
        yield Finding(OK, "memory", f"{_gigabytes(total)} GB, {_gigabytes(free)} GB of it free")
    else:
        yield Finding(OK, "memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB")


def disk() -> Iterator[Finding]:
    here = Path.cwd()
    yield Finding(OK, "disk", f"{shutil.disk_usage(here).free / 1e9:.0f} GB free in {here}")


def model_cache() -> Iterator[Finding]:
    """Where Hugging Face keeps models. Follows the rules of huggingface_hub, which may not be installed."""
    folder = _cache_folder()
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    found = f"{folder}{', offline (HF_HUB_OFFLINE): no model is downloaded' if offline else ''}"
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if os.access(existing, os.W_OK):
        yield Finding(OK, "model cache", f"{found}, {shutil.disk_usage(existing).free / 1e9:.0f} GB free")
    else:
        yield Finding(MISSING, "model cache", f"{found}, not writable", "export HF_HOME=A_WRITABLE_FOLDER")


def deepspeed_compilers() -> Iterator[Finding]:
    """DeepSpeed compiles an operator when it is first used; of our presets, only offloading to the CPU uses one."""
    if not installed.has_module("deepspeed"):
        return
    absent = [name for name in ("g++", "ninja") if shutil.which(name) is None]
    if absent == ["ninja"] and installed.has_module("ninja"):
        absent = []  # torch finds the ninja of its own Python environment
    if not absent:
        yield Finding(OK, "deepspeed ops", "g++ and ninja can compile them for *_offload.json, at the first step")
        return
    cure = installed.pip_install("ninja") if absent == ["ninja"] else ""
    yield Finding(MISSING, "deepspeed ops", f"no {' and no '.join(absent)}, needed for *_offload.json", cure)


def cpu_flags() -> set[str]:
    return set((proc_line("/proc/cpuinfo", "flags") or "").split())


def _cache_folder() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    home = Path(os.environ.get("HF_HOME") or home)
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser().absolute()


def _gigabytes(line: str) -> str:
    return f"{int(line.split()[0]) * 1024 / 1e9:.0f}"
