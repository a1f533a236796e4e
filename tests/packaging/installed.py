"""Checks an installed package, with torch and NumPy alone: `python tests/packaging/installed.py`.

`.github/workflows/wheels.yml` tests each wheel of a release with it, `test_packaging.py` the wheel of this checkout.
"""

import sys
from pathlib import Path

import torch

import gasp_fast
from gasp_fast.doctor import trials
from gasp_fast.doctor.finding import OK
from gasp_fast.kernels import surfaces


def main() -> None:
    home = Path(gasp_fast.__file__).parent
    assert not (home.parent / "setup.py").exists(), f"this is a checkout, not an installed package: {home}"

    for trial in (trials.rows_extension, trials.tracks_extension, trials.render_extension):
        for finding in trial():
            assert finding.state == OK, finding

    assert surfaces.available(torch.device("cpu"))
    matches = gasp_fast.Matches(
        frame_offsets=torch.tensor([0, 3, 6]), anchor=torch.tensor([0]), target=torch.tensor([4])
    )
    embeddings = torch.randn(2, 6, 8, requires_grad=True)
    out = gasp_fast.gasp_loss(embeddings, matches)
    out.loss.backward()
    assert out.backend == "cpp" and embeddings.grad is not None and bool(embeddings.grad.isfinite().all())

    for needed in ("py.typed", "recipes/qwen2_5_vl_7b.yaml", "recipes/deepspeed/zero2.json", "kernels/engines.py"):
        assert (home / needed).is_file(), f"{needed} is not installed"
    templates = list((home / "evaluation" / "templates").glob("*.*"))
    assert len(templates) == 6, templates
    print(
        f"gasp_fast {gasp_fast.__version__} works: Python {sys.version.split()[0]}, torch {torch.__version__}, {home}"
    )


if __name__ == "__main__":
    main()
