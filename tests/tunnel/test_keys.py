"""Keys of server URIs: which server sides a registry finds."""

from __future__ import annotations

from dataclasses import dataclass

from tunneld.tunnel.keys import KeyRegistry


@dataclass(eq=False)
class Side:
    key: str
    backend: str = "egtp"


def test_a_closed_side_is_found_while_its_visitors_need_it() -> None:
    registry, former, present = KeyRegistry(), Side("key"), Side("key")
    registry.register(former)
    registry.unregister(former)
    assert registry.find_all("key") == []
    registry.keep(former)
    assert (registry.find("key"), registry.find_all("key")) == (None, [former])
    registry.register(present)
    assert (registry.find("key"), registry.find_all("key")) == (present, [former, present])
    for _ in range(2):
        registry.forget(former)
    assert registry.find_all("key") == [present]
