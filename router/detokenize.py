"""Token ids to text, token by token.

Two ways, chosen once per tokenizer:

- Byte-level BPE (GPT-2, Llama 3, Qwen, the demo model): a token is a sequence of bytes whatever
  stands beside it, so the text is the UTF-8 decoding of the bytes so far. Exact and O(1) a token.
- Any other (SentencePiece-like, WordPiece): what a token adds depends on its neighbours, so a
  short window of recent tokens is decoded twice, without and with the newest.

Either way a character whose bytes are spread over tokens appears once, whole, with its last byte;
bytes that are no UTF-8 become U+FFFD. Pieces joined are the text: there is no other way to get it.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
MAX_PENDING = 8
"""Tokens after which an unfinished character is given up: UTF-8 has at most four bytes."""
CONTEXT = 6
"""Prompt tokens given to the window, so that it knows what stands before the answer."""


class Detokenizer(Protocol):
    """The text of one answer, growing."""

    def add(self, token_id: int) -> str:
        """The text that this token completes ("" while a character is unfinished)."""

    def finish(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, or nothing."""


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: character to byte (Radford et al. 2019)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in kept]
    alphabet = {chr(byte): byte for byte in kept}
    alphabet.update({chr(256 + place): byte for place, byte in enumerate(moved)})
    return alphabet


class TokenText:
    """What single tokens of a vocabulary look like; knows which kind of decoder is needed."""

    def __init__(self, core: Tokenizer, special_ids: frozenset[int]) -> None:
        self.core = core
        self.special_ids = special_ids
        decoder = json.loads(core.to_str()).get("decoder") or {}
        self.byte_level = decoder.get("type") == "ByteLevel"
        self._bytes: dict[int, bytes] = {}

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, alone (b"" for an id that the vocabulary does not have)."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def _find_bytes(self, token_id: int) -> bytes:
        token = self.core.id_to_token(token_id)
        if token is None:
            return b""
        if not self.byte_level:
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes([int(token[3:5], 16)])
            return str(self.core.decode([token_id], skip_special_tokens=False)).encode()
        alphabet = byte_alphabet()
        try:
            return bytes([alphabet[character] for character in token])
        except KeyError:  # an added token, written as it is
            return token.encode()

    def detokenizer(self, prompt: Sequence[int], skip_special_tokens: bool) -> Detokenizer:
        """A fresh one for an answer to `prompt`."""
        if self.byte_level:
            return ByteDetokenizer(self, skip_special_tokens)
        return WindowDetokenizer(self.core, prompt[-CONTEXT:], skip_special_tokens)

    def text(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """All of it at once, the same as the pieces joined."""
        pieces = self.detokenizer((), skip_special_tokens)
        return "".join(map(pieces.add, token_ids)) + pieces.finish()


class ByteDetokenizer:
    """For byte-level vocabularies."""

    __slots__ = ("_decode", "_skip", "_token_bytes")

    def __init__(self, tokens: TokenText, skip_special_tokens: bool) -> None:
        self._token_bytes = tokens.token_bytes
        self._skip = tokens.special_ids if skip_special_tokens else frozenset()
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def add(self, token_id: int) -> str:
        return "" if token_id in self._skip else self._decode(self._token_bytes(token_id))

    def finish(self) -> str:
        return self._decode(b"", True)


class WindowDetokenizer:
    """For all others: decodes tokens[prefix:] with and without the unread ones."""

    __slots__ = ("_core", "_prefix", "_read", "_skip", "_tokens")

    def __init__(self, core: Tokenizer, context: Sequence[int], skip_special_tokens: bool) -> None:
        self._core = core
        self._skip = skip_special_tokens
        self._tokens = list(context)
        self._prefix = 0
        self._read = len(self._tokens)

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._core.decode(token_ids, skip_special_tokens=self._skip))

    def add(self, token_id: int) -> str:
        self._tokens.append(token_id)
        return self._take(len(self._tokens) - self._read > MAX_PENDING)

    def finish(self) -> str:
        return self._take(True)

    def _take(self, force: bool) -> str:
        before = self._decode(self._tokens[self._prefix : self._read])
        text = self._decode(self._tokens[self._prefix :])
        if not force and (len(text) <= len(before) or text.endswith(REPLACEMENT)):
            return ""
        # Tokens before the window never change what comes after it: let them go.
        del self._tokens[: self._read]
        self._prefix, self._read = 0, len(self._tokens)
        return text[len(before) :]
