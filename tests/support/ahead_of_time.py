"""Runs a script that compiles kernels for several cases; a process of its own has no Triton interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def reports_by_case(script: Path, cases: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """What the script prints for each case: a line that names the case, and one for each launch."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script), *cases], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[dict[str, Any]]] = {}
    for report in map(json.loads, done.stdout.splitlines()):
        if "case" in report:
            reports = found.setdefault(report["case"], [])
        else:
            reports.append(report)
    return found
