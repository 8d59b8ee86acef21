"""Ports that answer challenges while no relay runs: for `tunneld certificate`.

They bind the addresses of `[names]`, so an authority reaches them as it reaches the relay. Each has a thread.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer

from tunneld.acme.challenges import HTTP_PATH
from tunneld.errors import ListenError, reason_of
from tunneld.net.accept import peer_address
from tunneld.net.listeners import BindAddress

HANDSHAKE_TIMEOUT = 10.0
"Seconds for one request or handshake: the next one waits."


@contextmanager
def challenge_ports(
    http: BindAddress | None,
    https: BindAddress | None,
    answers: Mapping[str, bytes],
    contexts: Mapping[str, ssl.SSLContext],
) -> Iterator[None]:
    """Answer http-01 and tls-alpn-01 in the block. Raises `ListenError`."""
    with ExitStack() as running:
        for address, serve in (
            (http, lambda connection: _answer_http(connection, answers)),
            (https, lambda connection: _answer_tls(connection, contexts)),
        ):
            if address is not None:
                running.enter_context(_serving(address, serve))
        yield


@contextmanager
def _serving(address: BindAddress, serve: Callable[[socket.socket], None]) -> Iterator[None]:
    try:
        family = socket.AF_INET if "." in address.host else socket.AF_INET6
        where = address.host, address.port
        listener = socket.create_server(where, family=family, dualstack_ipv6=not address.host)
    except OSError as error:
        text = f"could not listen on {address.host or '[::]'}:{address.port} for challenges: {reason_of(error)}"
        raise ListenError(text) from None

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # the block has ended
                return
            connection.settimeout(HANDSHAKE_TIMEOUT)
            with connection, suppress(OSError):
                serve(connection)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def _answer_http(connection: socket.socket, answers: Mapping[str, bytes]) -> None:
    class ChallengeHandler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = answers.get(self.path.removeprefix(HTTP_PATH))
            self.send_response(200 if body is not None else 404)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_: object) -> None:
            """Nothing: the steps of the order are shown instead."""

    server = HTTPServer(("", 0), ChallengeHandler, bind_and_activate=False)
    try:
        ChallengeHandler(connection, peer_address(connection), server)
    finally:
        server.server_close()


def _answer_tls(connection: socket.socket, contexts: Mapping[str, ssl.SSLContext]) -> None:
    def choose(shaken: ssl.SSLSocket | ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> int | None:
        found = contexts.get((name or "").lower())
        if found is None:
            return int(ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME)
        shaken.context = found
        return None

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sni_callback = choose
    context.wrap_socket(connection, server_side=True).close()
