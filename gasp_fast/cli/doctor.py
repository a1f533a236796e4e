"""Check what gasp-fast can do on this machine, and print the command that installs or repairs what is missing.

Runs each compiled part on a tiny input and compares the loss with float64. Installs and downloads nothing; writes only
FILE. Each line is marked ✓ works, – optional, and missing or limited, or ✗ broken or required; the command that fixes
it follows on the next line. Exit code 0 if the loss works and nothing is broken, else 1.

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

HELP = "check this machine and installation; print the commands that fix what is missing"
SIGNS = {OK: ("✓", "ok", "32"), MISSING: ("–", "--", "33"), BROKEN: ("✗", "XX", "1;31")}  # sign, in ASCII, colour
NAME_WIDTH = 17


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Prints plain text: rich may not be installed."""
    groups: dict[str, list[Finding]] = {}
    for group, pairs in itertools.groupby(examine(), key=lambda pair: pair[0]):
        print(f"\n{group}" if groups else group)
        groups[group] = _print_group(finding for _, finding in pairs)
    findings = [finding for group in groups.values() for finding in group]
    broken = [finding for finding in findings if finding.state == BROKEN]
    works = loss_works(findings)
    print(f"\nThe loss {'works' if works else 'DOES NOT WORK'}. {_verdict(broken)}")
    if arguments.json:
        tables = {group: list(map(asdict, findings)) for group, findings in groups.items()}
        summary = {"loss_works": works, "broken": [finding.name for finding in broken], "groups": tables}
        arguments.json.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0 if works and not broken else 1


def _print_group(findings: Iterable[Finding]) -> list[Finding]:
    """Prints findings as they arrive. Neighbours with the same command share one line for it, below the last."""
    printed: list[Finding] = []
    for finding in findings:
        if printed and printed[-1].cure != finding.cure:
            _print_cure(printed[-1])
        print(f"  {_sign(finding)} {finding.name:<{NAME_WIDTH}} {finding.found}", flush=True)
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
