"""The agents that serve one tunnel, and the networks that its server connections may come from."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from tunneld.net.endpoint import Network, Peer, contains

MAX_NETWORKS_PER_TUNNEL = 64
"""Networks remembered for agents that share a tunnel: the latest. Agents move, so some of the older are out of use."""


class TunnelAgents:
    """The agents of a tunnel, by their control connections. `len` is the number of agents of a shared tunnel.

    A network stays permitted after its agent's control connection has ended: the agent may reconnect, and its server
    connections stand meanwhile.
    """

    def __init__(self, network: Network | None) -> None:
        """`network` is the one that server connections may come from; None: any address."""
        self.networks: dict[Network, None] | None = {}  # in the order of their permission; None: any address
        self._agents: dict[str, str] = {}  # by control connection: the agent's address
        self._permit(network)

    def __len__(self) -> int:
        return len(self._agents)

    def join(self, agent: str, host: str, network: Network | None) -> None:
        """Add the agent with the control connection `agent` from the address `host`, and permit its network."""
        self._agents[agent] = host
        self._permit(network)

    def leave(self, agent: str) -> None:
        """Remove an agent that stopped serving, or lost its control connection. Idempotent."""
        self._agents.pop(agent, None)

    def hosts_except(self, host: str) -> AbstractSet[str]:
        """The addresses of all agents, without this address."""
        return set(self._agents.values()) - {host}

    def move(self, network: Network | None) -> None:
        """Permit this network alone: the only agent of the tunnel has moved there."""
        self.networks = {}
        self._permit(network)

    def why_not_allowed(self, peer: Peer) -> str:
        """Why this peer may not connect as the hidden server; empty: it may."""
        if self.networks is None:
            return ""
        for network in self.networks:  # asked for each server connection, and mostly there is one network
            if contains(network, peer):
                return ""
        return f"only {' and '.join(map(str, self.networks))} may connect as the hidden server"

    def _permit(self, network: Network | None) -> None:
        if network is None:
            self.networks = None
        elif self.networks is not None:
            self.networks.pop(network, None)
            self.networks[network] = None
            if len(self.networks) > MAX_NETWORKS_PER_TUNNEL:
                del self.networks[next(iter(self.networks))]
