"""Polling: for agents that cannot hold a connection, because something cuts it.

    every `interval`, or as soon as there is something to send:
        connect ──► ask ──► visitors' bytes ──► ask again, at once while there are more, else after a pause ──► hang up

A visitor waits for the next poll, up to `interval`. After that the connection is kept while bytes go in either
direction, and for a moment more: a web page has several requests.
"""

from __future__ import annotations

import trio

from tunneld.agent.association import AgentAssociation

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 0.4
"""Seconds after an answer that nothing waits: twice as long each time, and after the longest the agent hangs up."""
ANSWER_TIMEOUT = 30.0
"""Seconds for the answer to a question, after which the connection is given up."""


async def exchange(association: AgentAssociation) -> bool:
    """Exchange messages with the relay while there are any, then hang up. Returns False if the connection was lost."""
    attachment, pause = association.carrier.attachment, FIRST_PAUSE
    while attachment.attached:
        sent = attachment.output.outbox.next
        with trio.move_on_after(ANSWER_TIMEOUT) as waiting:
            if await association.poll():
                pause = FIRST_PAUSE
                continue
        if waiting.cancelled_caught:
            attachment.hang_up("the relay does not answer")
            return False
        await trio.sleep(pause)
        if attachment.output.outbox.next != sent:
            pause = FIRST_PAUSE
        elif pause >= LONGEST_PAUSE:
            attachment.hang_up("nothing to send until the next poll")
            return True
        else:
            pause *= 2
    return association.carrier.over
