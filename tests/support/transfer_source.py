"""A source in a process of its own, for tests that kill or stop it.

Reads lines "offer <request id> <number of blocks>" and prints each ticket as one JSON line.
Arguments: epoch, secret, transports (comma-separated), number of blocks, bytes per block.
The pool is filled by `scramble`.
"""

from __future__ import annotations

import sys

import msgspec
from transfer_rig import FINGERPRINT, scramble

from pdserve.kv_transfer.memory import HostMemory
from pdserve.kv_transfer.source import TransferSource


def main() -> None:
    epoch, secret, transports, num_blocks, block_nbytes = sys.argv[1:6]
    memory = HostMemory(int(num_blocks), int(block_nbytes))
    scramble(memory)
    with TransferSource(
        memory,
        FINGERPRINT,
        worker_id="prefill-0",
        epoch=int(epoch),
        host="127.0.0.1",
        secret=secret,
        transports=tuple(transports.split(",")),
        on_returned=lambda ticket, ending: None,
    ) as source:
        for line in sys.stdin:
            _, request_id, count = line.split()
            ticket = source.offer(
                request_id, range(int(count)), 16 * int(count), [b"h" * 16] * int(count)
            )
            print(msgspec.json.encode(ticket).decode(), flush=True)


if __name__ == "__main__":
    main()
