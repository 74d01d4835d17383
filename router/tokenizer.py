"""Text to token ids, without torch.

`transformers` reads the folder (special tokens, chat templates); after that its Rust core does all
the work. Long texts are tokenized in a thread, where the core lets go of the interpreter lock.
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pdserve.cluster.model_files import ModelError
from pdserve.router.detokenize import TokenText

INLINE_CHARS = 4000
"""Longest text that is tokenized on the event loop: about half a millisecond of work."""


class TextTokenizer:
    """One model's tokenizer."""

    def __init__(self, core: Tokenizer, special_tokens: dict[str, str], templates: dict[str, str]):
        core.no_truncation()
        core.no_padding()
        self.core = core
        self.special_tokens = special_tokens
        """By role: "eos_token" → "<|im_end|>"."""
        self.templates = templates
        """The model's own chat templates by name; the usual one is "default"."""
        added = core.get_added_tokens_decoder()
        special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.tokens = TokenText(core, special_ids)
        vocabulary = core.get_vocab(with_added_tokens=True)
        self.size = max(vocabulary.values(), default=-1) + 1
        self.longest_token = max(map(len, vocabulary), default=1)
        """Characters: a text of more than n × this has more than n tokens."""

    @property
    def eos_id(self) -> int | None:
        token = self.special_tokens.get("eos_token")
        return None if token is None else self.core.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self.core.encode(text, add_special_tokens=add_special_tokens).ids

    async def encode_soon(
        self, text: str, add_special_tokens: bool, executor: Executor
    ) -> list[int]:
        """`encode`, in a thread if the text is long."""
        if len(text) <= INLINE_CHARS:
            return self.encode(text, add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(executor, self.encode, text, add_special_tokens)

    def token_strings(self, token_ids: list[int]) -> list[str]:
        """Each token as the vocabulary writes it."""
        return [self.core.id_to_token(token_id) or "" for token_id in token_ids]


def load_tokenizer(folder: Path) -> TextTokenizer:
    """Read tokenizer.json and its companions. Raises ModelError."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import PreTrainedTokenizerFast  # a second of imports, once
    from transformers.utils import logging as hf_logging

    if not (folder / "tokenizer.json").is_file():
        raise ModelError(
            f"{folder} has no tokenizer.json; the router reads only fast tokenizers. Convert the "
            "tokenizer with transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...))."
        )
    hf_logging.set_verbosity_error()  # it warns that this is not the checkpoint's own class
    try:
        loaded: Any = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises whatever its parsers raise
        raise ModelError(f"The tokenizer in {folder} cannot be read: {error}") from error
    own = loaded.chat_template
    templates = dict(own) if isinstance(own, dict) else {"default": own} if own else {}
    special = {
        name: str(token)
        for name, token in loaded.special_tokens_map.items()
        if isinstance(token, str)
    }
    return TextTokenizer(loaded.backend_tokenizer, special, templates)
