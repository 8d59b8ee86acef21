"""The status of an agent over HTTP, for probes and Prometheus: `/healthz`, `/readyz` and `/metrics`.

It is a server of its own, because the agent as a single file has no HTTP library: one request a connection, of which
only the first line matters, and a short answer.

    tunneld_agent_info{version}                         1
    tunneld_agent_exposure_ready{exposure}              1 while visitors can reach it, else 0
    tunneld_agent_exposure_healthy{exposure}            1 unless the health checks of the local server fail
    tunneld_agent_visitors{exposure}                    connected now
    tunneld_agent_visitors_served_total{exposure}       since the exposure started
    tunneld_agent_visitors_failed_total{exposure}       that could not be connected to the local server
    tunneld_agent_relayed_bytes_total{exposure,direction}  up (to the local server), down (to visitors)
    tunneld_agent_relay_latency_seconds{exposure}       that the relay took for its last answer
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import trio

from tunneld import __version__
from tunneld.agent.status import AgentStatus, ObservedExposure
from tunneld.errors import ListenError, reason_of
from tunneld.net.endpoint import join_host_port

MAX_HEAD = 8192
"""Bytes of a request; probes send some hundred."""
REQUEST_TIMEOUT = 5.0
"""Seconds for a request and for its answer: probes give up after one or ten."""
MAX_CONNECTIONS = 32
"""Connections at once; a further one waits in the backlog. There are a few probes and one Prometheus."""
BACKLOG = 32
"""Connections that wait to be accepted."""
PLAIN, PROMETHEUS = "text/plain; charset=utf-8", "text/plain; version=0.0.4; charset=utf-8"
"""Content types; the latter is Prometheus' text format."""

Value = Callable[[ObservedExposure], float | None]
METRICS: tuple[tuple[str, str, str, Value], ...] = (
    ("exposure_ready", "gauge", "whether visitors can reach the exposure", lambda one: int(one.ready)),
    ("exposure_healthy", "gauge", "whether the local server passes its health checks", lambda one: int(one.healthy)),
    ("visitors", "gauge", "visitors connected now", lambda one: one.activity().stats.now),
    ("visitors_served_total", "counter", "visitors served", lambda one: one.activity().stats.served),
    ("visitors_failed_total", "counter", "visitors that could not be served", lambda one: one.activity().stats.failed),
    ("relay_latency_seconds", "gauge", "time of the relay's last answer", lambda one: one.activity().latency),
)
"""The metrics of an exposure, except its bytes: name, kind, help and value; None for no value."""


async def open_listener(host: str, port: int) -> trio.SocketListener:
    """Listen at an address. Raises `ListenError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = trio.socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ListenError(f"could not listen on {join_host_port(host, port)}: {reason_of(error)}") from None
    return trio.SocketListener(listener)


async def serve(status: AgentStatus, listener: trio.SocketListener) -> None:
    """Answer requests until cancelled, and close the listener."""
    limiter = trio.CapacityLimiter(MAX_CONNECTIONS)
    async with listener, trio.open_nursery() as nursery:
        while True:
            await limiter.acquire_on_behalf_of(token := object())
            try:
                stream = await listener.accept()
            except OSError:  # no descriptor left, or the peer has gone
                limiter.release_on_behalf_of(token)
                await trio.sleep(1.0)
                continue
            nursery.start_soon(_serve_one, status, stream, partial(limiter.release_on_behalf_of, token))


async def _serve_one(status: AgentStatus, stream: trio.SocketStream, release: Callable[[], None]) -> None:
    try:
        with trio.move_on_after(REQUEST_TIMEOUT), suppress(trio.BrokenResourceError):
            async with stream:
                if (line := await _request_line(stream)) is not None:
                    await stream.send_all(answer(status, line))
                    await stream.send_eof()
                    while await stream.receive_some(MAX_HEAD):  # a close with unread bytes would reset the answer
                        pass
    finally:
        release()


async def _request_line(stream: trio.SocketStream) -> bytes | None:
    """The first line of a request, once its head is complete; None if that is too long or ends early."""
    head = b""
    while b"\r\n\r\n" not in head and b"\n\n" not in head:
        data = await stream.receive_some(MAX_HEAD)
        head += data
        if not data or len(head) > MAX_HEAD:
            return None
    return head.partition(b"\n")[0].rstrip(b"\r")


def answer(status: AgentStatus, request_line: bytes) -> bytes:
    """The response to a request."""
    method, _, rest = request_line.partition(b" ")
    path = rest.partition(b" ")[0].partition(b"?")[0]
    if method not in {b"GET", b"HEAD"}:
        return _response(405, "Method Not Allowed", "use GET\n", extra="Allow: GET, HEAD\r\n")
    head_only = method == b"HEAD"
    match path:
        case b"/healthz":
            return _response(200, "OK", "ok\n", head_only=head_only)
        case b"/readyz" if status.ready:
            return _response(200, "OK", f"{status}\n", head_only=head_only)
        case b"/readyz":
            return _response(503, "Service Unavailable", f"{status}\n", head_only=head_only)
        case b"/metrics":
            return _response(200, "OK", metrics(status), PROMETHEUS, head_only=head_only)
    return _response(404, "Not Found", "there are /healthz, /readyz and /metrics\n", head_only=head_only)


def _response(
    code: int, reason: str, body: str, kind: str = PLAIN, *, extra: str = "", head_only: bool = False
) -> bytes:
    content = body.encode(errors="replace")
    head = (
        f"HTTP/1.1 {code} {reason}\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\n"
        f"X-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\n{extra}Connection: close\r\n\r\n"
    )
    return head.encode() + (b"" if head_only else content)


def metrics(status: AgentStatus) -> str:
    """The metrics in Prometheus' text format."""
    exposures = list(status.exposures)
    lines = [*_family("info", "gauge", "the version of the agent"), _sample("info", {"version": __version__}, 1)]
    for name, kind, what, value_of in METRICS:
        lines += _family(name, kind, what)
        for one in exposures:
            if (value := value_of(one)) is not None:
                lines.append(_sample(name, {"exposure": one.name}, value))
    lines += _family("relayed_bytes_total", "counter", "bytes relayed to the local server (up) and to visitors (down)")
    for one in exposures:
        stats = one.activity().stats
        for direction, moved in (("up", stats.up), ("down", stats.down)):
            lines.append(_sample("relayed_bytes_total", {"exposure": one.name, "direction": direction}, moved))
    return "\n".join(lines) + "\n"


def _family(name: str, kind: str, what: str) -> Iterator[str]:
    yield f"# HELP tunneld_agent_{name} {what}"
    yield f"# TYPE tunneld_agent_{name} {kind}"


def _sample(name: str, labels: dict[str, str], value: float) -> str:
    pairs = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return f"tunneld_agent_{name}{{{pairs}}} {value!r}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
