"""Tells the user if the local server refuses requests for its public name: Vite, webpack, Django, Rails and others do.

The bytes of visitors pass the agent unseen. So it asks the local server itself, once, when the first visitor has come:
for the public name and, if that is refused, for the local one.
"""

from __future__ import annotations

import trio

from tunneld.agent.defaults import CHECK_TIMEOUT
from tunneld.agent.events import Reporter
from tunneld.agent.health import request_status
from tunneld.agent.local import LocalServer

REFUSALS = frozenset({400, 403, 404, 421})
"""Statuses for an unknown host: 400 of Django, 403 of Vite and Rails, 404 and 421 of servers with virtual hosts."""


async def report_refused_host(local: LocalServer, public: str, expected: str, reporter: Reporter) -> None:
    """Report if requests for the host `public` are refused, and requests for `expected` are not."""
    with trio.move_on_after(CHECK_TIMEOUT):
        status = await _status(local, public)
        if status in REFUSALS and await _status(local, expected) not in {None, *REFUSALS}:
            reason = (
                f"the local server refuses requests for {public} (status {status}) but not for {expected}; "
                "use --host-header local"
            )
            reporter.report("trouble", reason=reason, repeated=0)


async def _status(local: LocalServer, host: str) -> int | None:
    try:
        return await request_status(await local.dial(), "/", host)
    except (OSError, trio.BrokenResourceError):
        return None
