"""The servlet interface, over real sockets."""

from __future__ import annotations

import pytest

from tests.http.support import running_http
from tunneld.http.origin import SERVLET


class TestServlet:
    @pytest.mark.parametrize("method", ["GET", "POST"])
    async def test_the_two_calls_answer_with_a_uri_and_a_line_end(self, method: str) -> None:
        async with running_http() as relay:
            opened = await relay.request(method, f"{SERVLET}?method=openTunnel")
            (tunnel,) = relay.daemon.service.tunnels()
            assert (opened.status, opened.text) == (200, f"{tunnel.server_uri}\n")
            assert opened.headers["content-type"] == "text/plain; charset=utf-8"
            uri = opened.text.strip()
            address = await relay.request(method, f"{SERVLET}?method=getTunnelAddress&uri={uri}")
            assert (address.status, address.text) == (200, f"{tunnel.client_uri}\n")
            with_line_end = await relay.request("GET", f"{SERVLET}?method=getTunnelAddress&uri={uri}%0D%0A")
            assert with_line_end.text == address.text

    async def test_a_form_is_equivalent_to_a_query(self) -> None:
        form = b"method=openTunnel&persist=yes&backend=tcp&name=one"
        async with running_http() as relay:
            answer = await relay.request("POST", SERVLET, form, content_type="application/x-www-form-urlencoded")
            assert answer.status == 200
            (tunnel,) = relay.daemon.service.tunnels()
            assert (tunnel.spec.options.persist, tunnel.spec.options.name) == (True, "one")

    @pytest.mark.parametrize(
        ("query", "status", "sentence"),
        [
            ("", "400 Bad Request", "parameter 'method' is missing; add ?method=openTunnel"),
            ("?method=sing", "404 Not Found", "unrecognized method 'sing'; use openTunnel or getTunnelAddress"),
            ("?method=shutdown", "404 Not Found", "unrecognized method 'shutdown'"),
            ("?method=getTunnelAddress", "400 Bad Request", "usage: getTunnelAddress URI"),
            ("?method=getTunnelAddress&uri=x", "400 Bad Request", "invalid URI"),
            ("?method=getTunnelAddress&uri=tcp://127.0.0.1:1", "404 Not Found", "no open tunnel has the server URI"),
            ("?method=openTunnel&method=openTunnel", "400 Bad Request", "parameter 'method' is given twice"),
            ("?method=openTunnel&color=red", "400 Bad Request", "unrecognized option 'color'"),
            ("?method=openTunnel&name=%00", "400 Bad Request", "option name contains the character U+0000"),
            ("?method=openTunnel&name=%FF", "400 Bad Request", "option name="),
            ("?%FF=%FE&method=%F0", "404 Not Found", "unrecognized method"),
        ],
    )
    async def test_an_error_is_a_reason_phrase_and_a_sentence(self, query: str, status: str, sentence: str) -> None:
        async with running_http() as relay:
            answer = await relay.request("GET", f"{SERVLET}{query}")
            phrase, detail, end = answer.text.split("\n")
            assert (answer.status, phrase, end) == (int(status[:3]), status, "")
            assert sentence in detail
            assert list(relay.daemon.service.tunnels()) == []

    async def test_a_draining_relay_is_unavailable(self) -> None:
        async with running_http() as relay:
            relay.daemon.service.draining = True
            assert (await relay.request("GET", f"{SERVLET}?method=openTunnel")).status == 503

    async def test_head_opens_nothing(self) -> None:
        async with running_http() as relay:
            answer = await relay.request("HEAD", f"{SERVLET}?method=openTunnel")
            assert (answer.status, answer.headers["allow"]) == (405, "GET, POST")
            assert list(relay.daemon.service.tunnels()) == []
