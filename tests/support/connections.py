"""Refuses and records what would leave this machine."""

from __future__ import annotations

import socket
from typing import Any

import pytest


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the hosts that were looked up; every look-up fails."""
    hosts: list[str] = []

    def refuse(host: Any, *_: Any, **__: Any) -> None:
        hosts.append(str(host))
        raise RuntimeError("no network in this test")  # not an error of networks, after which clients try again

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return hosts
