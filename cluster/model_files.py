"""Where a model's files lie: a folder, a name on the Hugging Face hub, or the built-in demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pdserve.protocol.errors import PdserveError

DEMO_MODEL = Path(__file__).resolve().parent.parent / "demo" / "model"
"""The small chat model that comes with the project."""

_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


class ModelError(PdserveError):
    """The model's files are missing or cannot be read; `str()` is a sentence."""


def resolve_model(model: str) -> Path:
    """The folder that holds `model`'s files.

    `model` is a folder, or a hub id such as "Qwen/Qwen3-0.6B" (downloaded on first use), or "" for
    the built-in demo model. Raises ModelError.
    """
    folder = Path(model).expanduser() if model else DEMO_MODEL
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"The folder {folder} holds no model: config.json is missing.")
        return folder.resolve()
    if not model:
        raise ModelError(
            f"The built-in demo model is missing ({DEMO_MODEL}); make it with `make demo-model`, "
            "or give --model."
        )
    if folder.exists():
        raise ModelError(f"--model {model} is a file; give the folder that holds config.json.")
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise ModelError(f"The model folder {model} does not exist.")
    return _download(model)


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, rarely needed

    try:
        return Path(snapshot_download(model, allow_patterns=_PATTERNS))
    except Exception as error:  # whatever the hub, the network or the disk may raise
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise ModelError(
            f"The model {model!r} is no folder here, and the hub does not give it: {reason}."
        ) from error


def check_model(folder: Path, *, weights: bool) -> None:
    """See that a folder can hold a model, without reading weights. Raises ModelError."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or not config.get("architectures"):
        raise ModelError(f"{folder / 'config.json'} does not name an architecture.")
    if weights and not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"The folder {folder} holds no *.safetensors; convert the checkpoint, or give "
            "--load-format dummy for random weights."
        )


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises ModelError naming the file and what is wrong."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}.") from None
