"""Fixtures of the transfer tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transfer_rig import FINGERPRINT, Rig, open_sockets, transfer_threads

from pdserve.protocol.ticket import LayoutFingerprint


@pytest.fixture
def fingerprint() -> LayoutFingerprint:
    return FINGERPRINT


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Fails the test if it leaves a socket or a thread behind."""
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")  # whose driver opens a socket, and keeps it
    before = open_sockets()
    rig = Rig()
    yield rig
    rig.close()
    assert transfer_threads() == []
    assert open_sockets() - before == set()
