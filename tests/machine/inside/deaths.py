"""What becomes of addresses when the relay dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

from tests.machine.inside.agents import is_there
from tests.machine.inside.relay import RELAY, RUNNING, SLOW, addresses
from tests.machine.inside.steps import step
from tests.machine.inside.tools import expect, wait_until

WATCHED = SLOW.replace("WatchdogSec=900", "WatchdogSec=30")
"""The unit's own."""


@step
def a_daemon_that_is_killed_comes_back_and_so_do_addresses() -> Iterator[str]:
    """kill -9: systemd starts another one, to which the agent comes back, at the same address."""
    restarts = int(RELAY.NRestarts)
    yield from _is_back_after(signal.SIGKILL)
    expect(int(RELAY.NRestarts), restarts + 1, "restarts")
    yield RELAY.of_manager()


@step
def a_daemon_that_hangs_is_killed_by_the_watchdog_and_comes_back() -> Iterator[str]:
    """kill -STOP with the unit's own WatchdogSec: systemd ends it, and the journal shows where it hung."""
    RELAY.drop_in(WATCHED)
    RELAY.do("restart")
    yield from _is_back_after(signal.SIGSTOP)
    yield RELAY.must_say("most recent call first")
    yield RELAY.of_manager()
    RELAY.drop_in(SLOW)
    RELAY.do("restart")


def _is_back_after(what: signal.Signals) -> Iterator[str]:
    wait_until("the agent is there", is_there)
    before, pid = addresses("alice"), RELAY.MainPID
    RELAY.listen()
    began = time.monotonic()
    os.kill(int(pid), what)
    wait_until("there is another", lambda: RELAY.MainPID not in {pid, "0"})
    yield f"another process after {time.monotonic() - began:.0f} s"
    RELAY.must_be(RUNNING)
    wait_until("the page is back", is_there)
    yield f"the page after {time.monotonic() - began:.0f} s"
    expect(addresses("alice"), before, "addresses")
