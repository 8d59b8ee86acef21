"""Host names with the real daemon, `tunnel expose` and curl: over every backend, and across restarts of both sides."""

from __future__ import annotations

import http.server
import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from xmlrpc.client import ServerProxy

import pytest
import trio

from tests.backends.ssh.support import client, openssh
from tests.support.credentials import SECRET, credential
from tests.support.name_server import serving_names
from tests.support.peers import PATIENCE
from tests.support.programs import EGTP, Daemon, daemon, lasting_port, program, run, tunnel_command
from tunneld.http.origin import SERVLET

pytestmark = pytest.mark.timeout(120)

DOMAIN = "t.example.org"
BLOG = f"blog.{DOMAIN}"
BACKENDS = pytest.mark.parametrize("backend", ["webmux", "tcp", "egtp"])
Find = Callable[[str], str]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with what it received, as JSON."""

    protocol_version = "HTTP/1.1"
    allowed = ""  # the host, without a port; empty: any

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        seen = {"path": self.path, "size": len(body), "port": self.client_address[1], **dict(self.headers.items())}
        answer = json.dumps(seen).encode()
        self.send_response(200 if str(self.headers["Host"]).startswith(self.allowed) else 403)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_PUT = do_GET  # noqa: N815 - names of http.server

    def log_message(self, *_arguments: object) -> None:
        """Nothing."""


@contextmanager
def local_server() -> Iterator[int]:
    """A web server; its port."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


class Curl:
    """Visits host names of a relay, as if they were in the DNS."""

    def __init__(self, program: str, port: int) -> None:
        self._command = [program, "-sS", "--max-time", str(PATIENCE), "--noproxy", "*"]
        self._port = port

    async def __call__(self, url: str, *options: str) -> str:
        """The output for one URL or several."""
        connect = f"::127.0.0.1:{self._port}"
        return await run([*self._command, "--connect-to", connect, *options, *url.split()])

    async def json(self, url: str, *options: str) -> dict[str, str | int]:
        """What the local server has received, from its answer."""
        answer: dict[str, str | int] = json.loads(await self(url, *options))
        return answer

    async def status(self, url: str) -> int:
        """The status of the answer."""
        return int(await self(url, "-o", "/dev/null", "-w", "%{http_code}"))

    async def until(self, url: str, status: int) -> None:
        """Visit until the answer has this status."""
        with trio.fail_after(PATIENCE):
            while await self.status(url) != status:  # noqa: ASYNC110 - of another process
                await trio.sleep(0.05)


@pytest.fixture
def port() -> int:
    return lasting_port()


@pytest.fixture
def curl(port: int, program_path: Find) -> Curl:
    return Curl(program_path("curl"), port)


def names(port: int, more: str = "") -> str:
    return f'[names]\ndomain = "{DOMAIN}"\nhttp = "127.0.0.1:{port}"\n{more}'


@asynccontextmanager
async def relay(folder: Path, port: int) -> AsyncIterator[Daemon]:
    async with daemon(folder, words=names(port) + EGTP) as running:
        yield running


@asynccontextmanager
async def exposed(
    running: Daemon, target: int, *words: str, how: Sequence[str] = ("--quiet",)
) -> AsyncIterator[tuple[trio.Process, str]]:
    """`tunnel expose`, and the first line that it prints: the address."""
    command = tunnel_command("expose", str(target), "--relay", f"127.0.0.1:{running.control_port}", *how, *words)
    async with program(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        line = b""
        with trio.fail_after(PATIENCE):
            while not line.endswith(b"\n"):
                chunk = await process.stdout.receive_some()
                assert chunk, "the agent ended"
                line += chunk
        yield process, line.decode().strip()


@BACKENDS
async def test_a_local_server_is_reached_by_its_host_name(tmp_path: Path, port: int, curl: Curl, backend: str) -> None:
    with local_server() as target:
        async with (
            relay(tmp_path, port) as running,
            exposed(running, target, "--host", "blog", "--backend", backend) as (_, url),
        ):
            assert url == f"http://{BLOG}:{port}/"
            seen = await curl.json(f"{url}path?query")
            assert (seen["path"], seen["Host"]) == ("/path?query", f"{BLOG}:{port}")
            assert (seen["X-Forwarded-For"], seen["X-Forwarded-Proto"]) == ("127.0.0.1", "http")
            upload = tmp_path / "upload"
            upload.write_bytes(bytes(3_000_000))
            assert (await curl.json(url, "-T", str(upload)))["size"] == 3_000_000
            assert (await curl.json(url, "-T", str(upload), "-H", "Expect: 100-continue"))["size"] == 3_000_000
            assert await curl.status(f"http://other.{DOMAIN}:{port}/") == 404
            assert await curl.status(f"http://127.0.0.1:{port}/") == 404


@BACKENDS
async def test_a_server_that_knows_its_local_name_alone(
    tmp_path: Path, port: int, curl: Curl, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Vite and Django do. The agent says what to do."""
    monkeypatch.setattr(Handler, "allowed", "localhost")
    words = ("--host", "blog", "--name", "web", "--backend", backend)
    with local_server() as target:
        async with relay(tmp_path, port) as running:
            async with exposed(running, target, *words, how=("--json",)) as (process, line):
                url = json.loads(line)["address"]
                assert await curl.status(url) == 403
                assert process.stdout is not None
                said = b""
                with trio.fail_after(PATIENCE):
                    while b"use --host-header local" not in said:
                        said += await process.stdout.receive_some()
            async with exposed(running, target, *words, "--host-header", "local"):
                seen = await curl.json(url, "-H", f"Origin: {url[:-1]}")
                assert (seen["Host"], seen["X-Forwarded-Host"]) == (f"localhost:{target}", f"{BLOG}:{port}")
                assert seen["Origin"] == f"http://localhost:{target}"


@BACKENDS
async def test_requests_of_one_connection_share_one_to_the_local_server(
    tmp_path: Path, port: int, curl: Curl, backend: str
) -> None:
    with local_server() as target:
        async with (
            relay(tmp_path, port) as running,
            exposed(running, target, "--host", "blog,shop", "--backend", backend) as (_, url),
        ):
            answers = (await curl(f"{url}1 {url}2 {url}3", "-w", "\n")).splitlines()
            assert len({json.loads(answer)["port"] for answer in answers}) == 1
            other = json.loads((await curl(f"{url}1 http://shop.{DOMAIN}:{port}/", "-w", "\n")).splitlines()[1])
            assert other["Host"] == f"shop.{DOMAIN}:{port}"


@BACKENDS
async def test_a_name_is_kept_while_the_agent_is_away(tmp_path: Path, port: int, curl: Curl, backend: str) -> None:
    words = ("--host", "blog", "--name", "web", "--backend", backend)
    with local_server() as target:
        async with relay(tmp_path, port) as running:
            async with exposed(running, target, *words) as (process, url):
                process.send_signal(signal.SIGTERM)
                await process.wait()
            assert await curl.status(url) == 503
            assert "Retry-After: 2" in await curl(url, "-i")
            async with exposed(running, target, *words) as (process, again):
                assert again == url
                assert await curl.status(url) == 200
                process.kill()
                await process.wait()
            async with exposed(running, target, *words) as (_, again):
                assert again == url
                assert await curl.status(url) == 200


@BACKENDS
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR2])
async def test_a_name_survives_a_restart_of_the_relay(
    tmp_path: Path, port: int, curl: Curl, backend: str, number: signal.Signals
) -> None:
    control = lasting_port()
    with local_server() as target:
        async with trio.open_nursery() as nursery:
            async with daemon(tmp_path, control=control, words=names(port) + EGTP) as running:
                agent = await nursery.start(_keep_exposed, running, target, backend)
                url = f"http://{BLOG}:{port}/"
                assert await curl.status(url) == 200
                if number is signal.SIGUSR2:
                    running.process.send_signal(number)
                    await running.wait_logged("ready", 2)
                    await curl.until(url, 200)
                    agent.cancel()
                    return
            async with daemon(tmp_path, control=control, words=names(port) + EGTP):
                await curl.until(url, 200)
                agent.cancel()


async def _keep_exposed(
    running: Daemon, target: int, backend: str, *, task_status: trio.TaskStatus[trio.CancelScope]
) -> None:
    with trio.CancelScope() as scope:
        async with exposed(running, target, "--host", "blog", "--name", "web", "--backend", backend):
            task_status.started(scope)
            await trio.sleep_forever()


async def test_a_name_is_given_to_a_client_that_has_only_ssh(tmp_path: Path, port: int, curl: Curl) -> None:
    with local_server() as target:
        words = names(port) + "[ssh]\nenabled = true\nport = 0\n"
        async with daemon(tmp_path, words=words) as running:
            ssh_port = int((await running.wait_logged("ssh listens"))["uri"].rpartition(":")[2])
            forward = f"blog:80:127.0.0.1:{target}"
            async with client(openssh(ssh_port, "-R", forward, "127.0.0.1", "qr")) as ssh:
                url = f"http://{BLOG}:{port}/"
                await ssh.wait_output(rf"public address  {url}\n", "out")
                assert ssh.out.splitlines()[-1] == url  # below the QR code
                seen = await curl.json(f"{url}path")
                assert (seen["path"], seen["X-Forwarded-For"]) == ("/path", "127.0.0.1")
                async with client(openssh(ssh_port, "-R", "blog:8000:127.0.0.1:9", "127.0.0.1", "list")) as other:
                    await other.wait_output(r"come to the HTTP port of the relay: use -R NAME:80:HOST:PORT")
                async with client(openssh(ssh_port, "-R", "www:80:127.0.0.1:9", "127.0.0.1", "list")) as other:
                    await other.wait_output(r"may not use the host name www.t.example.org: it is reserved")
            async with client(openssh(ssh_port, "-N", "-R", "any:443:127.0.0.1:9", "127.0.0.1")):
                opened = await running.wait_logged("tunnel opened", 2)
                assert re.fullmatch(rf"http://[a-z2-9]{{10}}\.t\.example\.org:{port}/", opened["client"])


async def test_every_interface_gives_names_and_tells_their_addresses(
    tmp_path: Path, port: int, program_path: Find
) -> None:
    ask = partial(run_curl, program_path("curl"))
    async with relay(tmp_path, port) as running:
        web = f"http://127.0.0.1:{running.http.rpartition(':')[2]}"
        said = await running.ask("openTunnel webmux host=lines")
        (uri,) = re.findall(r"OK (webmux://\S+)", said)
        assert f"OK http://lines.{DOMAIN}:{port}/" in await running.ask(f"getTunnelAddress {uri}")
        servlet = f"{web}{SERVLET}?method="
        uri = (await ask(f"{servlet}openTunnel&host=servlet&backend=webmux")).strip()
        assert await ask(f"{servlet}getTunnelAddress&uri={uri}") == f"http://servlet.{DOMAIN}:{port}/\n"
        body = json.dumps({"args": ["webmux"], "options": {"host": "json,two"}})
        opened = await ask(f"{web}/api/v1/openTunnel", "-H", "Content-Type: application/json", "-d", body)
        address = await ask(f"{web}/api/v1/getTunnelAddress?uri={json.loads(opened)['text']}")
        assert json.loads(address)["text"] == f"http://json.{DOMAIN}:{port}/"
        (shown,) = json.loads(await ask(f"{web}/api/v1/show?ref=two.{DOMAIN}"))["items"]
        assert shown["host"] == f"json.{DOMAIN},two.{DOMAIN}"

        def talk() -> str:
            with ServerProxy(web) as proxy:
                return str(proxy.tunnel.getTunnelAddress(proxy.tunnel.openTunnel("webmux", {"host": "xml"})))

        assert await trio.to_thread.run_sync(talk) == f"http://xml.{DOMAIN}:{port}/"


async def run_curl(curl: str, url: str, *options: str) -> str:
    return await run([curl, "-sS", "--max-time", str(PATIENCE), "--noproxy", "*", *options, url])


async def test_a_reload_moves_the_port_and_applies_the_domain_to_new_tunnels(
    tmp_path: Path, port: int, curl: Curl, program_path: Find
) -> None:
    with local_server() as target:
        async with relay(tmp_path, port) as running, exposed(running, target, "--host", "blog") as (_, url):
            config, moved = tmp_path / "tunnel.toml", lasting_port()
            text = config.read_text().replace(f":{port}", f":{moved}").replace(DOMAIN, "u.example.org")
            config.write_text(text)
            running.process.send_signal(signal.SIGHUP)
            await running.wait_logged("names-http listens", 2)
            visit = Curl(program_path("curl"), moved)
            assert await visit.status(f"http://{BLOG}/") == 200
            async with exposed(running, target, "--host", "shop") as (_, other):
                assert other == f"http://shop.u.example.org:{moved}/"
                assert await visit.status(other) == 200
            config.write_text(text.replace("u.example.org", "not a domain"))
            running.process.send_signal(signal.SIGHUP)
            await running.wait_logged("reload failed, nothing changed")
            assert await visit.status(f"http://{BLOG}/") == 200
            config.write_text(text.replace(f"127.0.0.1:{moved}", ""))
            running.process.send_signal(signal.SIGHUP)
            await running.wait_logged("names-http does not listen")
            with pytest.raises(AssertionError):
                await visit.status(f"http://{BLOG}/")
            assert url.startswith(f"http://{BLOG}:{port}/")


async def test_a_tunnel_is_managed_by_its_host_name(tmp_path: Path, port: int, curl: Curl) -> None:
    with local_server() as target:
        async with (
            relay(tmp_path, port) as running,
            exposed(running, target, "--host", "blog", "--name", "web") as (
                _,
                url,
            ),
        ):
            tunnel = ["--relay", f"127.0.0.1:{running.control_port}"]
            assert f"client\t{url}\n" in await run(tunnel_command("show", BLOG, *tunnel))
            assert BLOG in await run(tunnel_command("reservations", BLOG, *tunnel))
            await run(tunnel_command("close", "--keep", BLOG, *tunnel))
            await curl.until(url, 200)
            await run(tunnel_command("close", BLOG, *tunnel))
            assert await curl.status(url) == 404


async def test_the_first_attempt_tells_which_record_proves_a_domain(tmp_path: Path, port: int, curl: Curl) -> None:
    verifier, secret = credential("alice").verifier, tmp_path / "secret"
    assert verifier is not None
    secret.write_text(SECRET)
    secret.chmod(0o600)
    login = ["--host", "shop.example.com", "--credential", "alice", "--secret-file", str(secret)]
    with serving_names() as dns, local_server() as target:
        proofs = f'custom_domains = true\ncustom_domains_cache = 0.01\nresolver = "127.0.0.1:{dns.port}"\n'
        words = names(port, proofs) + f'[[credential]]\nname = "alice"\nverifier = "{verifier.reveal()}"\n'
        async with daemon(tmp_path, words=words) as running:
            relay_words = ["--relay", f"127.0.0.1:{running.control_port}"]
            refused = await trio.run_process(
                tunnel_command("expose", str(target), *relay_words, *login), capture_stderr=True, check=False
            )
            assert refused.returncode == os.EX_NOPERM
            record = re.search(r'set the DNS record (\S+) TXT "(\S+)"', refused.stderr.decode())
            assert record is not None, refused.stderr
            dns.records.add((record[1], record[2]))
            async with exposed(running, target, *login) as (_, url):
                assert url == f"http://shop.example.com:{port}/"
                assert (await curl.json(url))["Host"] == f"shop.example.com:{port}"
