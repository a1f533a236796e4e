"""What this machine and this Python environment can do with gasp-fast, and the command that mends what is missing.

Everything compiled is tried on something tiny, and the loss is compared with float64. Nothing is installed, downloaded
or written (except FILE). ✓ works, – is not there and optional, ✗ is broken or in need. Indented below a finding stands
the command that mends it. Exit code 0 if the loss works and nothing is broken, else 1.

examples:
  gasp-fast doctor
  gasp-fast doctor --json doctor.json     # for a bug report
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from gasp_fast.doctor import BROKEN, MISSING, OK, Finding, examine, loss_works

HELP = "what this machine can do, and the command that mends what is missing"
SIGNS = {OK: ("✓", "ok", "32"), MISSING: ("–", "--", "33"), BROKEN: ("✗", "XX", "1;31")}  # plain letters, ASCII, colour
WIDTH = 17  # of names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings as JSON too")


def run(arguments: argparse.Namespace) -> int:
    """Plain text only: rich may be among the things that are missing."""
    groups: dict[str, list[Finding]] = {}
    for group, found in itertools.groupby(examine(), key=lambda pair: pair[0]):
        print(f"\n{group}" if groups else group)
        groups[group] = _print_group(finding for _, finding in found)
    findings = [finding for group in groups.values() for finding in group]
    broken = [finding for finding in findings if finding.state == BROKEN]
    works = loss_works(findings)
    print(f"\nThe loss {'works' if works else 'DOES NOT WORK'}. {_verdict(broken)}")
    if arguments.json:
        told = {group: [asdict(finding) for finding in found] for group, found in groups.items()}
        summary = {"loss_works": works, "broken": [finding.name for finding in broken], "groups": told}
        arguments.json.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0 if works and not broken else 1


def _print_group(findings: Iterable[Finding]) -> list[Finding]:
    """Each finding as it comes. The command of several that stand together comes once, below the last."""
    printed: list[Finding] = []
    for finding in findings:
        if printed and printed[-1].cure != finding.cure:
            _print_cure(printed[-1])
        print(f"  {_sign(finding)} {finding.name:<{WIDTH}} {finding.found}", flush=True)
        printed.append(finding)
    if printed:
        _print_cure(printed[-1])
    return printed


def _print_cure(finding: Finding) -> None:
    if finding.cure:
        print(f"      {finding.cure}")


def _sign(finding: Finding) -> str:
    sign, plain, colour = SIGNS[finding.state]
    if "utf" not in (sys.stdout.encoding or "").lower():
        sign = plain
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        return f"\033[{colour}m{sign}\033[0m"
    return sign


def _verdict(broken: list[Finding]) -> str:
    return f"Broken: {', '.join(finding.name for finding in broken)}." if broken else "Nothing is broken."
