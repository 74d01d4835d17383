"""`pdserve status` shows over which transport each source's blocks come."""

from __future__ import annotations

import pytest

from pdserve.cluster.records import Role, WorkerRecord, WorkerState
from pdserve.cluster.status import Snapshot, as_table


@pytest.mark.parametrize(
    ("routes", "shown"),
    [
        ({}, "shm,tcp"),
        (
            {"prefill-1": "tcp", "prefill-0": "shm"},
            "prefill-0:shm@9.8GB/s,prefill-1:tcp",
        ),
    ],
    ids=["none yet", "two sources"],
)
def test_transports_in_use_replace_those_that_there_are(routes: dict[str, str], shown: str) -> None:
    record = WorkerRecord(
        worker_id="decode-0",
        epoch=1,
        role=Role.DECODE,
        state=WorkerState.READY,
        host="h",
        port=1,
        http_port=2,
        pid=3,
        transports=("shm", "tcp"),
        routes=routes,
        speeds={"prefill-0": {"shm": 9.8e9, "tcp": 1e9}},
    )
    table = as_table(Snapshot(cluster="c", url="", redis="redis://h", workers=[record]))
    assert shown in table.splitlines()[-1].split()
