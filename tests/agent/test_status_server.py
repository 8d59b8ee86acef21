"""The status of an agent over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from tests.agent.support import PATIENCE, RecordingReporter
from tunneld.agent import status_server
from tunneld.agent.events import Activity, Stats
from tunneld.agent.status import AgentStatus
from tunneld.agent.status_server import MAX_HEAD, answer, metrics, open_listener, serve
from tunneld.errors import ListenError

OPENED = {"address": "tcp://192.0.2.1:20000", "uri": "tcp://192.0.2.1:20001", "id": "t1"}
EVIL = 'bl"og\\\n'


def one_exposure(name: str = "blog") -> AgentStatus:
    status = AgentStatus()
    status.observe(name, RecordingReporter(), lambda: Activity(Stats(1, 2, 3, 4, 5, 6), latency=0.25))
    return status


@asynccontextmanager
async def serving(status: AgentStatus) -> AsyncIterator[int]:
    """Serve the status; yields the port."""
    async with trio.open_nursery() as nursery:
        listener = await open_listener("127.0.0.1", 0)
        nursery.start_soon(serve, status, listener)
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def get(port: int, request: bytes) -> bytes:
    with trio.fail_after(PATIENCE):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(request)
            return b"".join([chunk async for chunk in stream])


async def test_probes_get_the_state_over_http() -> None:
    status = one_exposure()
    async with serving(status) as port:
        assert b" 200 OK\r\n" in await get(port, b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b" 503 Service Unavailable\r\n" in await get(port, b"GET /readyz HTTP/1.1\r\nHost: a\r\n\r\n")
        next(status.exposures).report("opened", **OPENED)
        ready = await get(port, b"GET /readyz?verbose HTTP/1.0\n\n")
        assert ready.startswith(b"HTTP/1.1 200 OK\r\n")
        assert ready.endswith(b"\r\n\r\n1 of 1 exposure reachable, 1 visitor\n")


@pytest.mark.parametrize(
    ("line", "status"),
    [(b"POST /healthz HTTP/1.1", b" 405 "), (b"GET / HTTP/1.1", b" 404 "), (b"", b" 405 "), (b"GET", b" 404 ")],
)
def test_other_requests_are_refused(line: bytes, status: bytes) -> None:
    assert status in answer(AgentStatus(), line)


def test_head_has_no_body() -> None:
    response = answer(AgentStatus(), b"HEAD /healthz HTTP/1.1")
    assert b"\r\nContent-Length: 3\r\n" in response
    assert response.endswith(b"\r\nConnection: close\r\n\r\n")


async def test_a_head_that_is_too_long_gets_no_answer() -> None:
    async with serving(one_exposure()) as port:
        assert b" 200 " in await get(port, b"GET /healthz HTTP/1.1\r\nx: " + b"a" * (MAX_HEAD - 33) + b"\r\n\r\n")
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(b"GET /healthz HTTP/1.1\r\nx: " + b"a" * MAX_HEAD)
            with trio.fail_after(PATIENCE):
                try:
                    assert await stream.receive_some() == b""
                except trio.BrokenResourceError:
                    return


async def test_silent_connections_end_and_others_are_served_meanwhile(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.abc.Clock
) -> None:
    monkeypatch.setattr(status_server, "MAX_CONNECTIONS", 2)
    async with serving(one_exposure()) as port:
        silent = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(2)]
        assert b" 200 " in await get(port, b"GET /healthz HTTP/1.1\r\n\r\n")
        for stream in silent:
            await stream.aclose()


def test_prometheus_reads_the_metrics_and_names_cannot_forge_any() -> None:
    families = {family.name: family for family in text_string_to_metric_families(metrics(one_exposure(EVIL)))}
    moved = {sample.labels["direction"]: sample.value for sample in families["tunneld_agent_relayed_bytes"].samples}
    assert moved == {"up": 5, "down": 6}
    values = {name: family.samples[0].value for name, family in families.items()}
    assert values["tunneld_agent_exposure_ready"] == 0
    assert values["tunneld_agent_visitors"] == 1
    assert values["tunneld_agent_relay_latency_seconds"] == 0.25
    assert families["tunneld_agent_visitors"].samples[0].labels == {"exposure": EVIL}
    documented = {line.split("{")[0].strip() for line in (status_server.__doc__ or "").splitlines() if "{" in line}
    assert documented == {sample.name for family in families.values() for sample in family.samples}


async def test_a_port_in_use_is_an_error() -> None:
    async with serving(AgentStatus()) as port:
        with pytest.raises(ListenError, match=f"could not listen on 127.0.0.1:{port}: address already in use"):
            await open_listener("127.0.0.1", port)
