"""Waits for a ClientHello on an accepted connection, and leaves it there.

The bytes stay in the kernel (MSG_PEEK), so a connection can still be passed on untouched, with splice. While the
message is incomplete, SO_RCVLOWAT makes the kernel report the connection only once there is more than was seen: a
client that sends one byte at a time costs one look for each, and no more.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress

from tunneld.engine.acceptor import peer_ended
from tunneld.engine.engine import FailureCallback
from tunneld.engine.pump import Pump
from tunneld.errors import reason_of
from tunneld.wire.client_hello import MAX_HELLO_BYTES, ClientHello, HelloError, encode_alert, parse_client_hello


class HelloReader:
    """One connection, until its ClientHello is complete, refused, or late. The caller owns the connection."""

    def __init__(
        self,
        engine: Pump,
        connection: socket.socket,
        timeout: float,
        on_hello: Callable[[HelloReader, ClientHello], None],
        on_refused: Callable[[HelloReader, str], None],
        on_failure: FailureCallback,
        waiting: set[HelloReader],
    ) -> None:
        """Start waiting. One of the callbacks follows, once, perhaps at once. `timeout` is in seconds; `waiting` holds
        the reader until then.
        """
        self.connection = connection
        self.deadline = engine.now() + timeout
        self._engine = engine
        self._timeout = timeout
        self._on_hello = on_hello
        self._on_refused = on_refused
        self._low_water = 1
        self._over = False
        self._waiting = waiting
        waiting.add(self)
        engine.timers.watch(self)
        self._watching = engine.watch(connection, self._look, on_failure)
        self._look()  # it is mostly there already

    def stop(self) -> None:
        """Wait no longer; no callback follows."""
        if not self._over:
            self._over = True
            self._waiting.discard(self)
            self._engine.timers.forget(self)
            self._watching.release()

    def on_deadline(self) -> None:
        """The client is late."""
        self._refuse(f"no TLS handshake within {self._timeout:g} s (names.head_timeout)")

    def _look(self) -> None:
        if self._over:
            return
        try:
            seen = self.connection.recv(MAX_HELLO_BYTES, socket.MSG_PEEK)
            hello = parse_client_hello(seen)
            if hello is None and peer_ended(self.connection):
                self._refuse("connection ended before the TLS handshake")
            elif hello is None:
                self._set_low_water(len(seen) + 1)
            else:
                self.stop()
                self._set_low_water(1)
                self._on_hello(self, hello)
        except BlockingIOError:
            return
        except HelloError as error:
            with suppress(OSError):
                self.connection.send(encode_alert(error.alert))
            self._refuse(str(error))
        except OSError as error:
            self._refuse(reason_of(error))

    def _set_low_water(self, count: int) -> None:
        if count != self._low_water:
            self._low_water = count
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)

    def _refuse(self, reason: str) -> None:
        self.stop()
        self._on_refused(self, reason)
