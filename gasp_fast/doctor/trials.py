"""Runs compiled code on an input so small that the right result is known.

Our extensions are called directly: the modules that use them may import packages that are not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gasp_fast.files import one_line

from . import hardware, installed
from .finding import BROKEN, MISSING, OK, Finding

TOLERANCE = 1e-5  # relative error of the float32 loss and gradient that every backend keeps


# ---- the loss -------------------------------------------------------------------------------------------------------


def loss_against_float64(name: str, device: str = "cpu") -> Iterator[Finding]:
    """`gasp_loss` with the backend that training would use, compared with `naive_loss` in float64."""
    try:
        backend, loss_error, gradient_error = _loss_errors(device)
    except Exception as error:  # torch, NumPy or our own code may raise anything
        yield Finding(BROKEN, name, f"the loss cannot be computed on {device}: {one_line(error)}")
        return
    agrees = max(loss_error, gradient_error) <= TOLERANCE  # False for NaN
    yield Finding(
        OK if agrees else BROKEN,
        name,
        f"backend {backend} {'agrees with' if agrees else 'DIFFERS from'} float64 on {device}: "
        f"loss {loss_error:.0e}, gradient {gradient_error:.0e} (relative, at most {TOLERANCE:.0e})",
    )


def _loss_errors(device: str) -> tuple[str, float, float]:
    import torch

    from gasp_fast.loss.function import gasp_loss
    from gasp_fast.loss.matches import Matches
    from gasp_fast.loss.naive import naive_loss

    generator = torch.Generator().manual_seed(0)
    tokens, frame = 36, 12
    anchor = torch.arange(0, frame).repeat(2)
    target = torch.randint(frame, generator=generator, size=anchor.shape) + frame * (1 + torch.arange(24) // 12)
    matches = Matches(
        frame_offsets=torch.arange(0, tokens + 1, frame),
        anchor=anchor,
        target=target,
        target_depth=0.5 + torch.rand(24, generator=generator),
        patch_depth=0.5 + torch.rand(tokens, generator=generator),
    )
    embeddings = torch.randn(2, tokens, 32, generator=generator)

    leaf = embeddings.to(device, copy=True).requires_grad_()
    out = gasp_loss(leaf, matches.to(device))
    out.loss.backward()
    loss, gradient = out.loss.detach().double().cpu(), leaf.grad.double().cpu()  # type: ignore[union-attr]
    leaf = embeddings.double().requires_grad_()
    truth = naive_loss(leaf, matches).loss
    truth.backward()
    true_loss, true_gradient = truth.detach(), leaf.grad
    assert true_gradient is not None
    loss_error = (loss - true_loss).abs() / true_loss.abs()
    return out.backend, float(loss_error), float((gradient - true_gradient).norm() / true_gradient.norm())


def process_groups() -> Iterator[Finding]:
    import torch.distributed as distributed

    names = []
    if distributed.is_available():
        names += ["gloo"] * distributed.is_gloo_available() + ["nccl"] * distributed.is_nccl_available()
    found = ", ".join(names) or "none: this torch trains with one process only"
    yield Finding(OK if names else MISSING, "process groups", found)


def processors_alone() -> Iterator[Finding]:
    """transformers' processors import torchvision. Our backbones make that possible beside any torch, for us alone."""
    if not installed.has_module("transformers"):
        return
    from gasp_fast.backbones import torchvision_shim

    name, statement = "processors alone", "from transformers import AutoProcessor"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", statement], env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        yield Finding(OK, name, f"`{statement}` works in a script without gasp_fast")
    elif torchvision_shim.install():
        reason = f"torchvision {installed.version_of('torchvision')} is built for another torch"
        found = f"{reason}: `{statement}` fails in a script without gasp_fast"
        yield Finding(MISSING, name, found, _torchvision_command())
    else:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        yield Finding(BROKEN, name, f"`{statement}` fails: {lines[-1]}", installed.install_command("train"))


def _torchvision_command() -> str:
    """Installs the same version of torchvision in torch's own build."""
    import torch

    version = (installed.version_of("torchvision") or "").partition("+")[0]
    build = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cpu"
    words = ("--force-reinstall", "--no-deps", f"torchvision=={version}", "--index-url", installed.TORCH_INDEX + build)
    return "" if torch.version.hip else installed.pip_install(*words)


# ---- our extensions -------------------------------------------------------------------------------------------------


def rows_extension() -> Iterator[Finding]:
    flags = hardware.cpu_flags()
    loops = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "baseline"
    yield _extension("_rows", _try_rows, f"uses {loops} instructions", "PyTorch computes the loss instead, slower")


def tracks_extension() -> Iterator[Finding]:
    yield _extension("_tracks", _try_tracks, "", "NumPy computes tracks instead, slower")


def render_extension() -> Iterator[Finding]:
    yield _extension("_render", _try_render, "", "gasp-fast render and the demo do not work")


def _extension(name: str, trial: Callable[[Any], bool], note: str, without: str) -> Finding:
    label, cure = f"{name} (C++)", installed.install_command("", "--force-reinstall", "--no-deps")
    if importlib.util.find_spec(f"gasp_fast.{name}") is None:
        return Finding(MISSING, label, f"not built (needs a C++ compiler): {without}", cure)
    try:
        right = trial(importlib.import_module(f"gasp_fast.{name}"))
    except Exception as error:  # built for another Python or NumPy, a missing library ...
        return Finding(BROKEN, label, one_line(error), cure)
    if not right:
        return Finding(BROKEN, label, "computes a wrong result", cure)
    return Finding(OK, label, f"built, works{', ' if note else ''}{note}")


def _try_rows(rows: Any) -> bool:
    import numpy as np

    out = np.empty(2, np.float32)
    rows.inverse_norms(np.array([[3, 4], [0, 0.5]], np.float32), out, 1)
    return bool(np.allclose(out, [0.2, 2.0], rtol=1e-6))


def _try_tracks(tracks: Any) -> bool:
    import numpy as np

    depth = np.array([[1, 2, 0, 4], [3, 2, 0, 0]], np.float32)  # two patches of 2 x 2 pixels; 0 is unknown
    pooled = tracks.pool([depth], np.array([[0, 2, 4]]), np.array([[0, 2]]), 1)
    return bool(np.array_equal(np.ravel(pooled), [2.0, 4.0]))


def _try_render(render: Any) -> bool:
    """Renders one pixel from the middle of an empty room: the wall is 3 metres away."""
    import numpy as np

    room = np.array([[-3.0, -3, -3], [3, 3, 3]])
    colour, depth, surface = render.render(
        room=room, lamp=np.zeros(3), boxes=np.zeros((0, 15)), surface_texture=np.zeros(6, np.int32),
        surface_colour=np.ones((6, 3)), texels=np.ones(5, np.float32), texture_count=1, texture_size=2,
        texture_metres=1.0, camera_to_world=np.eye(4), intrinsics=np.array([1.0, 1.0, 0.5, 0.5]), width=1, height=1,
        samples=1,
    )  # fmt: skip
    return bool(depth.item() == 3.0 and 0 <= surface.item() < 6 and np.isfinite(colour).all())


# ---- packages with compiled parts: each function returns what works, or raises ---------------------------------------


def _torch() -> str:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPU"
    if float(torch.ones(8, 8).matmul(torch.ones(8, 8)).sum()) != 512.0:
        raise ArithmeticError("the product of two matrices is wrong")
    return f"{build} build"


def _torchvision() -> str:
    from gasp_fast.backbones.torchvision_shim import install

    declared = install()
    importlib.import_module("torchvision.transforms.v2")
    return "without its operators (built for another torch); none is used here" if declared else ""


def _pillow() -> str:
    from PIL import Image

    for kind in ("JPEG", "PNG"):
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, kind)
        Image.open(file).load()
    return "reads JPEG and PNG"


def _openexr() -> str:
    import numpy as np
    import OpenEXR

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "depth.exr")
        header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
        OpenEXR.File(header, {"Z": np.full((2, 2), 1.5, np.float32)}).write(path)
        with OpenEXR.File(path, separate_channels=True) as file:
            if not (np.array(file.channels()["Z"].pixels) == 1.5).all():
                raise ArithmeticError("a depth map is read with other values than were written")
    return "reads EXR depth"


def _av() -> str:
    import av

    decoders = [name for name in ("h264", "hevc", "vp9", "av1") if name in av.codecs_available]
    if "h264" not in decoders:
        raise LookupError("this FFmpeg cannot decode h264")
    return f"decodes {', '.join(decoders)}"


def _pycolmap() -> str:
    import pycolmap

    pycolmap.Reconstruction()
    return "reads COLMAP models"


OF_PACKAGES: dict[str, Callable[[], str]] = {
    "torch": _torch,
    "torchvision": _torchvision,
    "pillow": _pillow,
    "openexr": _openexr,
    "av": _av,
    "pycolmap": _pycolmap,
}
