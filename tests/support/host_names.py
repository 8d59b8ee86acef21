"""A relay's service with host names. Its visitors are passed to the HTTP port by the test, which listens nowhere."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import trio

from tests.engine.bench import stream, tcp_pair
from tests.support.peers import PATIENCE, connect, keep
from tunneld.backends import BACKENDS
from tunneld.config.names import NamesSettings
from tunneld.config.schema import ControlSettings, Settings, TunnelSettings
from tunneld.directory.requester import Requester
from tunneld.directory.service import TunnelService
from tunneld.engine.engine import Engine
from tunneld.engine.pump import Pump
from tunneld.policy.access import EVERYBODY, Grant
from tunneld.policy.options import TunnelOptions
from tunneld.sites.names import SharedNames
from tunneld.sites.ports import SitePorts
from tunneld.tunnel.tunnel import Phase, Tunnel

DOMAIN = "t.example.org"
PEER = ("192.0.2.7", 50000)
REQUEST = b"GET %b HTTP/1.1\r\nHost: %b\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b"


@dataclass
class NamedRelay:
    """A running service, its host names, and the HTTP port that they share."""

    settings: Settings
    names: SharedNames
    service: TunnelService
    ports: SitePorts
    certified: set[str]  # the names that are said to have a certificate

    async def open(self, grant: Grant = EVERYBODY, address: str = "127.0.0.1", **words: str) -> Tunnel:
        """Open a tunnel as this credential, from this address."""
        requester = Requester(host=address, owner=f"{address}:9", local_host="127.0.0.1", grant=grant)
        return await self.service.open_tunnel("tcp", TunnelOptions.parse({"persist": "yes", **words}), requester)

    def connect(self) -> trio.SocketStream:
        """A connection of a visitor to the HTTP port."""
        far, near = tcp_pair()
        self.ports.on_http(near, PEER)
        return keep(stream(far))

    def connect_tls(self) -> trio.SocketStream:
        """A connection of a visitor to the HTTPS port."""
        far, near = tcp_pair()
        self.ports.on_https(near, PEER)
        return keep(stream(far))

    async def get(self, name: str, path: str = "/", visitor: trio.SocketStream | None = None) -> tuple[int, bytes]:
        """The status and the body of the response to a request for `name`, on a connection of its own by default."""
        visitor = visitor or self.connect()
        await visitor.send_all(REQUEST % (path.encode(), name.encode()))
        return await response(visitor)


async def response(visitor: trio.SocketStream) -> tuple[int, bytes]:
    """The status and the body of a response with a Content-Length."""
    data = b""
    with trio.fail_after(PATIENCE):
        while b"\r\n\r\n" not in data:
            chunk = await visitor.receive_some()
            assert chunk, f"the connection ended after {data!r}"
            data += chunk
        head, _, body = data.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        while len(body) < int(fields[b"content-length"]):
            body += await visitor.receive_some()
    return int(head.split()[1]), body


async def serve(tunnel: Tunnel, text: bytes) -> None:
    """A hidden server of a tcp tunnel, which answers every request with `text`. Runs until the tunnel closes."""
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(_serve_one, tunnel, text)


async def _serve_one(tunnel: Tunnel, text: bytes) -> None:
    while tunnel.phase is not Phase.CLOSED:  # its successor has the same server URI
        try:
            server, data = await connect(tunnel.server_uri), b""
            while chunk := await server.receive_some():
                data += chunk
                while b"\r\n\r\n" in data:
                    _, _, data = data.partition(b"\r\n\r\n")
                    await server.send_all(OK % (len(text), text))
            await server.aclose()
        except ConnectionRefusedError:
            return
        except (OSError, trio.BrokenResourceError):
            continue


class NothingCertified:
    """Implements `Certificates` and `PortOrders`."""

    def is_ordered(self, _name: str) -> bool:
        return False

    async def order_over(self) -> None:
        await trio.sleep_forever()

    def context_for(self, _server_name: str) -> ssl.SSLContext | None:
        return None

    def http_answer(self, _token: str) -> bytes | None:
        return None

    def tls_context(self, _name: str) -> ssl.SSLContext | None:
        return None


async def start_named_relay(
    nursery: trio.Nursery,
    engine: Engine,
    state: Path | None = None,
    tunnels: TunnelSettings | None = None,
    **names: object,
) -> NamedRelay:
    """Start one that listens nowhere: its visitors are passed in by the test. Its ports are said to be 80 and 443.
    `state` is the folder for reservations, `names` are keys of [names].
    """
    assert isinstance(engine, Pump)
    configured = Settings(
        tunnels=tunnels or TunnelSettings(ports="0"),
        control=ControlSettings(credential_share=1.0),
        names=NamesSettings.model_validate({"domain": DOMAIN, **names}),
    )
    certified: set[str] = set()
    shared = SharedNames(lambda: relay.settings.names, certified.__contains__)
    shared.set_port("http", 80)
    shared.set_port("https", 443)
    service = TunnelService(lambda: relay.settings, engine, BACKENDS, state=state, names=shared)
    ports = SitePorts(engine, shared, lambda: relay.settings.names, NothingCertified(), NothingCertified())
    relay = NamedRelay(configured, shared, service, ports, certified)
    await nursery.start(service.run)
    await nursery.start(ports.run)
    return relay
