"""NVIDIA driver and devices, torch's CUDA build, and packages only used on a GPU. Not yet run on a GPU."""

from __future__ import annotations

import ctypes
import importlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from gasp_fast.files import one_line

from . import installed, packages, trials
from .finding import BROKEN, MISSING, OK, Finding
from .installed import satisfies

FLASH_ATTENTION_3 = "git+https://github.com/Dao-AILab/flash-attention.git#subdirectory=hopper"


def driver() -> Iterator[Finding]:
    supported = driver_cuda()
    if supported is None:
        yield Finding(MISSING, "NVIDIA driver", "none: no NVIDIA GPU can be used")
    else:
        yield Finding(OK, "NVIDIA driver", f"{_driver_version() or 'version not known'}, up to CUDA {_dots(supported)}")


def torch_build() -> Iterator[Finding]:
    """Whether torch is built for CUDA, in a version that the driver supports, and sees a device."""
    import torch

    supported, built = driver_cuda(), torch.version.cuda
    if built is None:
        found = f"torch {torch.__version__} is not built for CUDA"
        yield Finding(MISSING, "CUDA in torch", found, _torch_command(supported) if supported else "")
    elif supported is None:
        yield Finding(OK, "CUDA in torch", f"built for CUDA {built}")
    elif int(built.split(".")[0]) > supported[0]:
        found = f"torch is built for CUDA {built}, the driver supports {_dots(supported)}: update the driver, or torch"
        yield Finding(BROKEN, "CUDA in torch", found, _torch_command(supported))
    elif torch.cuda.is_available():
        yield Finding(OK, "CUDA in torch", f"built for CUDA {built}")
    elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield Finding(MISSING, "CUDA in torch", "CUDA_VISIBLE_DEVICES hides every GPU", "unset CUDA_VISIBLE_DEVICES")
    else:
        yield Finding(
            BROKEN, "CUDA in torch", f"built for CUDA {built}, but sees no device; run nvidia-smi for the reason"
        )


def devices() -> Iterator[Finding]:
    if not usable():
        return
    import torch

    all_devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    models = Counter((one.name, round(one.total_memory / 1e9), one.major, one.minor) for one in all_devices)
    for (name, gigabytes, major, minor), count in models.items():
        found = f"{count} x {name}, {gigabytes} GB, compute capability {major}.{minor}"
        if _has_code(torch.cuda.get_arch_list(), major, minor):
            yield Finding(OK, "GPU", found)
        else:
            yield Finding(BROKEN, "GPU", f"{found}, for which torch contains no code", _torch_command(driver_cuda()))


def triton() -> Iterator[Finding]:
    specifier = installed.range_of("triton")
    finding = packages.package("triton", specifier, installed.pip_install(f"triton{specifier}"))
    if finding.state == MISSING and not usable():
        yield Finding(MISSING, "triton", "not installed; only used on a GPU")
    elif finding.state == OK and not usable():
        yield Finding(OK, "triton", f"{finding.found}, no device to run on")
    else:
        yield finding


def loss_on_device() -> Iterator[Finding]:
    """Compiles and launches the Triton kernels of a small problem."""
    if usable():
        yield from trials.loss_against_float64("loss on the GPU", "cuda")


def attention_and_layers() -> Iterator[Finding]:
    """Optional packages that make the base model faster, by the module names that transformers looks for."""
    specifier = installed.range_of("flash-attn")
    flash = installed.pip_install(f"flash-attn{specifier}", "--no-build-isolation")
    yield _extra(
        "FlashAttention 2",
        "flash-attn",
        "flash_attn",
        specifier,
        flash,
        faster=_faster_attention() == "flash_attention_2",
    )
    hopper = installed.pip_install("--no-build-isolation", FLASH_ATTENTION_3)
    yield _extra("FlashAttention 3", "flash-attn-3", "flash_attn_interface", "", hopper, faster=False)
    specifier = installed.range_of("liger-kernel")
    liger = installed.pip_install(f"liger-kernel{specifier}")
    yield _extra("Liger", "liger-kernel", "liger_kernel", specifier, liger, faster=usable())


def layers_in_use() -> Iterator[Finding]:
    """What `model.attention` and `model.liger` choose on this machine where they are auto, for Qwen2.5-VL-7B."""
    import torch

    from gasp_fast.backbones.attention_kernel import attention_kernel
    from gasp_fast.backbones.base import AttentionShape
    from gasp_fast.backbones.base_model import ModelConfig, choose_attention
    from gasp_fast.backbones.liger import choose_liger
    from gasp_fast.backbones.qwen2_5_vl import Qwen2_5_VL
    from gasp_fast.planning.shapes import QWEN2_5_VL_7B as shape

    device = torch.device("cuda" if usable() else "cpu")
    heads = AttentionShape(shape.query_heads, shape.key_heads, shape.head_dim)
    attention = choose_attention(ModelConfig(source=Qwen2_5_VL.model_type), device)
    kernel = attention_kernel(attention, heads, device, torch.bfloat16)
    yield Finding(OK, "attention", f"{kernel}, where model.attention is auto")
    layers = "Liger's" if choose_liger("auto", Qwen2_5_VL, device) else "transformers'"
    yield Finding(OK, "decoder layers", f"{layers} norms, rotary embedding and MLPs, where model.liger is auto")


def _faster_attention() -> str | None:
    """The FlashAttention that is at least as fast as SDPA on this GPU."""
    if not usable():
        return None
    import torch

    from gasp_fast.backbones.base_model import FLASH_ATTENTION

    return FLASH_ATTENTION.get(torch.cuda.get_device_capability()[0])


def _extra(label: str, distribution: str, module: str, specifier: str, cure: str, faster: bool) -> Finding:
    """`faster`: whether this machine would train faster with the package."""
    version = installed.version_of(distribution)
    if version is None or not installed.has_module(module):
        use = "this GPU trains faster with it" if faster else "no faster here" if usable() else "only used on a GPU"
        return Finding(MISSING, label, f"not installed; {use}", cure if faster else "")
    if not satisfies(version, specifier):
        return Finding(BROKEN, label, f"{version} is out of range (needs {specifier})", cure)
    if usable():
        try:
            importlib.import_module(module)
        except Exception as error:  # usually because it was compiled for another torch
            return Finding(BROKEN, label, f"{version} does not import: {one_line(error)}", cure)
    return Finding(OK, label, version if usable() else f"{version}, no device to run on")


# ---- driver ---------------------------------------------------------------------------------------------------------


@cache
def usable() -> bool:
    """Whether torch sees an NVIDIA GPU."""
    try:
        import torch
    except Exception:  # reported by the check of the package torch
        return False
    return torch.version.cuda is not None and torch.cuda.is_available()


@cache
def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA version that the driver supports, as the driver reports it; None without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)) != 0 or number.value == 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


def _driver_version() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\d{3,}\.\d+(\.\d+)?", text)
    return found[0] if found else None


def _has_code(architectures: list[str], major: int, minor: int) -> bool:
    """Whether one of them runs on the device: machine code (`sm_`) on the same major version and the same or a later
    minor one, PTX (`compute_`) on every later version."""
    for name in architectures:
        kind, _, number = name.partition("_")
        digits = re.sub(r"\D", "", number)
        built = (int(digits[:-1]), int(digits[-1]))
        same_major = kind == "sm" and built[0] == major and built[1] <= minor
        if same_major or (kind == "compute" and built <= (major, minor)):
            return True
    return False


def _torch_command(supported: tuple[int, int] | None) -> str:
    """Installs torch from the index of the driver's CUDA major version; a driver supports all its minor versions."""
    specifier, major = installed.range_of("torch"), supported[0] if supported else 13
    index = installed.TORCH_INDEX + {12: "cu126", 13: "cu130"}.get(major, f"cu{major}0")
    return installed.pip_install("--force-reinstall", f"torch{specifier}", "torchvision", "--index-url", index)


def _dots(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
