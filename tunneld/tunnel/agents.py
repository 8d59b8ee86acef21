"""The agents that serve one tunnel, and from where their hidden servers may connect."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any

from tunneld.net.endpoint import Network, contains, unmap

MAX_NETWORKS_PER_TUNNEL = 64
"""Of agents that share a tunnel: those that came last. Some of them moved, and are not where they were."""


class TunnelAgents:
    """Agents by their control connections, while those stand: an agent that lost its own may be back, and what it has
    with the server side stands meanwhile. `len` counts those of a shared tunnel.
    """

    def __init__(self, network: Network | None) -> None:
        """`network` is that of whoever opened the tunnel; None: anywhere."""
        self.networks: dict[Network, None] | None = {}  # from where hidden servers may connect; None: anywhere
        self._agents: dict[str, str] = {}  # by their control connections, the addresses that they ask from
        self._admit(network)

    def __len__(self) -> int:
        return len(self._agents)

    def join(self, agent: str, host: str, network: Network | None) -> None:
        """One more agent serves it, over the control connection `agent` from the address `host`; its hidden servers are
        in that network.
        """
        self._agents[agent] = unmap(host)
        self._admit(network)

    def leave(self, agent: str) -> None:
        """It left, or its control connection ended. Harmless when repeated."""
        self._agents.pop(agent, None)

    def elsewhere(self, host: str) -> AbstractSet[str]:
        """The addresses of the agents that are not at this one."""
        return set(self._agents.values()) - {unmap(host)}

    def move(self, network: Network | None) -> None:
        """The only agent is at this network now."""
        self.networks = {}
        self._admit(network)

    def why_not_allowed(self, peer: Any) -> str:
        """Why this peer's address may not pose as the hidden server; empty: it may."""
        if self.networks is None:
            return ""
        for network in self.networks:  # every server connection is asked for, and there is mostly one network
            if contains(network, peer):
                return ""
        return f"only {' and '.join(map(str, self.networks))} may connect as the hidden server"

    def _admit(self, network: Network | None) -> None:
        if network is None:
            self.networks = None
        elif self.networks is not None:
            self.networks.pop(network, None)
            self.networks[network] = None
            if len(self.networks) > MAX_NETWORKS_PER_TUNNEL:
                del self.networks[next(iter(self.networks))]
