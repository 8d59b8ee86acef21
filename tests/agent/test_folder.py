"""`tunnel expose ./folder`: what is served, and what is not."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.agent.support import PATIENCE, relay_here
from tests.support.programs import program, tunnel_command
from tunneld.agent.folder import folder_of, serving_folder
from tunneld.agent.folder_app import MAX_LISTED, list_folder, page_of
from tunneld.errors import UsageError


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with files of all kinds; beside it is one that is not served."""
    (tmp_path / "outside.txt").write_text("outside")
    folder = tmp_path / "site"
    for name in ("sub dir", ".git", "indexed"):
        (folder / name).mkdir(parents=True)
    (folder / "a.txt").write_text("hello")
    (folder / "sub dir" / "<b>&.html").write_text("<b>")
    (folder / ".git" / "config").write_text("secret")
    (folder / "indexed" / "index.html").write_text("an index")
    (folder / "out").symlink_to(tmp_path / "outside.txt")
    (folder / "parent").symlink_to(tmp_path)
    (folder / "hidden").symlink_to(".git/config")
    (folder / "same").symlink_to("a.txt")
    os.mkfifo(folder / "pipe")
    return folder.resolve()


class Server:
    """A running server of a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    async def ask(self, request: str, *fields: str) -> tuple[int, dict[str, str], bytes]:
        """Send a request; returns the status, the fields and the body."""
        head = "\r\n".join([f"{request} HTTP/1.1", "Host: x", "Connection: close", *fields, "", ""])
        with trio.fail_after(PATIENCE):
            async with await trio.open_unix_socket(self.path) as stream:
                await stream.send_all(head.encode())
                answer = b"".join([chunk async for chunk in stream])
        head_bytes, _, body = answer.partition(b"\r\n\r\n")
        line, *rest = head_bytes.decode().split("\r\n")
        return (
            int(line.split()[1]),
            {name.lower(): value for name, _, value in (field.partition(": ") for field in rest)},
            body,
        )


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[Server]:
    async with serving_folder(folder) as target:
        yield Server(target.removeprefix("unix:"))


async def test_files_have_types_and_can_be_asked_for_again(site: Path) -> None:
    async with serving(site) as server:
        status, fields, body = await server.ask("GET /a.txt")
        assert (status, body, fields["content-type"]) == (200, b"hello", "text/plain; charset=utf-8")
        assert (fields["cache-control"], fields["x-content-type-options"]) == ("no-cache", "nosniff")
        assert (await server.ask("GET /a.txt", f"If-None-Match: {fields['etag']}"))[0] == 304
        assert (await server.ask("HEAD /a.txt"))[::2] == (200, b"")
        status, fields, body = await server.ask("GET /a.txt", "Range: bytes=1-2")
        assert (status, fields["content-range"], body) == (206, "bytes 1-2/5", b"el")
        assert (await server.ask("GET /same"))[2] == b"hello"


@pytest.mark.parametrize(
    "path",
    [
        "/.git/config",
        "/.git/",
        "/hidden",
        "/out",
        "/parent/",
        "/parent/outside.txt",
        "/pipe",
        "/nothing",
        "/../outside.txt",
        "/%2e%2e/outside.txt",
        "/sub%20dir/../../outside.txt",
        "/a%00b",
        "/" + "a" * 300,
        "//etc/passwd",
    ],
)
async def test_nothing_hidden_and_nothing_outside_is_served(path: str, site: Path) -> None:
    async with serving(site) as server:
        assert (await server.ask(f"GET {path}"))[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PROPFIND", "OPTIONS"])
async def test_nothing_can_be_changed(method: str, site: Path) -> None:
    async with serving(site) as server:
        status, fields, _ = await server.ask(f"{method} /a.txt", "Content-Length: 0")
        assert (status, fields["allow"]) == (405, "GET, HEAD")
    assert (site / "a.txt").read_text() == "hello"


async def test_folders_are_lists_or_their_index(site: Path) -> None:
    async with serving(site) as server:
        status, _, body = await server.ask("GET /")
        page = body.decode()
        assert status == 200
        assert [name for name in ("indexed/", "sub dir/", "a.txt", "same") if f">{name}</a>" in page] != []
        assert not any(word in page for word in (".git", "hidden", "out", "parent", "pipe"))
        assert (await server.ask("GET /sub%20dir"))[1]["location"] == "./sub%20dir/"
        assert b'<a href="./%3Cb%3E%26.html">&lt;b&gt;&amp;.html</a>' in (await server.ask("GET /sub%20dir/"))[2]
        assert (await server.ask("GET /indexed/"))[2] == b"an index"
        assert (await server.ask("GET /indexed"))[0] == 308
        assert (await server.ask("GET /indexed/index.html"))[2] == b"an index"


async def test_only_this_user_reaches_the_server_beside_the_tunnel(site: Path) -> None:
    async with serving(site) as server:
        assert stat.S_IMODE(Path(server.path).parent.stat().st_mode) == 0o700
    assert not Path(server.path).parent.exists()


def test_a_long_list_is_bounded(tmp_path: Path) -> None:
    rows = [(str(number), 0) for number in range(MAX_LISTED + 5)]
    assert "<p>and 5 more" in page_of("/", list(rows))
    assert page_of("/x/", []).count("<tr>") == 1
    (tmp_path / "b").write_text("")
    (tmp_path / "A").mkdir()
    assert list_folder(tmp_path, tmp_path) == [("A", None), ("b", 0)]


@pytest.mark.parametrize("target", ["8000", "web:80", "unix:/run/x", "[::1]:80", "5000-5010", "http://web/"])
def test_other_targets_are_no_folders(target: str) -> None:
    assert folder_of(target) is None


def test_a_folder_is_written_as_a_path(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site)
    assert (folder_of("."), folder_of("./indexed"), folder_of(str(site))) == (site, site / "indexed", site)
    with pytest.raises(UsageError, match="is not a folder"):
        folder_of("./a.txt")


async def test_without_the_packages_the_agent_says_what_to_install(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tunneld.agent.folder_app", raising=False)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    with pytest.raises(UsageError, match=r"the Python package starlette\.applications is needed"):
        async with serving_folder(site):
            pass


async def test_a_folder_is_reached_through_a_tunnel(site: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay:
            command = tunnel_command("expose", str(site), "--relay", relay.where)
            async with program(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
                assert process.stdout is not None
                address = (await process.stdout.receive_some()).decode().strip()
                assert address == f"http://{relay.tunnel.client_uri.authority}/"
                async with await trio.open_tcp_stream("127.0.0.1", relay.tunnel.client_uri.port) as stream:
                    await stream.send_all(b"GET /a.txt HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                    assert b"".join([chunk async for chunk in stream]).endswith(b"hello")


async def test_a_connection_takes_one_request_after_another_and_ends_when_it_is_idle(
    site: Path, autojump_clock: trio.abc.Clock
) -> None:
    async with serving(site) as server, await trio.open_unix_socket(server.path) as stream:
        for _ in range(3):
            await stream.send_all(b"GET /a.txt HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"hello"):
                answer += await stream.receive_some()
        assert await stream.receive_some() == b""


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET /a.txt HTTP/1.1\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nx: " + b"a" * 20000, b"431"),
        (b"POST /a.txt HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", b"405"),
        (b"POST /a.txt HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"405"),
    ],
)
async def test_other_requests_get_an_answer_and_end_the_connection(
    request_bytes: bytes, status: bytes, site: Path, autojump_clock: trio.abc.Clock
) -> None:
    async with serving(site) as server, await trio.open_unix_socket(server.path) as stream:
        await stream.send_all(request_bytes)
        assert b"".join([chunk async for chunk in stream]).split()[1] == status
