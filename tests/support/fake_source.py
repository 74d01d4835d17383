"""A source that shakes hands correctly and then answers every fetch with what the test wants."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

from pdserve.kv_transfer.line import Line, answer_handshake
from pdserve.protocol.transfer import Fetch, Released, ToSource
from pdserve.protocol.wire import MessageDecoder

PATIENCE_S = 10.0
TO_SOURCE: MessageDecoder[object] = MessageDecoder(ToSource)


def soon() -> float:
    return time.monotonic() + PATIENCE_S


class FakeSource:
    """`answer(line, fetch)` does as it likes; all else is answered as if all were well."""

    def __init__(self, answer: Callable[[Line, Fetch], None]) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._lines: list[Line] = []
        self._serving: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            line = Line(sock)
            self._lines.append(line)
            thread = threading.Thread(target=self._serve, args=(line,))
            thread.start()
            self._serving.append(thread)

    def _serve(self, line: Line) -> None:
        try:
            answer_handshake(line, secret="a secret", worker_id="prefill-0", epoch=7)
            while True:
                message = line.receive(TO_SOURCE, soon())
                if isinstance(message, Fetch):
                    self._answer(line, message)
                else:
                    released = Released(ticket_id=message.ticket_id, valid=True)  # type: ignore[attr-defined]
                    line.send(released, soon())
        except OSError:
            pass
        finally:
            line.interrupt()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE_S)
        self._listener.close()
        for line in self._lines:
            line.interrupt()
        for thread in self._serving:
            thread.join(PATIENCE_S)
        for line in self._lines:
            line.close()
