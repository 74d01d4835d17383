"""The handshake that opens every connection between processes of a cluster.

Both sides prove that they know the cluster's secret, and neither sends it:

    client                                   server
      │ ◄──────── Challenge(nonce, id, epoch) ── │
      │ ── Proof(nonce, name, mac) ────────────► │   mac over (“client”, both nonces, name)
      │ ◄──────── Welcome(mac) ───────────────── │   mac over (“server”, both nonces, id, epoch)

MACs are HMAC-SHA256 and compared in constant time. A frame before the handshake is at most
HANDSHAKE_LIMIT bytes long, and the whole exchange has HANDSHAKE_TIMEOUT_S seconds.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

import msgspec

from pdserve.protocol import PROTOCOL_VERSION
from pdserve.protocol.errors import AuthenticationError, ProtocolError

HANDSHAKE_LIMIT = 4096
HANDSHAKE_TIMEOUT_S = 5.0


class Challenge(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="challenge"
):
    version: int = PROTOCOL_VERSION
    nonce: bytes
    worker_id: str
    epoch: int


class Proof(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="proof"):
    nonce: bytes
    name: str
    mac: bytes


class Welcome(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="welcome"):
    mac: bytes


Handshake = Challenge | Proof | Welcome


def _mac(secret: str, side: str, first: bytes, second: bytes, text: str) -> bytes:
    parts = (side.encode(), first, second, text.encode())
    message = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    return hmac.new(secret.encode(), message, hashlib.sha256).digest()


def challenge(worker_id: str, epoch: int) -> Challenge:
    """The server's first frame."""
    return Challenge(nonce=secrets.token_bytes(16), worker_id=worker_id, epoch=epoch)


def prove(secret: str, asked: Challenge, name: str) -> Proof:
    """The client's answer. Raises ProtocolError if the server speaks another version."""
    if asked.version != PROTOCOL_VERSION:
        raise ProtocolError(
            f"The peer {asked.worker_id} speaks protocol version {asked.version}, "
            f"this process {PROTOCOL_VERSION}; run the same release everywhere."
        )
    nonce = secrets.token_bytes(16)
    mac = _mac(secret, "client", asked.nonce, nonce, name)
    return Proof(nonce=nonce, name=name, mac=mac)


def welcome(secret: str, asked: Challenge, proof: Proof) -> Welcome:
    """The server's verdict. Raises AuthenticationError if the client's proof is wrong."""
    expected = _mac(secret, "client", asked.nonce, proof.nonce, proof.name)
    if not hmac.compare_digest(expected, proof.mac):
        raise AuthenticationError("The peer does not know the cluster's secret.")
    text = f"{asked.worker_id}#{asked.epoch}"
    return Welcome(mac=_mac(secret, "server", asked.nonce, proof.nonce, text))


def check_welcome(secret: str, asked: Challenge, proof: Proof, answer: Welcome) -> None:
    """The client's check of the server. Raises AuthenticationError if it is a stranger."""
    text = f"{asked.worker_id}#{asked.epoch}"
    expected = _mac(secret, "server", asked.nonce, proof.nonce, text)
    if not hmac.compare_digest(expected, answer.mac):
        raise AuthenticationError(f"{asked.worker_id} does not know the cluster's secret.")
