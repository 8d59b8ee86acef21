"""What shares the HTTPS port with visitors, also behind HAProxy: OpenSSH, plain HTTP, and agents; and first visitors.

ssh -R (127.0.0.9) ──► HAProxy, send-proxy-v2 ──► names.https ──► the ssh port of the relay
visitor (127.0.0.9) ──► HAProxy, send-proxy ──► names.http ──► the ssh client ──► a server that answers with what it got
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.support.authority import running_authority
from tests.support.haproxy import haproxy
from tests.support.named import ResponseReader
from tests.support.peers import PATIENCE
from tests.support.pki import Pki
from tests.support.programs import Daemon, daemon, free_port, program
from tunneld.wire.proxy_protocol import encode_v2

Find = Callable[[str], str]
VISITOR = "127.0.0.9"
CONFIG = """
[ssh]
enabled = true
host = "127.0.0.1"
port = {ssh}
[names]
domain = "t.example"
http = "127.0.0.1:{http}"
https = "127.0.0.1:{https}"
proxy_protocol = {proxies}
"""


ACME = """
[acme]
enabled = true
agree = true
directory = "{directory}"
ca_file = "{ca_file}"
wildcard = false
"""


@asynccontextmanager
async def relay_with_names(
    folder: Path, proxies: str = "[]", pki: Pki | None = None, https: int = 0, words: str = ""
) -> AsyncIterator[tuple[Daemon, int, int]]:
    """A relay with host names and the ssh backend; yields it and its HTTP and HTTPS ports."""
    http, https, port = await free_port(), https or await free_port(), await free_port()
    words = CONFIG.format(http=http, https=https, ssh=port, proxies=proxies) + words
    async with daemon(folder, pki=pki, words=words) as relay:
        yield relay, http, https


async def echo_head(stream: trio.SocketStream) -> None:
    """Answer a request with its head."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += await stream.receive_some()
    await stream.send_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data))


@asynccontextmanager
async def echoing() -> AsyncIterator[int]:
    """Run the local server, and yield its port."""
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, echo_head, [listener])
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


def openssh(find: Find, folder: Path, port: int, *words: str) -> list[str]:
    """The command of an ssh client of 127.0.0.9."""
    options = ["StrictHostKeyChecking=no", f"UserKnownHostsFile={folder}/known", f"BindAddress={VISITOR}"]
    options += ["BatchMode=yes", "IdentityFile=none", "IdentityAgent=none", "GlobalKnownHostsFile=/dev/null"]
    return [find("ssh"), "-F", "none", "-p", str(port), *(f"-o{option}" for option in options), *words, "127.0.0.1"]


async def get(port: int, host: str = "blog.t.example", source: str = VISITOR) -> tuple[int, str, str | None]:
    """The status, the body and the Location of a plain request."""
    with trio.fail_after(PATIENCE):
        async with await trio.open_tcp_stream("127.0.0.1", port, local_address=source) as stream:
            await stream.send_all(f"GET /page HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            response = await ResponseReader(stream).response()
            assert response is not None
            return response.status, response.body.decode(), response["location"]


@pytest.mark.parametrize("send", ["send-proxy", "send-proxy-v2", ""])
async def test_ssh_opens_a_tunnel_through_the_https_port(tmp_path: Path, program_path: Find, send: str) -> None:
    proxies = '["127.0.0.1"]' if send else "[]"
    seen = VISITOR if send else "127.0.0.1"
    async with (
        echoing() as local,
        relay_with_names(tmp_path, proxies) as (relay, http, https),
        haproxy(tmp_path, program_path, "", f"127.0.0.1:{https} {send}") as front,
        haproxy(tmp_path, program_path, "", f"127.0.0.1:{http} {send}") as web,
        program(openssh(program_path, tmp_path, front, "-N", "-R", f"blog:80:localhost:{local}")),
    ):
        opened = await relay.wait_logged("tunnel opened")
        assert (opened["backend"], opened["owner"].partition(":")[0]) == ("ssh", seen)
        status, head, _ = await get(web)
        assert status == 200
        assert f"X-Forwarded-For: {seen}\r\n" in head


async def test_plain_http_on_the_https_port(tmp_path: Path) -> None:
    async with relay_with_names(tmp_path) as (_, _, https):
        status, body, location = await get(https)
        assert (status, location) == (400, None)
        assert "This is the port for HTTPS" in body


async def test_agents_behind_a_proxy_count_as_themselves(tmp_path: Path) -> None:
    """The relay has no credentials: control requests are admitted from its own machine only."""
    pki = Pki.issue(tmp_path / "pki")
    context = ssl.create_default_context(cafile=str(pki.folder / "ca.pem"))
    context.set_alpn_protocols(["tunneld"])
    async with relay_with_names(tmp_path, '["127.0.0.1"]', pki) as (_, _, https):
        for source, is_admitted in ((VISITOR, True), ("198.51.100.9", False)):
            async with await trio.open_tcp_stream("127.0.0.1", https) as stream:
                await stream.send_all(encode_v2((source, 4711), ("203.0.113.1", 443)))
                tls = trio.SSLStream(stream, context, server_hostname="localhost")
                with trio.fail_after(PATIENCE):
                    if is_admitted:
                        assert (await tls.receive_some()).startswith(b"OK tunneld ")
                        continue
                    with pytest.raises(trio.BrokenResourceError) as failed:
                        await tls.do_handshake()
                assert "no application protocol" in str(failed.value.__cause__).lower().replace("_", " ")


async def test_the_first_visitors_wait_for_the_certificate(tmp_path: Path, program_path: Find) -> None:
    with running_authority(tmp_path / "authority") as authority:
        roots = authority.issuing_roots()
        words = ACME.format(directory=authority.directory, ca_file=authority.ca_file)
        async with (
            echoing() as local,
            relay_with_names(tmp_path, https=authority.tls_port, words=words) as (relay, _, https),
            program(openssh(program_path, tmp_path, https, "-N", "-R", f"blog:80:localhost:{local}")),
        ):
            await relay.wait_logged("tunnel opened")
            assert not [line for line in relay.log if line["event"] == "certificate stored"]
            with trio.fail_after(2 * PATIENCE):
                async with await trio.open_tcp_stream("127.0.0.1", https) as stream:
                    tls = trio.SSLStream(stream, roots, server_hostname="blog.t.example", https_compatible=True)
                    await tls.send_all(b"GET /page HTTP/1.1\r\nHost: blog.t.example\r\n\r\n")
                    response = await ResponseReader(tls).response()
            assert response is not None
            assert "X-Forwarded-Proto: https" in response.body.decode()
