"""The networks that server connections may come from, as the agents of a tunnel join, move and leave."""

from __future__ import annotations

from tunneld.net.endpoint import parse_network
from tunneld.tunnel.agents import MAX_NETWORKS_PER_TUNNEL, TunnelAgents


def address(number: int) -> str:
    return f"10.0.{number // 256}.{number % 256}"


def test_the_networks_of_all_agents_are_permitted_and_agents_with_a_control_connection_are_counted() -> None:
    agents = TunnelAgents(parse_network("192.0.2.1"))
    agents.join("a", "127.0.0.1", parse_network("192.0.2.2"))
    assert agents.why_not_allowed(("192.0.2.1", 9)) == agents.why_not_allowed(("192.0.2.2", 9)) == ""
    assert (
        agents.why_not_allowed(("192.0.2.3", 9))
        == "only 192.0.2.1/32 and 192.0.2.2/32 may connect as the hidden server"
    )
    agents.leave("a")
    agents.leave("a")
    assert len(agents) == 0
    assert not agents.why_not_allowed(("192.0.2.2", 9))


def test_a_moved_agent_is_permitted_at_its_new_address_alone() -> None:
    agents = TunnelAgents(parse_network("192.0.2.1"))
    agents.move(parse_network("192.0.2.2"))
    assert agents.why_not_allowed(("192.0.2.1", 9))
    assert not agents.why_not_allowed(("192.0.2.2", 9))


def test_a_tunnel_open_to_any_address_stays_so() -> None:
    agents = TunnelAgents(None)
    agents.join("a", "127.0.0.1", parse_network("192.0.2.2"))
    assert not agents.why_not_allowed(("203.0.113.7", 9))


def test_only_the_latest_networks_are_remembered() -> None:
    agents = TunnelAgents(parse_network(address(0)))
    for number in range(1, MAX_NETWORKS_PER_TUNNEL):
        agents.join("a", "127.0.0.1", parse_network(address(number)))
    assert not agents.why_not_allowed((address(0), 9))
    agents.join("a", "127.0.0.1", parse_network(address(0)))  # again
    agents.join("a", "127.0.0.1", parse_network(address(MAX_NETWORKS_PER_TUNNEL)))
    assert not agents.why_not_allowed((address(0), 9))
    assert agents.why_not_allowed((address(1), 9))


def test_the_addresses_of_the_other_agents() -> None:
    agents = TunnelAgents(None)
    agents.join("a", "192.0.2.1", None)
    agents.join("b", "192.0.2.2", None)
    agents.join("c", "192.0.2.1", None)
    assert agents.hosts_except("192.0.2.1") == {"192.0.2.2"}
    assert agents.hosts_except("192.0.2.3") == {"192.0.2.1", "192.0.2.2"}
    agents.leave("b")
    assert agents.hosts_except("192.0.2.1") == set()
