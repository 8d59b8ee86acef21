"""The host names that a request asks for: completed, checked, and proved where they are of the user's own domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import structlog

from tunneld.errors import LimitReachedError, NotAllowedError, UsageError
from tunneld.net.address import HostName
from tunneld.policy.access import Grant
from tunneld.policy.names import check_name, complete_name, is_custom
from tunneld.policy.options import ANY_HOST
from tunneld.policy.reservations import Reservation
from tunneld.sites.names import SharedNames, is_random, random_name
from tunneld.sites.proofs import MissingProof

log: structlog.stdlib.BoundLogger = structlog.get_logger("service")

Proofs = Mapping[HostName, MissingProof | None]
"""Host names of domains that are not the relay's, and what their proof lacks; None: nothing."""


async def find_proofs(shared: SharedNames | None, texts: Sequence[str], grant: Grant) -> Proofs:
    """Look up the proofs for names of domains of the requester's own, up to the first that is missing. A credential
    whose names the operator has listed can have no other ones.
    """
    found: dict[HostName, MissingProof | None] = {}
    if shared is None or not shared.proofs.is_on or not grant.name or grant.names is not None:
        return found
    domain = shared.settings().domain
    for text in texts:
        try:
            name = complete_name(text, domain) if text != ANY_HOST else None
        except UsageError:
            return found  # it is refused without a look-up
        if name is not None and is_custom(name, domain):
            found[name] = await shared.proofs.check(name, grant.name)
            if found[name] is not None:
                return found
    return found


def _check_proof(name: HostName, missing: MissingProof | None, grant: Grant, reservation: Reservation | None) -> None:
    """Raise `NotAllowedError` where the proof for a name is missing, or `LimitReachedError` where the DNS does not
    answer, unless the name is reserved for the holder: it had a proof then, and a DNS server that fails must not keep
    agents from coming back.
    """
    if missing is None:
        return
    if missing.is_certain:
        raise NotAllowedError(
            f"{grant.title} may not use the host name {name} before its owner permits that: {missing.reason}"
        )
    if reservation is None or name not in reservation.addresses:
        raise LimitReachedError(
            f"{grant.title} may not use the host name {name} before its owner permits that, and the relay "
            f"{missing.reason}; try again later"
        )
    log.warning("host name opened without a fresh proof", name=str(name), owner=grant.name, reason=missing.reason)


def resolve_names(
    shared: SharedNames | None,
    texts: Sequence[str],
    grant: Grant,
    reservation: Reservation | None,
    proofs: Proofs,
) -> tuple[HostName, ...]:
    """The host names that a request asks for, in full. A random name is the one that is reserved for the holder, if
    there is one. `proofs` are for names of other domains than the relay's. Raises `UsageError`, `NotAllowedError` or
    `LimitReachedError`.
    """
    if not texts:
        return ()
    if shared is None:
        raise UsageError("this relay has no host names (names.http, names.https); leave host out")
    shared.check()
    domain, names = shared.settings().domain, []
    for text in texts:
        if text != ANY_HOST:
            name = complete_name(text, domain)
            if name in proofs:
                _check_proof(name, proofs[name], grant, reservation)
            else:
                check_name(name, domain, grant.names, grant.title if grant.name else "this relay's tunnels")
        elif not domain:
            raise UsageError("this relay has no domain for random host names (names.domain); ask for a name")
        else:
            kept = [one for one in (reservation.addresses if reservation is not None else ()) if one not in names]
            again = (one for one in kept if isinstance(one, HostName) and is_random(one, domain))
            name = next(again, None) or random_name(domain)
        if name in names:
            raise UsageError(f"host name {name} is given twice")
        names.append(name)
    return tuple(names)
