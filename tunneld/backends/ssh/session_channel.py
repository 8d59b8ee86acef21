"""The channel of a session: which requests a client may make on it.

asyncssh keeps every environment variable that a client sends, for as long as the session lasts. Our sessions need none,
nor agents, X11 or subsystems, so all requests but a few are refused unread.
"""

from __future__ import annotations

import asyncssh
from asyncssh.constants import MSG_CHANNEL_FAILURE, MSG_CHANNEL_REQUEST
from asyncssh.packet import SSHPacket

SESSION_REQUESTS = frozenset({b"pty-req", b"shell", b"exec", b"window-change", b"signal", b"break"})
"""The channel requests that are read. `eow@openssh.com`, which wants no reply, needs no handling."""
MAX_REQUEST_BYTES = 8 * 1024
"""Bytes of a channel request: commands and terminal modes are below one KiB."""
CHANNEL_HEADER_BYTES = 5
"""The packet type and the channel number, which have been read when a channel gets a packet."""


class SessionChannel(asyncssh.SSHServerChannel[str]):
    """A channel that reads only `SESSION_REQUESTS`."""

    @classmethod
    def like(cls, channel: asyncssh.SSHServerChannel[str]) -> SessionChannel:
        """Turn a channel that asyncssh has created into one of these."""
        channel.__class__ = cls
        assert isinstance(channel, cls)
        return channel

    def _process_channel_request(self, kind: int, number: int, packet: SSHPacket) -> None:
        """Handle or refuse a request. None of those that are handled waits, so replies keep their order."""
        payload = packet.get_full_payload()
        name, wants_reply = packet.get_string(), packet.get_boolean()
        if name in SESSION_REQUESTS and len(payload) <= MAX_REQUEST_BYTES:
            again = SSHPacket(payload)
            again.get_bytes(CHANNEL_HEADER_BYTES)
            self._process_request(kind, number, again)
        elif wants_reply and self._send_state not in {"close_pending", "closed"}:
            self.send_packet(MSG_CHANNEL_FAILURE)

    _packet_handlers = {  # noqa: RUF012  # asyncssh's table, with our handler in it
        **asyncssh.SSHServerChannel._packet_handlers,
        MSG_CHANNEL_REQUEST: _process_channel_request,
    }
