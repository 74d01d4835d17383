"""The router over TLS: certificates that the test makes, files that do not fit, new files."""

from __future__ import annotations

import contextlib
import os
import re
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from pdserve.cluster.launcher import check_tls
from pdserve.cluster.settings import up_settings
from pdserve.cluster.tls import TlsError

ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("PDSERVE_")},
    "PDSERVE_SECRET": "s",
}
ROUTER = [sys.executable, "-P", "-m", "pdserve.router", "--port", "0"]
UP = [sys.executable, "-P", "-m", "pdserve.cluster.main", "up", "--port", "0"]
WAIT_S = 30.0


def make_certificate(folder: Path, name: str) -> tuple[str, str]:
    """A certificate for 127.0.0.1 that vouches for itself, and its key."""
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-days", "2", "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    return str(certificate), str(key)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def ours(folder: Path) -> tuple[str, str]:
    return make_certificate(folder, "ours")


@pytest.fixture(scope="module")
def others(folder: Path) -> tuple[str, str]:
    return make_certificate(folder, "others")


@contextlib.contextmanager
def router(redis_url: str, *options: str) -> Iterator[str]:
    """The URL of a router process."""
    process = subprocess.Popen(
        [*ROUTER, "--redis", redis_url, "--cluster", "tls", *options],
        env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        line = next((line for line in process.stderr if "Serving on" in line), "")
        found = re.search(r"https://\S+", line)
        assert found is not None, line
        yield found[0]
    finally:
        process.terminate()
        process.stderr.close()
        assert process.wait(WAIT_S) == 0


def trusting(certificate: str, own: tuple[str, str] | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=certificate)
    if own:
        context.load_cert_chain(*own)
    return context


def version(url: str, context: ssl.SSLContext) -> int:
    return httpx.get(f"{url}/version", verify=context, trust_env=False).status_code


def test_clients_check_the_certificate_and_it_changes(
    redis_url: str, tmp_path: Path, ours: tuple[str, str], others: tuple[str, str]
) -> None:
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"

    def put(source: tuple[str, str]) -> None:
        for one, target in zip(source, (certificate, key), strict=True):
            fresh = target.with_suffix(".new")
            fresh.write_bytes(Path(one).read_bytes())
            fresh.rename(target)

    put(ours)
    options = ("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key))
    with router(redis_url, *options, "--enable-ssl-refresh") as url:
        assert version(url, trusting(ours[0])) == 200
        with pytest.raises(httpx.ConnectError):
            version(url, trusting(others[0]))
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(url.replace("https", "http") + "/version", trust_env=False)
        put(others)
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                assert version(url, trusting(others[0])) == 200
                break
            except httpx.ConnectError:
                assert time.monotonic() < deadline
        with pytest.raises(httpx.ConnectError):
            version(url, trusting(ours[0]))


def test_certificates_of_clients(
    redis_url: str, ours: tuple[str, str], others: tuple[str, str]
) -> None:
    options = ("--ssl-certfile", ours[0], "--ssl-keyfile", ours[1], "--ssl-ca-certs", others[0])
    with router(redis_url, *options, "--ssl-cert-reqs", "2") as url:
        assert version(url, trusting(ours[0], others)) == 200
        for own in (None, ours):
            with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError, httpx.ConnectError)):
                version(url, trusting(ours[0], own))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--ssl-keyfile", "KEY"], "needs --ssl-certfile"),
        (["--enable-ssl-refresh"], "needs --ssl-certfile"),
        (["--ssl-certfile", "CERT", "--ssl-keyfile", "/no"], "--ssl-keyfile /no cannot be read"),
        (["--ssl-certfile", "CERT"], "must hold the key"),
        (["--ssl-certfile", "CERT", "--ssl-keyfile", "OTHER"], "no certificate with its key"),
        (["--ssl-certfile", "TEXT", "--ssl-keyfile", "KEY"], "no certificate with its key"),
        (["CERT+KEY", "--ssl-ca-certs", "TEXT"], "--ssl-ca-certs"),
        (["CERT+KEY", "--ssl-cert-reqs", "1"], "needs --ssl-ca-certs"),
        (["CERT+KEY", "--ssl-ciphers", "ROT13"], "selects no cipher"),
        (["CERT+KEY", "--ssl-cert-reqs", "2", "--ssl-ca-certs", "CERT"], "`pdserve up` has none"),
    ],
)
def test_what_does_not_fit_is_told(
    options: list[str],
    sentence: str,
    tmp_path: Path,
    ours: tuple[str, str],
    others: tuple[str, str],
) -> None:
    text = tmp_path / "text"
    text.write_text("no certificate")
    pair = ["--ssl-certfile", ours[0], "--ssl-keyfile", ours[1]]
    known = {"CERT": ours[0], "KEY": ours[1], "OTHER": others[1], "TEXT": str(text)}
    given: list[str] = []
    for option in options:
        given += pair if option == "CERT+KEY" else [known.get(option, option)]
    with pytest.raises(TlsError, match=re.escape(sentence)):
        check_tls(up_settings(given))


@pytest.mark.parametrize("command", [ROUTER, UP])
def test_a_bad_file_ends_the_process(command: list[str]) -> None:
    done = subprocess.run(
        [*command, "--ssl-certfile", "/no.pem"],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "--ssl-certfile /no.pem cannot be read: No such file" in done.stderr


def test_a_whole_cluster(ours: tuple[str, str]) -> None:
    options = ["--colocated", "1", "--ssl-certfile", ours[0], "--ssl-keyfile", ours[1]]
    process = subprocess.Popen([*UP, *options], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = next((line for line in process.stdout if line.startswith("ready ")), "")
        assert line.startswith("ready https://127.0.0.1:")
        url = line.split()[1]
        body = {"prompt": "Hello", "max_tokens": 2}
        answer = httpx.post(
            f"{url}/v1/completions", json=body, verify=trusting(ours[0]), trust_env=False
        )
        assert answer.status_code == 200
    finally:
        process.terminate()
        process.stdout.read()
        process.stdout.close()
        assert process.wait(WAIT_S) == 0
