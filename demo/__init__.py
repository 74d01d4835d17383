"""The demo model: the small chat model that a newcomer gets when no ``--model`` is given."""

from pathlib import Path


def model_path() -> Path:
    """The folder of the demo model, in Hugging Face layout."""
    return Path(__file__).resolve().parent / "model"
