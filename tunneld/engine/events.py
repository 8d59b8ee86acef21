"""What epoll reports about a socket, as far as it matters to a handler. Linux's numbers (epoll_ctl(2)), so that modules
that only mention them can be imported anywhere.
"""

from __future__ import annotations

from typing import Final

IN, PRI, OUT, ERR, HUP, RDHUP = 0x001, 0x002, 0x004, 0x008, 0x010, 0x2000

BROKEN: Final = ERR | HUP
"""Events of a socket that may be broken."""
UNTIL_EAGAIN: Final = BROKEN | RDHUP | PRI
"""Events after which a short read does not mean that the socket is drained."""
READABLE: Final = UNTIL_EAGAIN | IN
"""Events after which a read may succeed or report an end."""
WRITABLE: Final = BROKEN | OUT
"""Events after which a write may succeed or report an error."""
