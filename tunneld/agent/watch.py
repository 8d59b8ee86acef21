"""The task that looks at the local server, and has its exposure act on what it sees."""

from __future__ import annotations

from collections.abc import Callable

import trio

from tunneld.agent.events import Reporter
from tunneld.agent.health import Check, HealthState
from tunneld.agent.local import LocalServer
from tunneld.agent.probe import probe


async def watch(local: LocalServer, check: Check, teller: Reporter, act: Callable[[bool], None]) -> None:
    """Look every `check.interval` seconds until cancelled. `act` is told after each look whether the server counts as
    healthy, changed or not, so that what it does holds even where something undid it meanwhile.
    """
    judgement = HealthState(check)
    while True:
        reason = await probe(local, check)
        if judgement.look(passed=reason is None):
            if judgement.healthy:
                teller.report("healthy")
            else:
                teller.report("unhealthy", reason=reason or "")
        act(judgement.healthy)
        await trio.sleep(check.interval)
