"""Which cluster a command means: the one that runs on this machine, or the one at a Redis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pdserve.cluster.options import integer, option
from pdserve.cluster.runfile import RunNote, running
from pdserve.protocol.errors import PdserveError


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetSettings:
    """Options of every command that speaks with a cluster."""

    redis: str = option(
        "",
        "Redis where the cluster meets: redis://[:PASSWORD@]HOST:PORT[/DB]",
        shown="that of the cluster running on this machine",
    )
    cluster: str = option("pdserve", "Name of the cluster, if --redis is given")
    pid: int = option(
        0,
        "Process id of the `pdserve up` to ask",
        parse=integer(0),
        shown="the only one that runs",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A cluster, and how to reach it."""

    redis: str
    cluster: str
    url: str = ""
    """Of its router, if `pdserve up` runs on this machine."""
    secret: str = field(default="", repr=False)
    """If it is known here."""


def find_target(settings: TargetSettings, secret: str = "") -> Target:
    """The cluster that is meant. Raises PdserveError if that is none or not clear."""
    if settings.redis:
        return Target(redis=settings.redis, cluster=settings.cluster, secret=secret)
    note = _choose(running(), settings.pid)
    return Target(redis=note.redis, cluster=note.cluster, url=note.url, secret=note.secret)


def _choose(notes: Sequence[RunNote], pid: int) -> RunNote:
    known = ", ".join(f"{note.pid} ({note.url})" for note in notes)
    if pid:
        for note in notes:
            if note.pid == pid:
                return note
        raise PdserveError(
            f"No `pdserve up` with process id {pid} runs here; running: {known or 'none'}."
        )
    if not notes:
        raise PdserveError(
            "No cluster runs on this machine; start one with `pdserve up`, or give --redis URL."
        )
    if len(notes) > 1:
        raise PdserveError(f"Several clusters run here; choose with --pid one of {known}.")
    return notes[0]
