"""TLS of the router's public port: from files to a context, and new files while it runs."""

from __future__ import annotations

import logging
import os
import ssl
from dataclasses import dataclass

from pdserve.cluster.router_settings import RouterSettings
from pdserve.protocol.errors import PdserveError

log = logging.getLogger(__name__)


class TlsError(PdserveError):
    """The --ssl-... options do not make a context."""


def server_context(settings: RouterSettings) -> ssl.SSLContext | None:
    """What clients are met with; None: plain HTTP. Raises TlsError."""
    if not settings.ssl_certfile:
        for name in ("keyfile", "ca_certs", "cert_reqs", "ciphers"):
            if getattr(settings, f"ssl_{name}") not in ("", "0"):
                option = name.replace("_", "-")
                raise TlsError(f"--ssl-{option} needs --ssl-certfile: without it there is no TLS.")
        if settings.enable_ssl_refresh:
            raise TlsError("--enable-ssl-refresh needs --ssl-certfile: there is nothing to watch.")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    _load_certificate(context, settings)
    if settings.ssl_cert_reqs != "0" and not settings.ssl_ca_certs:
        raise TlsError(
            f"--ssl-cert-reqs {settings.ssl_cert_reqs} needs --ssl-ca-certs: by what else would "
            "clients' certificates be checked?"
        )
    if settings.ssl_ca_certs:
        try:
            context.load_verify_locations(_readable("--ssl-ca-certs", settings.ssl_ca_certs))
        except ssl.SSLError as error:
            raise TlsError(
                f"--ssl-ca-certs {settings.ssl_ca_certs} holds no certificates in PEM format: "
                f"{_why(error)}."
            ) from None
    context.verify_mode = ssl.VerifyMode(int(settings.ssl_cert_reqs))
    if settings.ssl_ciphers:
        try:
            context.set_ciphers(settings.ssl_ciphers)
        except ssl.SSLError:
            raise TlsError(
                f"--ssl-ciphers {settings.ssl_ciphers!r} selects no cipher; `openssl ciphers` "
                "lists their names."
            ) from None
    return context


def _load_certificate(context: ssl.SSLContext, settings: RouterSettings) -> None:
    certificate = _readable("--ssl-certfile", settings.ssl_certfile)
    key = _readable("--ssl-keyfile", settings.ssl_keyfile) if settings.ssl_keyfile else None
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        where = f"and --ssl-keyfile {key}" if key else "(which must hold the key, too)"
        raise TlsError(
            f"--ssl-certfile {certificate} {where} are no certificate with its key in PEM "
            f"format: {_why(error)}."
        ) from None


def _no_password() -> str:
    """Instead of a question on the terminal."""
    raise ValueError("the key is encrypted; give it without a passphrase")


def _readable(option: str, path: str) -> str:
    found = os.path.expanduser(path)
    try:
        with open(found, "rb"):
            return found
    except OSError as error:
        raise TlsError(f"{option} {path} cannot be read: {error.strerror}.") from None


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason).replace("_", " ").lower() if reason else str(error)


@dataclass(slots=True)
class Refresh:
    """Gives a context in use its certificate anew when the files change."""

    context: ssl.SSLContext
    settings: RouterSettings
    _seen: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        self._seen = self._marks()

    async def look(self) -> None:
        """To be called now and then. Files that do not fit each other (yet) change nothing."""
        marks = self._marks()
        if marks == self._seen:
            return
        try:
            server_context(self.settings)
            _load_certificate(self.context, self.settings)
        except TlsError as error:
            log.error("The changed certificate is not taken: %s", error)
        else:
            log.info("The certificate was read anew")
        self._seen = marks

    def _marks(self) -> tuple[tuple[int, int], ...]:
        """Changes with the files; their links are followed."""
        found = []
        for path in filter(None, (self.settings.ssl_certfile, self.settings.ssl_keyfile)):
            try:
                status = os.stat(os.path.expanduser(path))
                found.append((status.st_mtime_ns, status.st_ino))
            except OSError:
                found.append((0, 0))
        return tuple(found)
