"""What the steps have in hand: commands, units, and people at both ends of a tunnel, in threads."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

PATIENCE = 240.0
"""Seconds for whatever must happen: the machine is emulated, and ten times slower than others."""
PATH = "/usr/local/bin:/usr/sbin:/usr/bin"
BLOCK = random.Random(7).randbytes(1 << 14)


class WrongError(Exception):
    """A step found something else than it should."""


def expect(found: object, wanted: object, what: str) -> None:
    """Raises `WrongError` unless both are the same."""
    if found != wanted:
        raise WrongError(f"{what}: {found!r}, not {wanted!r}")


def sh(command: str, *, status: int | None = 0, **variables: str) -> str:
    """What a line of shell says on both of its outputs. Raises `WrongError` where its exit status is another."""
    environment = {**os.environ, "PATH": PATH, **variables}
    done = subprocess.run(
        command, shell=True, stdout=-1, stderr=-2, text=True, check=False, timeout=600, env=environment
    )
    if status is not None and done.returncode != status:
        raise WrongError(f"{command}: exit status {done.returncode}: {done.stdout}")
    return done.stdout.strip()


def wait_until(what: str, happens: Callable[[], bool], patience: float = PATIENCE) -> float:
    """Ask until it is so; the seconds that it took. Raises `WrongError`."""
    began = time.monotonic()
    while not happens():
        if time.monotonic() - began > patience:
            raise WrongError(f"{what}: not within {patience:.0f} s")
        time.sleep(1)
    return time.monotonic() - began


class Unit:
    """A unit of the system's manager, or of a user's."""

    def __init__(self, name: str, user: str = "") -> None:
        self.name = name
        self.ctl = f"systemctl --user -M {user}@" if user else "systemctl"
        self._whose = "_SYSTEMD_USER_UNIT" if user else "_SYSTEMD_UNIT"
        self._began = time.time()

    def __getattr__(self, name: str) -> str:
        """A property, as `systemctl show` has it: `unit.MainPID`."""
        if not name[0].isupper():
            raise AttributeError(name)
        return sh(f"{self.ctl} show --value -p {name} {self.name}")

    def do(self, verb: str, *, status: int | None = 0) -> str:
        """`unit.do("restart")`; what is looked for in the journal is what came after it began."""
        self._began = time.time()
        return sh(f"{self.ctl} {verb} {self.name}", status=status)

    def journal(self) -> list[dict[str, Any]]:
        """Its own lines since the last `do`."""
        said = sh(f"journalctl --sync; journalctl -o json --since @{self._began:.6f} {self._whose}={self.name}")
        return [json.loads(line) for line in said.splitlines() if line.startswith("{")]

    def said(self, text: str) -> bool:
        """Whether one of those lines has this text in it."""
        return any(text in str(line["MESSAGE"]) for line in self.journal())

    def must_say(self, text: str) -> str:
        """The line, waited for. Raises `WrongError`."""
        wait_until(f"{self.name} says {text!r}", lambda: self.said(text))
        return next(str(line["MESSAGE"]) for line in self.journal() if text in str(line["MESSAGE"]))

    def must_be(self, state: str) -> None:
        """Waits for an ActiveState/SubState. Raises `WrongError`."""
        wait_until(f"{self.name} is {state}", lambda: f"{self.ActiveState}/{self.SubState}" == state)

    def drop_in(self, text: str) -> None:
        """What `systemctl edit` writes; empty: no more."""
        folder = Path(f"/etc/systemd/system/{self.name}.d")
        folder.mkdir(exist_ok=True)
        (folder / "override.conf").write_text(text)
        sh("systemctl daemon-reload")


def dial(uri: str) -> socket.socket:
    """A connection to `tcp://HOST:PORT` or `http://HOST:PORT/`."""
    host, port = re.findall(r"//([^:/]+):(\d+)", uri)[0]
    return socket.create_connection((host, int(port)), timeout=PATIENCE)


def read_all(connection: socket.socket) -> bytes:
    """Until its end."""
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


class Transfer:
    """Octets from a hidden server to a visitor, for as long as the block lasts; its end compares hashes."""

    def __init__(self, server: str, client: str) -> None:
        self.octets = 0
        self.may_be_cut = False
        self._hidden, self._visitor = dial(server), dial(client)
        self._enough = False
        self._hashes = hashlib.sha256(), hashlib.sha256()
        self._error: OSError | None = None
        self._threads = [
            threading.Thread(target=self._guarded, args=[one], daemon=True) for one in (self._send, self._receive)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        self.must_move()
        return self

    def __exit__(self, *exc: object) -> None:
        self._enough = True
        for thread in self._threads:
            thread.join(PATIENCE)
        if exc[0] is not None or self.may_be_cut:
            return
        if self._error is not None:
            raise WrongError(f"transfer: {self._error}")
        expect(self._hashes[1].hexdigest(), self._hashes[0].hexdigest(), "hash of what arrived")

    def must_move(self) -> None:
        """Raises `WrongError` where no more octets arrive."""
        before = self.octets
        wait_until("octets arrive", lambda: self.octets > before + (1 << 17))

    def _guarded(self, what: Callable[[], None]) -> None:
        try:
            what()
        except OSError as error:
            self._error = error

    def _send(self) -> None:
        number = 0
        while not self._enough:
            number += 1
            block = number.to_bytes(8, "big") + BLOCK
            self._hashes[0].update(block)
            self._hidden.sendall(block)
            time.sleep(0.03)
        self._hidden.shutdown(socket.SHUT_WR)

    def _receive(self) -> None:
        while chunk := self._visitor.recv(1 << 16):
            self.octets += len(chunk)
            self._hashes[1].update(chunk)
        self._visitor.close()


class Greeter:
    """A hidden server that dials in for each visitor, whatever happens, for as long as the block lasts."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._ended = False

    def __enter__(self) -> None:
        threading.Thread(target=self._serve, daemon=True).start()

    def __exit__(self, *exc: object) -> None:
        self._ended = True

    def _serve(self) -> None:
        while not self._ended:
            try:
                with dial(self._server) as connection:
                    connection.sendall(b"hello")
                    connection.shutdown(socket.SHUT_WR)
                    read_all(connection)
            except OSError:
                time.sleep(0.1)


@contextmanager
def visitors(client: str) -> Iterator[list[str]]:
    """One visitor after the other; at the end the block's list has an answer, or what went wrong, for each."""
    answers: list[str] = []
    enough = threading.Event()

    def visit() -> None:
        while not enough.is_set():
            try:
                with dial(client) as connection:
                    answers.append(read_all(connection).decode() or "nothing")
            except OSError as error:
                answers.append(str(error))
            enough.wait(0.1)

    thread = threading.Thread(target=visit, daemon=True)
    thread.start()
    try:
        yield answers
    finally:
        enough.set()
        thread.join(PATIENCE)
