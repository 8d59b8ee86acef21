"""From where hidden servers may connect, as the agents of a tunnel come, move and go."""

from __future__ import annotations

from tunneld.net.endpoint import parse_network
from tunneld.tunnel.agents import MAX_NETWORKS_PER_TUNNEL, TunnelAgents


def network(number: int) -> str:
    return f"10.0.{number // 256}.{number % 256}"


def test_of_agents_that_share_a_tunnel_each_may_connect_and_the_counted_are_those_with_a_connection() -> None:
    members = TunnelAgents(parse_network("192.0.2.1"))
    members.join("a", "127.0.0.1", parse_network("192.0.2.2"))
    assert members.why_not_allowed(("192.0.2.1", 9)) == members.why_not_allowed(("192.0.2.2", 9)) == ""
    assert (
        members.why_not_allowed(("192.0.2.3", 9))
        == "only 192.0.2.1/32 and 192.0.2.2/32 may connect as the hidden server"
    )
    members.leave("a")
    members.leave("a")
    assert len(members) == 0
    assert not members.why_not_allowed(("192.0.2.2", 9))


def test_the_only_agent_takes_its_permission_along() -> None:
    members = TunnelAgents(parse_network("192.0.2.1"))
    members.move(parse_network("192.0.2.2"))
    assert members.why_not_allowed(("192.0.2.1", 9))
    assert not members.why_not_allowed(("192.0.2.2", 9))


def test_anywhere_is_anywhere() -> None:
    members = TunnelAgents(None)
    members.join("a", "127.0.0.1", parse_network("192.0.2.2"))
    assert not members.why_not_allowed(("203.0.113.7", 9))


def test_those_that_came_last_are_remembered_and_no_more() -> None:
    members = TunnelAgents(parse_network(network(0)))
    for number in range(1, MAX_NETWORKS_PER_TUNNEL):
        members.join("a", "127.0.0.1", parse_network(network(number)))
    assert not members.why_not_allowed((network(0), 9))
    members.join("a", "127.0.0.1", parse_network(network(0)))  # it came again
    members.join("a", "127.0.0.1", parse_network(network(MAX_NETWORKS_PER_TUNNEL)))
    assert not members.why_not_allowed((network(0), 9))
    assert members.why_not_allowed((network(1), 9))


def test_the_addresses_of_the_others_are_those_of_agents_that_are_there_and_not_here() -> None:
    members = TunnelAgents(None)
    members.join("a", "192.0.2.1", None)
    members.join("b", "::ffff:192.0.2.2", None)
    members.join("c", "192.0.2.1", None)
    assert members.elsewhere("192.0.2.1") == members.elsewhere("::ffff:192.0.2.1") == {"192.0.2.2"}
    assert members.elsewhere("192.0.2.3") == {"192.0.2.1", "192.0.2.2"}
    members.leave("b")
    assert members.elsewhere("192.0.2.1") == set()
