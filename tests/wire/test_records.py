"""Values of items have the types that JSON gives them, for every verb whose items the library returns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio

from tests.control.test_daemon_auth import HEAD, running
from tests.support.peers import read_exactly
from tunneld import connect
from tunneld.net.endpoint import Endpoint
from tunneld.wire.records import typed, typed_record


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("visitors", "12", 12),
        ("expires", "-5", -5),
        ("name", "007", "007"),
        ("age", "soon", "soon"),
        ("up", "1" * 21, "1" * 21),
        ("up", "\u00b2", "\u00b2"),
        ("persist", "yes", True),
        ("persist", "perhaps", "perhaps"),
        ("secure", "yes", "yes"),
    ],
)
def test_numbers_are_numbers_where_the_key_has_them(key: str, text: str, value: object) -> None:
    assert typed(key, text) == value
    assert type(typed(key, text)) is type(value)


async def test_the_types_are_those_of_json(tmp_path: Path) -> None:
    path = tmp_path / "tunnel.toml"
    path.write_text(HEAD)
    async with running(path) as relay, connect(relay.control) as client:
        opened = await client.open_described("tcp", persist=True, share=True, quota=10**6, max_per_source=3, name="007")
        server, public = (Endpoint.parse(opened[key]) for key in ("server", "client"))
        hidden = await trio.open_tcp_stream(server.host, server.port)
        visitor = await trio.open_tcp_stream(public.host, public.port)
        async with hidden, visitor:
            await visitor.send_all(b"x")
            await read_exactly(hidden, 1)
            http = Endpoint.parse(relay.http)
            for verb, text in (("list", ""), ("show", "007"), ("status", ""), ("reservations", "")):
                async with await trio.open_tcp_stream(http.host, http.port) as stream:
                    query = f"{verb}?arg={text}" if text else verb
                    head = f"GET /api/v1/{query} HTTP/1.1\r\nHost: {http.host}:{http.port}\r\nConnection: close\r\n\r\n"
                    await stream.send_all(head.encode())
                    answer = b"".join([part async for part in stream])
                expected = json.loads(answer.partition(b"\r\n\r\n")[2])["items"]
                items = (await client.call(verb, *([text] if text else []))).items
                found = [typed_record(item) for item in items]
                kinds = [{key: type(value) for key, value in item.items()} for item in expected]
                assert [{key: type(value) for key, value in item.items()} for item in found] == kinds, verb
            (tunnel, one), status = await client.show("007"), await client.status()
            assert (tunnel["visitors"], tunnel["persist"], one["up"], status["tunnels"]) == (1, True, 1, 1)
            async with client.watch(since=60) as events:
                while (await anext(events))["event"] != "live":
                    pass
