"""The relay's own answers are complete responses, for people and for programs."""

from __future__ import annotations

import h11
import pytest

from tunneld.sites.pages import RETRY_SECONDS, error_page, https_redirect
from tunneld.wire.http1 import RequestHead, parse_request


def request(*lines: bytes, start: bytes = b"GET /a?b HTTP/1.1") -> RequestHead:
    return parse_request(b"\r\n".join([start, b"Host: Blog.example.org:8080", *lines, b"", b""]))


def read(response: bytes, method: str = "GET") -> tuple[h11.Response, str, bool]:
    """The response, its body, and whether the connection stays open."""
    peer = h11.Connection(h11.CLIENT)
    peer.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
    peer.send(h11.EndOfMessage())
    peer.receive_data(response)
    head = peer.next_event()
    assert isinstance(head, h11.Response)
    body = b""
    while not isinstance(event := peer.next_event(), h11.EndOfMessage):
        assert isinstance(event, h11.Data)
        body += bytes(event.data)
    assert peer.trailing_data == (b"", False)
    return head, body.decode(), peer.their_state is h11.DONE


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 408, 414, 417, 421, 429, 431, 501, 502, 503, 504, 505])
def test_errors_are_a_line_for_programs_and_a_page_for_browsers(status: int) -> None:
    head, text, _ = read(error_page(status, request(), b"id1"))
    assert head.status_code == status
    assert text.startswith(f"{status} ")
    assert text.endswith("request id1\n")
    head, page, _ = read(error_page(status, request(b"Accept: text/html,*/*"), b"id1"))
    assert page.startswith("<!doctype html>")
    assert "id1" in page
    assert dict(head.headers)[b"tunneld-error"] == str(status).encode()


def test_a_site_that_is_not_connected_says_when_to_try_again() -> None:
    assert dict(read(error_page(503, request(), b"id1"))[0].headers)[b"retry-after"] == str(RETRY_SECONDS).encode()
    assert b"retry-after" not in dict(read(error_page(404, request(), b"id1"))[0].headers)


def test_the_connection_stays_open_if_the_request_was_read_to_its_end() -> None:
    assert read(error_page(404, request(), b"id1", keep_alive=True))[2]
    assert not read(error_page(404, request(), b"id1"))[2]
    assert not read(error_page(400, None, b"id1"))[2]
    old = request(b"Connection: keep-alive", start=b"GET / HTTP/1.0")
    assert b"\r\nConnection: keep-alive\r\n" in error_page(404, old, b"id1", keep_alive=True)


def test_head_gets_no_body() -> None:
    response = error_page(404, request(start=b"HEAD / HTTP/1.1"), b"id1")
    assert response.endswith(b"\r\n\r\n")
    assert read(response, "HEAD")[1] == ""


def test_http_is_redirected_to_https_with_the_method_kept() -> None:
    head, _, open_ = read(https_redirect(request(), 443, b"id1", keep_alive=True))
    assert (head.status_code, dict(head.headers)[b"location"], open_) == (308, b"https://blog.example.org/a?b", True)
    head, _, _ = read(https_redirect(request(), 8443, b"id1", keep_alive=False))
    assert dict(head.headers)[b"location"] == b"https://blog.example.org:8443/a?b"
