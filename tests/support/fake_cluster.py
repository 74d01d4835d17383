"""`pdserve up` with processes that load nothing: launcher and Redis are real, the rest pretends.

    python -P fake_cluster.py up [OPTION ...]     the launcher
    python -P fake_cluster.py worker ID ROLE      a worker that is only a record in Redis
    python -P fake_cluster.py router HOST PORT    a router that answers the launcher's probe

`FAKE_MODES` makes some misbehave: "decode-0=crash,router=stubborn". Modes: `crash` dies at once,
`usage` ends with exit code 2, `stubborn` ignores SIGTERM and has a child of its own, `mute` never
becomes ready.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from pdserve.cluster.cores import Share
from pdserve.cluster.launcher import up
from pdserve.cluster.membership import Membership
from pdserve.cluster.plan import ClusterPlan, roles_of
from pdserve.cluster.process import Command
from pdserve.cluster.records import Role, WorkerRecord, WorkerState
from pdserve.cluster.settings import UpSettings


def make_plan(
    settings: UpSettings,
    shares: Sequence[Share],
    *,
    redis: str,
    secret: str,
    port: int,
    logs: Path,
    environment: Mapping[str, str],
) -> ClusterPlan:
    env = {**environment, "PDSERVE_REDIS": redis, "PDSERVE_SECRET": secret}
    me = [sys.executable, "-P", __file__]

    def command(name: str, *words: str) -> Command:
        return Command(name=name, argv=[*me, *words], env=env, log=logs / f"{name}.log")

    roles = roles_of(settings)
    assert len(shares) == len(roles)
    names = [f"{role}-{roles[:index].count(role)}" for index, role in enumerate(roles)]
    return ClusterPlan(
        workers=tuple(
            command(name, "worker", name, str(role))
            for name, role in zip(names, roles, strict=True)
        ),
        routers=(command("router", "router", settings.router.host, str(port)),),
    )


def misbehave(name: str) -> str:
    """Do what the mode of this process says; returns the mode."""
    modes = dict(pair.split("=") for pair in os.environ.get("FAKE_MODES", "").split(",") if pair)
    mode = modes.get(name, "")
    if mode == "crash":
        sys.exit(f"{name}: these are the last words")
    if mode == "usage":
        print(f"{name}: error: The weights are too heavy; give a lighter --model.", file=sys.stderr)
        print("some more lines", file=sys.stderr)
        sys.exit(2)
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen([sys.executable, "-P", "-c", "import time; time.sleep(600)", "grandchild"])
    return mode


async def worker(name: str, role: str) -> None:
    mode = misbehave(name)
    membership = Membership(os.environ["PDSERVE_REDIS"])
    stop = asyncio.Event()
    if mode != "stubborn":
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    epoch = await membership.next_epoch(name)
    record = WorkerRecord(
        worker_id=name,
        epoch=epoch,
        role=Role(role),
        state=WorkerState.LOADING if mode == "mute" else WorkerState.READY,
        host="127.0.0.1",
        port=1,
        http_port=1,
        pid=os.getpid(),
        detail="loading weights",
    )
    while not stop.is_set():
        try:
            await membership.publish(record)
        except Exception as error:
            print(error, file=sys.stderr)
        try:
            await asyncio.wait_for(stop.wait(), 0.2)
        except TimeoutError:
            continue
    await membership.remove(name, epoch)
    await membership.close()


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer({"data": [{"id": "fake"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["model"] == "fake"
        self._answer({"usage": {"completion_tokens": 2}, "choices": [{"text": "hello there"}]})

    def _answer(self, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def main(words: list[str]) -> None:
    if words[0] == "up":
        sys.exit(up(words[1:], make_plan))
    elif words[0] == "worker":
        asyncio.run(worker(words[1], words[2]))
    else:
        misbehave("router")
        ThreadingHTTPServer((words[1], int(words[2])), Answers).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
