"""Where this user's machine keeps what is made once and used by every process."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(folder: Path | None = None) -> Path:
    """`folder`, by default pdserve's in the user's cache, made if it is not there. Raises OSError
    if it cannot be made or belongs to somebody else."""
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pdserve"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"the cache folder {folder} belongs to another user")
    return folder
