"""Peers that vanished: a phone out of reach, a machine without power, a firewall that forgot the connection.

Nothing says so. TCP retransmits for a quarter of an hour, and meanwhile the relay of a download that nobody receives
keeps its memory, its place among the visitors and a connection to the hidden server.

A reader that pauses must not be taken for one that vanished. It closes its window, and the kernel probes the window,
ever more rarely, up to every two minutes; since Linux 5.11 TCP_USER_TIMEOUT ends such connections, too. But a live peer
answers every probe and every retransmission. So a peer has vanished if, while bytes for it are outstanding,

    nothing at all has come from it for `EngineLimits.unacknowledged_timeout` seconds, and
    the kernel has sent it at least `MIN_UNANSWERED` segments in that time, or tried to.

The kernel counts segments in both directions (TCP_INFO). Relays without traffic cost a comparison a round, others one
system call for each end; a round is spread over `SLICES` moments, so that ten thousand relays delay no one.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, Final

import trio

from tunneld.engine.failures import TcpSocket
from tunneld.engine.timers import Timers

if TYPE_CHECKING:
    from tunneld.engine.end import End
    from tunneld.engine.flow import Flow
    from tunneld.engine.relay import JoinedEnds

MIN_UNANSWERED: Final = 3
"""Segments in a row that got no answer: two may have been lost."""
ROUNDS: Final = 4
"""Rounds per timeout, so that a vanished peer is noticed at most a quarter later."""
SLICES: Final = 32
"""Parts of a round: of ten thousand relays, some 300 are looked at together, in less than a millisecond."""

TCP_INFO: Final = getattr(socket, "TCP_INFO", None)
"""None where the system is not Linux: nothing is watched there."""
_ESTABLISHED: Final = frozenset({1, 4, 8})
"""tcpi_state in which bytes may be outstanding: ESTABLISHED, FIN_WAIT1, CLOSE_WAIT. One that connects is its dialler's
concern.
"""
_COUNTS: Final = struct.Struct("=BxB21xI108xIII")
"""Of Linux's `struct tcp_info`: tcpi_state, tcpi_retransmits; tcpi_unacked at 24; tcpi_segs_out, tcpi_segs_in and
tcpi_notsent_bytes at 136.
"""


class SilentPeer:
    """An end with outstanding bytes whose peer has not answered since `since`."""

    __slots__ = ("retransmits", "segments_in", "segments_out", "since")

    def __init__(self, since: float, segments_in: int, segments_out: int, retransmits: int) -> None:
        self.since = since
        self.segments_in = segments_in
        self.segments_out = segments_out
        self.retransmits = retransmits  # in a row; the kernel counts them also if it has no route any more

    def unanswered(self, segments_out: int, retransmits: int) -> int:
        """How many segments the kernel has sent since, by its present counts."""
        return max(segments_out - self.segments_out, retransmits - self.retransmits)


class VanishedPeers:
    """Looks for vanished peers among the relays of one engine."""

    def __init__(self, timers: Timers, relays: set[JoinedEnds], timeout: float) -> None:
        """`timeout` in seconds; 0: peers are not watched."""
        self.deadline = 0.0
        self.timeout = timeout
        self._timers = timers
        self._relays = relays
        self._round: list[JoinedEnds] = []  # still to be looked at in this round
        self._slice = 0
        self.watching = False

    def watch(self) -> None:
        """A relay has started: look for vanished peers from now on, until no relay is left. Does nothing if it does."""
        if self.timeout and TCP_INFO is not None:
            self.watching = True
            self._sleep()

    def on_deadline(self) -> None:
        """Look at the next slice of the relays."""
        if not self._relays or not self.timeout:
            self.watching = False
            self._round = []
            return
        if not self._round:
            self._round = list(self._relays)
            self._slice = len(self._round) // SLICES + 1
        relays, self._round = self._round[: self._slice], self._round[self._slice :]
        now = trio.current_time()
        for relay in relays:
            for flow in (relay.from_visitor, relay.from_server):
                if not relay.closed:
                    self._check(relay, flow, now)
        self._sleep()

    def _sleep(self) -> None:
        self.deadline = trio.current_time() + self.timeout / ROUNDS / SLICES
        self._timers.watch(self)

    def _check(self, relay: JoinedEnds, flow: Flow[End, End], now: float) -> None:
        """Look at the source of `flow`. Without new bytes for it and outstanding ones there is nothing to ask."""
        inward = flow.reverse
        if inward.moved == inward.looked_at and inward.silent is None:
            return
        inward.looked_at = inward.moved
        connection = flow.source.tcp_connection
        counts = _outstanding(connection) if connection is not None else None
        silent = inward.silent
        if counts is None:
            inward.silent = None
        elif silent is None or silent.segments_in != counts[0]:
            inward.silent = SilentPeer(now, *counts)
        elif now - silent.since >= self.timeout and silent.unanswered(counts[1], counts[2]) >= MIN_UNANSWERED:
            relay.on_vanished(flow, now - silent.since)


def _outstanding(connection: TcpSocket) -> tuple[int, int, int] | None:
    """The numbers of segments received, of those sent, and of retransmissions, if bytes are outstanding; else None."""
    assert TCP_INFO is not None
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, TCP_INFO, _COUNTS.size)
    except OSError:
        return None  # not TCP, or closed
    if len(info) < _COUNTS.size:  # an old kernel
        return None
    state, retransmits, unacknowledged, segments_out, segments_in, unsent = _COUNTS.unpack(info)
    if state not in _ESTABLISHED or not (unacknowledged or unsent):
        return None
    return segments_in, segments_out, retransmits
