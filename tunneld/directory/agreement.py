"""A request for a tunnel whose name and owner have one already: whether it replaces that one, serves it together with
other agents (`share`), or is refused.
"""

from __future__ import annotations

from dataclasses import fields

from tunneld.errors import LimitReachedError, UsageError
from tunneld.policy.access import Grant
from tunneld.policy.limits import effective_limits
from tunneld.policy.options import TunnelOptions, format_option
from tunneld.tunnel.tunnel import Phase, Tunnel

NEW_TUNNEL_GRACE = 10.0
"""Seconds after opening in which `replace=no` treats a tunnel as served, though no server connection has arrived: an
agent on a slow network keeps the name that it has just taken over.
"""


def shared_tunnel(current: Tunnel | None, options: TunnelOptions) -> Tunnel | None:
    """The open tunnel to serve, for options with `share`. Raises `UsageError` where they cannot have it."""
    if not options.share:
        return None
    if not (options.name and options.persist):
        raise UsageError("share=yes requires a name and persist=yes")
    return current if current is not None and current.spec.options.share else None


def check_unserved(current: Tunnel | None) -> None:
    """Raise `LimitReachedError` where an agent serves the open tunnel of this holder."""
    if current is not None and (current.phase is Phase.READY or current.age < NEW_TUNNEL_GRACE):
        raise LimitReachedError(
            f"tunnel {current.spec.options.name!r} is served by another agent, {current.spec.owner} "
            f"({current.id}); stop that agent, or use another name (replace=no)"
        )


UNCOMPARED = frozenset({"name", "client_port", "node", "replace", "scheme", "ttl"})
"""Options that `check_agrees` compares in another way or not at all. Agents count their ttl down; the one with which
the tunnel was opened holds.
"""


def check_agrees(tunnel: Tunnel, backend: str, options: TunnelOptions, requested: TunnelOptions, grant: Grant) -> None:
    """Raise `UsageError` where an option that an agent `requested` contradicts the shared tunnel that it is to serve.
    An option that it left out agrees with every value. `options` are the requested ones as `permit` returned them; the
    limits of the grant are applied before the comparison, as they were when the tunnel was opened. One that was changed
    since then agrees, too.
    """
    bound = effective_limits(tunnel.spec.settings, grant, options).bound(options)
    theirs, defaults = tunnel.spec.options, TunnelOptions()
    if backend != tunnel.spec.backend:
        raise _contradiction(tunnel, f"with backend {tunnel.spec.backend}", f"backend {backend}")
    port = tunnel.client_uri.port
    if options.client_port not in {None, port}:
        raise _contradiction(tunnel, f"with client_port={port}", f"client_port={options.client_port}")
    for field in fields(requested):
        name = field.name
        if name in UNCOMPARED or name in tunnel.spec.changed or getattr(requested, name) == getattr(defaults, name):
            continue
        wanted, there = getattr(bound, name), getattr(theirs, name)
        if wanted != there:
            raise _contradiction(
                tunnel,
                f"with {name}={format_option(there)}" if there else f"without {name}",
                f"{name}={format_option(wanted)}",
            )


def _contradiction(tunnel: Tunnel, there: str, requested: str) -> UsageError:
    name = tunnel.spec.options.name
    return UsageError(
        f"shared tunnel {name!r} is open {there}, but {requested} was requested: use the same or leave it out"
    )
