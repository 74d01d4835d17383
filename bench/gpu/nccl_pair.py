"""Two processes on one GPU send bytes to each other through NCCL: does it work here, how fast?

Two ranks on one device are refused unless they seem to be on different hosts (NCCL_HOSTID), which
leaves sockets between them. The last line printed is the result; exit code 1 if it failed.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from multiprocessing.connection import Connection

NBYTES = 64 << 20
DEADLINE_S = 45.0
ENVIRONMENT = {
    "NCCL_NET": "Socket",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
    "NCCL_MAX_CTAS": "1",
    "NCCL_PROTO": "Simple",
    "NCCL_RAS_ENABLE": "0",
    "NCCL_MNNVL_ENABLE": "0",
}


def rank(index: int, unique: bytes, pipe: Connection) -> None:
    """Rank 0 sends a pattern, rank 1 receives it and compares."""
    os.environ |= {**ENVIRONMENT, "NCCL_HOSTID": f"pdserve-{index}"}
    import cupy
    from cupy.cuda import nccl

    communicator = nccl.NcclCommunicator(2, unique, index)
    stream = cupy.cuda.Stream(non_blocking=True)
    buffer = cupy.full(NBYTES, 7 if index == 0 else 0, dtype=cupy.uint8)
    cupy.cuda.Device().synchronize()
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        if index == 0:
            communicator.send(buffer.data.ptr, NBYTES, nccl.NCCL_UINT8, 1, stream.ptr)
        else:
            communicator.recv(buffer.data.ptr, NBYTES, nccl.NCCL_UINT8, 0, stream.ptr)
        stream.synchronize()
        seconds.append(time.perf_counter() - begin)
    pipe.send((bool((buffer == 7).all()), min(seconds), nccl.get_version()))
    communicator.destroy()


def main() -> None:
    os.environ |= {**ENVIRONMENT, "NCCL_HOSTID": "pdserve-0"}
    from cupy.cuda import nccl

    unique = nccl.get_unique_id()
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for index in range(2):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=rank, args=(index, unique, theirs), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process ends the wait below
        pipes.append(mine)
        processes.append(process)
    deadline = time.monotonic() + DEADLINE_S
    answers = []
    try:
        for pipe in pipes:
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                print(f"No answer within {DEADLINE_S:.0f} s: NCCL hangs between two ranks here.")
                sys.exit(1)
            answers.append(pipe.recv())
    except EOFError:
        print("A rank ended with an error (above).")
        sys.exit(1)
    finally:
        for process in processes:
            process.kill()
            process.join(timeout=5)
    same, seconds, version = answers[1]
    print(
        f"NCCL {version}: {NBYTES / seconds / 1e9:.2f} GB/s, bytes {'equal' if same else 'WRONG'}"
    )
    sys.exit(not same)


if __name__ == "__main__":
    main()
