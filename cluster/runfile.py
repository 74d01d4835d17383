"""Notes about the clusters that run on this machine, so that commands find them.

One file per `pdserve up`, named by its process id, in a folder that only this user can read. A file
whose process is gone is removed by whoever finds it, together with what that process left behind.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

import msgspec

from pdserve.protocol.errors import PdserveError


class RunNote(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One running cluster."""

    pid: int
    """Of `pdserve up`."""
    started: int
    """Its start time in clock ticks since boot: tells it from a later process with its pid."""
    url: str
    redis: str
    cluster: str
    log_dir: str
    folder: str
    """Its private folder."""
    secret: str
    """Lets commands on this machine give orders to its workers."""

    @property
    def alive(self) -> bool:
        return start_ticks(self.pid) == self.started


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


def own_age_s() -> float:
    """Seconds since this process was started, its imports included."""
    born_s = (start_ticks(os.getpid()) or 0) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - born_s


def notes_folder() -> Path:
    """Where the notes lie. Raises PdserveError if somebody else owns the place."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    root = Path(runtime) if runtime and os.access(runtime, os.W_OK) else None
    folder = root / "pdserve" if root else Path(tempfile.gettempdir()) / f"pdserve-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PdserveError(
            f"{folder} must be a folder of your own with mode 700; remove it or set TMPDIR."
        )
    return folder


def write_note(note: RunNote) -> Path:
    """Write (or replace) the note of this process; the caller removes the file at its end."""
    path = notes_folder() / f"{note.pid}.json"
    draft = path.with_suffix(".new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.encode(note))
    draft.replace(path)
    return path


def running() -> list[RunNote]:
    """The clusters that run here, oldest first. Cleans up behind dead ones."""
    notes = []
    for path in notes_folder().glob("*.json"):
        try:
            note = msgspec.json.decode(path.read_bytes(), type=RunNote)
        except (OSError, msgspec.DecodeError):
            continue
        if note.alive:
            notes.append(note)
        else:
            path.unlink(missing_ok=True)
            shutil.rmtree(note.folder, ignore_errors=True)
    return sorted(notes, key=lambda note: note.started)
