"""Sizes and times of associations and their links, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from tunneld.wire.egtp.delivery import WINDOW

MAX_STREAM_MESSAGE = 1024 * 1024
"""Octets of the frames in one message: four times what a carrier lets pend."""
MAX_LINK_FRAME = MAX_STREAM_MESSAGE + 16 * 1024
"""Octets of a TCP frame, with everything around the frames of streams."""
MAX_UNSENT = 2 * MAX_LINK_FRAME
"""Bytes of output that may wait for a peer that sends but does not read."""
DRAIN_SIZE = 1024 * 1024
"""Bytes of input that are discarded before a connection is closed: unread input would reset it, and the reset would
overtake our last message.
"""
FLUSH_SIZE = 256 * 1024
"""Octets of frames that become a message at once, rather than after the batch. A message costs 70 µs at both ends
together, as much as encrypting 100 KiB; and no more than `CarrierLimits.pause_at` pends anyway.
"""
MAX_REQUESTS = 4 * WINDOW
"""Requests of a link without a response: each message that may be under way, and that it was sent again three times."""
MAX_REQUEST_VALUES = 64
"""Values in a request of an agent, which has some 30. A hostile one takes half a millisecond to parse."""
MAX_MAIL_VALUES = WINDOW + 64
"""The same at an agent: the response to a poll is a list of messages."""
MESSAGE_COST, OTHER_COST = 8, 64
"""Units of a turn's budget that a message costs, in addition to its frames; and one that is not a message of streams,
which is parsed in the general way.
"""
MISSED_POLLS = 2
"""Intervals after which a node that polls is given up, in addition to `resume_timeout`: one poll may fail."""


@dataclass(frozen=True, slots=True)
class AssociationLimits:
    """Times in seconds, and a count."""

    resume_timeout: float = 15.0
    "How long channels wait for another link: enough for a network that changes, and not too long for a visitor."

    retransmission: float = 30.0
    """After this time without a response, a message is sent again. TCP loses nothing, and a link that is given up by
    the heartbeat makes the other end send everything again at once: so this is for a peer that had no room.
    """

    max_channels: int = 1000
    "Channels at once: as many visitors."
