"""What a keeper looks after: the connections to the relay by which visitors come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tunneld.agent.ways import Take
from tunneld.relay.engine import FailureCallback

MAX_DIALS_AT_ONCE = 8
"""Connections being made: half of what a relay takes from one source unless told otherwise. Until it has shown its key,
each is a stranger there.
"""


@dataclass(frozen=True, slots=True)
class SourceEvents:
    """Whom a supply tells."""

    on_visitor: Take
    on_trouble: Callable[[str], None]
    """A connection ended that was wanted, or could not be made, and why."""
    on_failure: FailureCallback
    """A bug in a callback."""
    on_unknown_tunnel: Callable[[], None] = lambda: None
    """The relay answered, and does not know the tunnel: whoever waits for the relay need not wait any more."""


class ConnectionSource(Protocol):
    """Connections to the server side of one tunnel: a pool of parked ones, or carriers."""

    @property
    def description(self) -> str:
        """What it consists of, for people."""

    @property
    def size(self) -> int:
        """How many parked connections the relay should keep."""

    @property
    def parked(self) -> int:
        """How many connections stand ready, or are on their way to."""

    def resume(self) -> None:
        """Dial what lacks, now and whenever something does, until there is trouble or somebody calls `rest`."""

    def pause(self) -> None:
        """Dial nothing until `resume`; what stands goes on."""

    def resize(self) -> bool:
        """Shrink where there is more than needed; tells whether the relay has parked connections to trim."""

    def probe(self) -> None:
        """The network changed, or the machine was asleep: what stands may have been cut off without a word."""

    def close(self) -> None:
        """Let go of everything that serves no visitor."""

    def withdraw(self) -> None:
        """Want no more visitors, and say so where that can be said on the connections themselves. Whom the relay sends
        before it has heard of it comes all the same.
        """

    async def wait_withdrawn(self) -> None:
        """Wait until it has: those who were on their way are here then."""

    async def wait_closed(self) -> None:
        """Wait, after `withdraw`, until no connection is left."""
