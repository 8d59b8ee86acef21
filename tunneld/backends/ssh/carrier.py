"""The channels of one SSH connection, as `session.Channel` knows carriers; what each has said is in `flow`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import asyncssh
import structlog
import trio
from asyncssh.constants import MSG_CHANNEL_WINDOW_ADJUST
from asyncssh.packet import UInt32

from tunneld.backends.ssh.channel import ForwardEvents, SshChannel
from tunneld.backends.ssh.fast import FastConnection
from tunneld.backends.ssh.transport import SshTransport
from tunneld.mux.channel import Channel
from tunneld.mux.heartbeat import Heartbeat
from tunneld.mux.limits import CarrierLimits
from tunneld.mux.window import ReceiveWindow, WindowBudget
from tunneld.net.endpoint import unmap

log = structlog.get_logger("ssh")

HIDDEN_ORIGINATOR = ("0.0.0.0", 0)
"""The originator of a visitor who is to be hidden: the form of RFC 4254 takes an address."""


class SshCarrier:
    """Everything on a connection that is not asyncssh's."""

    def __init__(
        self,
        connection: FastConnection,
        transport: SshTransport,
        limits: CarrierLimits,
        dial_timeout: float,
        silent: Callable[[], None],
    ) -> None:
        """`dial_timeout` is in seconds, see `SshChannel`; `silent` is told of a sign of life that did not come in time."""
        self.pump = transport.pump
        self.limits = limits
        self.dial_timeout = dial_timeout
        self.over = False
        self.connection = connection
        self.transport = transport
        self.heartbeat = Heartbeat(self, limits, transport.pump.timers, transport.link.idle_seconds)
        self._sign = trio.Event()  # of life
        self._silent = silent
        self._outbox = transport.outbox
        self._budget = WindowBudget(limits.memory, transport.pump.now, transport.link.round_trip)
        self.flows: dict[int, SshChannel] = {}
        self._mute: dict[Channel, None] = {}  # channels that wait for a key exchange to end, in that order
        transport.pulse = self.heartbeat
        connection.on_channel_data = self._hear_data
        connection.on_new_keys = self._hear_keys
        connection.on_keepalive_reply = self._hear_sign

    def open(self, owner: ForwardEvents) -> Channel:
        """A channel for a visitor, of whom nothing is said before `Channel.introduce`."""
        flow = SshChannel(self, owner)
        number = self.connection.add_channel(flow)  # type: ignore[arg-type]  # it asks for what Flow has
        window = ReceiveWindow(self.limits.first_window, self.limits.max_window, self._budget)
        flow.number, flow.channel = number, Channel(self, number, window)
        self.flows[number] = flow
        return flow.channel

    def lose(self, reason: str) -> None:
        """The connection is gone: so are all channels."""
        self.over = True
        self.heartbeat.stop()
        self._sign.set()
        flows, self.flows = self.flows, {}
        for flow in flows.values():
            flow.channel.notify_reset(f"the carrier was lost: {reason}")

    # What channels do, see `Carries`

    def accept(self, channel: Channel) -> None:
        """Nobody opens one towards us."""

    def set_originator(self, channel: Channel, visitor: Any | None) -> None:
        """SSH_MSG_CHANNEL_OPEN "forwarded-tcpip", with the visitor as its originator."""
        if flow := self.flows.get(channel.sid):
            flow.ask(HIDDEN_ORIGINATOR if visitor is None else (unmap(str(visitor[0])), int(visitor[1])))

    def send_capacity(self, channel: Channel) -> int:
        """See `Carries`: by the carrier's own room and the peer's window."""
        if self.connection.can_send:
            flow = self.flows.get(channel.sid)
            return 0 if flow is None else min(self._outbox.send_capacity(channel), flow.credit)
        self._mute[channel] = None
        return 0

    def write(self, sid: int, data: memoryview) -> int:
        """SSH_MSG_CHANNEL_DATA, as many as the peer's largest packet makes of it."""
        flow = self.flows[sid]
        taken = min(len(data), flow.credit)
        if flow.closed_by_peer:
            flow.close()
            flow.channel.notify_reset("closed by the peer")
            return taken
        most, say = flow.most, self.connection.send_data
        if taken <= most:
            if taken:
                say(flow.head, data[:taken])
        else:
            for start in range(0, taken, most):
                say(flow.head, data[start : min(start + most, taken)])
        flow.credit -= taken
        return taken

    def grant_credit(self, sid: int, octets: int) -> None:
        """SSH_MSG_CHANNEL_WINDOW_ADJUST."""
        if (flow := self.flows.get(sid)) and not flow.closed_by_peer:
            flow.allowed += octets
            flow.say(MSG_CHANNEL_WINDOW_ADJUST, UInt32(octets))

    def finish(self, channel: Channel) -> None:
        """SSH_MSG_CHANNEL_EOF; where the peer's came, too, it is the end of the channel."""
        if flow := self.flows.get(channel.sid):
            flow.finish()

    def reset(self, channel: Channel, reason: str) -> None:
        """SSH_MSG_CHANNEL_CLOSE without an end before it."""
        if (flow := self.flows.get(channel.sid)) and flow.channel is channel:
            flow.close()

    # Its heartbeat

    async def is_alive(self) -> bool:
        """Ask for a sign of life now, and wait for it as long as `CarrierLimits.patience`."""
        with trio.move_on_after(self.limits.patience):
            if self._sign.is_set():
                self._sign = trio.Event()
            self.connection.send_keepalive()
            self.pump.timers.wake_soon()
            await self._sign.wait()
            return not self.over
        return False

    def send_ping(self) -> bool:
        """See `Heart`."""
        self.connection.send_keepalive()
        return True

    def on_unresponsive(self) -> None:
        """See `Heart`."""
        self._silent()

    def on_dead(self, reason: str) -> None:
        """See `Heart`."""
        self.transport.end(reason)

    # What the connection reports

    def forget(self, flow: SshChannel) -> None:
        """We say nothing more on it."""
        if self.flows.pop(flow.number, None) is not None:
            flow.channel.release_window()
            flow.owner.on_capacity(flow.channel)

    def _hear_data(self, number: int, packet: bytes, start: int, stop: int) -> None:
        flow = self.flows.get(number)
        if flow is not None:
            flow.hear_data(packet, start, stop)
        elif number in self.connection._channels:
            self.connection._obey(packet[1:stop])  # a session's, or of a channel on which we said CLOSE
        else:
            raise asyncssh.ProtocolError(f"Invalid channel number {number} received")

    def _hear_keys(self) -> None:
        mute, self._mute = self._mute, {}
        for channel in mute:
            channel.notify_writable()

    def _hear_sign(self) -> None:
        self._sign.set()
