"""Frames on a byte stream: a 4-byte little-endian length, then that many bytes of msgpack.

    ┌────────────┬───────────────┐
    │ length u32 │ msgpack body  │
    └────────────┴───────────────┘

Pure functions and one incremental decoder; sockets belong to the callers.
"""

from __future__ import annotations

import struct
from typing import Any, Generic, TypeVar

import msgspec

from pdserve.protocol.errors import ProtocolError

HEADER = struct.Struct("<I")
MAX_FRAME_BYTES = 64 * 2**20
"""Longest body accepted: a prompt of a million tokens with room to spare."""

_ENCODER = msgspec.msgpack.Encoder()

T = TypeVar("T")


def encode_frame(message: msgspec.Struct) -> bytes:
    """A message as one frame. Raises ProtocolError if it is longer than MAX_FRAME_BYTES."""
    body = _ENCODER.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(
            f"A {type(message).__name__} message of {len(body)} bytes exceeds the limit of "
            f"{MAX_FRAME_BYTES} bytes."
        )
    return HEADER.pack(len(body)) + body


def body_length(header: bytes | bytearray, limit: int = MAX_FRAME_BYTES) -> int:
    """The length that a 4-byte header announces. Raises ProtocolError if it exceeds `limit`."""
    (length,) = HEADER.unpack(header)
    if length > limit:
        raise ProtocolError(f"A frame of {length} bytes exceeds the limit of {limit} bytes.")
    return int(length)


class MessageDecoder(Generic[T]):
    """Decodes bodies into one (tagged union) type and turns every failure into ProtocolError."""

    def __init__(self, kind: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kind)

    def decode(self, body: bytes | memoryview) -> T:
        try:
            return self._decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"A frame cannot be decoded: {error}.") from None


class FrameSplitter:
    """Cuts a byte stream into frame bodies; feed it whatever the socket gave."""

    def __init__(self, limit: int = MAX_FRAME_BYTES) -> None:
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """All bodies that `data` completed. Raises ProtocolError on an oversized frame."""
        self._buffer += data
        bodies, start = [], 0
        while len(self._buffer) - start >= HEADER.size:
            first = start + HEADER.size
            end = first + body_length(self._buffer[start:first], self._limit)
            if len(self._buffer) < end:
                break
            bodies.append(bytes(self._buffer[first:end]))
            start = end
        del self._buffer[:start]
        return bodies
