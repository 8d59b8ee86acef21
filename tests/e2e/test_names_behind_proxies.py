"""HAProxy and nginx in front of the relay, with connections that they keep and share: no visitor gets another's answer.

clients of two names ──► HAProxy or nginx ──► names.http ──► two agents, which come and go ──► two servers

A proxy sends requests of many clients, and for both names, through the same connections. Every request has a token;
every answer must have it, and the name that was asked for. While an agent is away, 502, 503 and 504 are right, too.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.support.named import DOMAIN, Named, ResponseReader, TruncatedError, named
from tests.support.programs import free_port, listening

Find = Callable[[str], str]
LABELS = ("one", "two")
CLIENTS = 40
AWAY = {502, 503, 504}

HAPROXY = """
global
    maxconn 2000
defaults
    mode http
    option forwardfor
    http-reuse always
    timeout connect 10s
    timeout client 60s
    timeout server 60s
frontend front
    bind 127.0.0.1:{port}
    default_backend relay
backend relay
    server relay 127.0.0.1:{relay} pool-max-conn 20
"""

NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder}; uwsgi_temp_path {folder};
    scgi_temp_path {folder};
    upstream relay {{ server 127.0.0.1:{relay}; keepalive 8; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://relay;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_next_upstream off;
        }}
    }}
}}
"""


class LabelServer:
    """Answers `LABEL TOKEN`, in various forms."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.connections = 0

    async def serve(self, stream: trio.SocketStream) -> None:
        """Answer the requests of a connection."""
        self.connections += 1
        data = bytearray()
        choice = random.Random(self.connections)
        try:
            while True:
                while (end := data.find(b"\r\n\r\n")) < 0:
                    chunk = await stream.receive_some()
                    if not chunk:
                        return
                    data += chunk
                head = bytes(data[: end + 4])
                del data[: end + 4]
                token = head.split(b" ")[1][1:]
                assert f"Host: {self.label}.{DOMAIN}".encode() in head
                body = f"{self.label} ".encode() + token + b" " * choice.choice([0, 10, 5000])
                form = choice.randrange(4)
                if form == 0:
                    answer = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
                elif form == 1:
                    answer = b"Content-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(body), body)
                else:
                    answer = b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
                answer = b"HTTP/1.1 200 OK\r\n" + answer
                at = choice.randrange(len(answer))
                await stream.send_all(answer[:at])
                await trio.lowlevel.checkpoint()
                await stream.send_all(answer[at:])
                if form == 1:
                    await stream.send_eof()
                    return
        except trio.BrokenResourceError:
            return


@asynccontextmanager
async def label_servers() -> AsyncIterator[dict[str, str]]:
    """Run both servers, and yield their ports."""
    async with trio.open_nursery() as nursery:
        ports = {}
        for label in LABELS:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, LabelServer(label).serve, [listener])
            ports[label] = str(listener.socket.getsockname()[1])
        yield ports
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def front(kind: str, folder: Path, find: Find, relay: int) -> AsyncIterator[int]:
    """Run the proxy, and yield its port."""
    port, configuration = await free_port(), folder / f"{kind}.cfg"
    text = HAPROXY if kind == "haproxy" else NGINX
    configuration.write_text(text.format(folder=folder, port=port, relay=relay))
    words = {"haproxy": ["-db", "-q", "-f"], "nginx": ["-c"]}[kind]
    async with listening([find(kind), *words, str(configuration)], port):
        yield port


class Clients:
    """Clients with connections of their own, each asking for both names in turn."""

    def __init__(self, port: int, requests: int) -> None:
        self.statuses: Counter[int] = Counter()
        self.wrong: list[object] = []
        self.broken = 0
        self._port = port
        self._left = requests
        self._made = 0

    async def run(self) -> None:
        """Make all requests."""
        async with trio.open_nursery() as nursery:
            for number in range(CLIENTS):
                nursery.start_soon(self._browse, number)

    async def _browse(self, number: int) -> None:
        choice = random.Random(number)
        source = f"127.0.1.{number + 1}"
        while self._left > 0:
            async with await trio.open_tcp_stream("127.0.0.1", self._port, local_address=source) as stream:
                reader = ResponseReader(stream)
                for _ in range(choice.randrange(1, 200)):
                    if self._left <= 0 or not await self._ask(stream, reader, choice.choice(LABELS)):
                        break

    async def _ask(self, stream: trio.SocketStream, reader: ResponseReader, label: str) -> bool:
        """Return whether the connection can be used again."""
        self._left -= 1
        self._made += 1
        token = f"{self._made}"
        try:
            await stream.send_all(f"GET /{token} HTTP/1.1\r\nHost: {label}.{DOMAIN}\r\n\r\n".encode())
            response = await reader.response()
        except (trio.BrokenResourceError, TruncatedError):
            response = None
        if response is None:
            self.broken += 1
            return False
        self.statuses[response.status] += 1
        if response.status == 200:
            if response.body.split() != [label.encode(), token.encode()]:
                self.wrong.append((label, token, response))
        elif response.status not in AWAY:
            self.wrong.append((label, token, response))
        return response["connection"] != "close"


async def come_and_go(
    site: Named, port: str, stop: trio.Event, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Run agents of `two`, one behind the other; each replaces the tunnel of the one that was killed."""
    options = ["--name", "two", "--pairing-timeout", "0.2"]
    while not stop.is_set():
        async with site.expose("two", port, *options) as agent:
            task_status.started()
            task_status = trio.TASK_STATUS_IGNORED
            with trio.move_on_after(0.3):
                await stop.wait()
            agent.kill()


@pytest.mark.parametrize("kind", ["haproxy", "nginx"])
@pytest.mark.parametrize("requests", [10_000, pytest.param(100_000, marks=pytest.mark.big)])
async def test_every_answer_belongs_to_its_request(
    tmp_path: Path, program_path: Find, kind: str, requests: int
) -> None:
    async with (
        label_servers() as ports,
        named(tmp_path, ports, words='trusted_proxies = ["127.0.0.1"]\n') as site,
        front(kind, tmp_path, program_path, site.port) as port,
    ):
        clients = Clients(port, requests)
        await clients.run()
        assert clients.wrong == []
        assert clients.broken == 0
        assert clients.statuses == {200: requests}


@pytest.mark.parametrize("kind", ["haproxy", "nginx"])
@pytest.mark.parametrize("requests", [5_000, pytest.param(100_000, marks=pytest.mark.big)])
async def test_none_goes_astray_while_agents_come_and_go(
    tmp_path: Path, program_path: Find, kind: str, requests: int
) -> None:
    async with (
        label_servers() as ports,
        named(tmp_path, {}, words='trusted_proxies = ["127.0.0.1"]\n') as site,
        front(kind, tmp_path, program_path, site.port) as port,
        trio.open_nursery() as nursery,
    ):
        async with site.expose("one", ports["one"]):
            stop = trio.Event()
            await nursery.start(come_and_go, site, ports["two"], stop)
            clients = Clients(port, requests)
            await clients.run()
            stop.set()
        assert clients.wrong == []
        assert clients.statuses[200] > requests / 4
        assert clients.statuses.keys() & AWAY
