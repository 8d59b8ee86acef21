"""Certificates as operators see them: in `certificates` and in the status."""

from __future__ import annotations

import math
from collections.abc import Iterator

from tunneld.acme.plans import CertificatePlans
from tunneld.tls.certificate import ServerCertificate
from tunneld.tls.store import CertificateStore
from tunneld.wire.lines import Item


def describe(store: CertificateStore, plans: CertificatePlans, now: float) -> Iterator[Item]:
    """One item for each certificate for host names, and for each name that waits for one. Times are in seconds from
    `now`.
    """
    described = set()
    for each in store.configured():
        yield _item(each, ",".join(each.names), "file", now)
    for each in store.stored():
        name = next(iter(each.names), "")
        described.add(name)
        yield {**_item(each, ",".join(each.names), "acme", now), **_plan(plans, name, now)}
    for name, wanted in plans.names.items():
        if name not in described and (
            wanted.due_at < math.inf or wanted.in_order is not None or plans.failures.get(name)
        ):
            yield {**_item(None, name, "acme", now), **_plan(plans, name, now)}


def _item(certificate: ServerCertificate | None, names: str, source: str, now: float) -> Item:
    not_after = certificate.not_after if certificate is not None else None
    return {
        "names": names,
        "source": source,
        "expires": None if not_after is None else round(not_after - now),
        "renews": None,
        "owner": None,
        "failures": 0,
        "failure": None,
    }


def _plan(plans: CertificatePlans, name: str, now: float) -> Item:
    """What will be done for a name, and why it was not done."""
    wanted, failed = plans.names.get(name), plans.failures.get(name)
    due = math.inf if wanted is None or wanted.due_at == math.inf else plans.order_at(wanted)
    return {
        "renews": None if due == math.inf else max(0, round(due - now)),
        "owner": wanted.owner or None if wanted is not None else None,
        "failures": failed.count if failed is not None else 0,
        "failure": failed.reason if failed is not None else None,
    }


def problems(plans: CertificatePlans, now: float) -> list[str]:
    """Which wanted names have no certificate, in a few words each, for the status."""
    return [
        f"no certificate for {name}: {failed.reason}"
        for name, failed in plans.failures.items()
        if name in plans.names and not ((found := plans.covering(name)) and found.is_valid(now))
    ]
