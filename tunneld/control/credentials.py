"""The verb `credentials`: which credentials the relay knows, what each may do, and how much of it is in use.

It changes nothing: credentials are kept in the configuration, which the relay may not write. `tunnel credential` does.
"""

from __future__ import annotations

from tunneld.config.credentials import Credential
from tunneld.control.verbs import DaemonControl
from tunneld.directory.reply import DescribedItems, Reply
from tunneld.directory.requester import Requester
from tunneld.policy.access import GRANT_LIMITS
from tunneld.policy.units import count
from tunneld.wire.lines import ControlRequest, Item


async def list_credentials(daemon: DaemonControl, _request: ControlRequest, _caller: Requester) -> Reply:
    """One item for each credential, without anything that proves its identity."""
    credentials = daemon.settings.credential

    def describe(one: Credential) -> Item:
        return {
            "name": one.name,
            "role": one.role,
            "proof": ",".join(one.proofs),
            "limits": _limits(one) or None,
            "tunnels": daemon.service.live.count_of(one.name),
        }

    return Reply(text=count(len(credentials), "credential"), items=DescribedItems(credentials, describe))


def _limits(credential: Credential) -> str:
    """`max_tunnels=5 ports=20080,20081`, as `tunnel credential list` shows them."""
    found = ((key, value) for key in GRANT_LIMITS if (value := getattr(credential, key)) is not None)
    return " ".join(f"{key}={','.join(value) if isinstance(value, tuple) else value}" for key, value in found)
