"""A prompt in the forms that placing and sending it take."""

from __future__ import annotations

import functools

from pdserve.protocol.blocks import pack_tokens, route_hashes


class PackedPrompt:
    """For messages and for route hashes; each form is made when it is first needed."""

    def __init__(self, token_ids: list[int], salt: str) -> None:
        self.token_ids = token_ids
        self.salt = salt

    @functools.cached_property
    def packed(self) -> bytes:
        return pack_tokens(self.token_ids)

    @functools.cached_property
    def routes(self) -> list[bytes]:
        return route_hashes(self.packed, self.salt)
