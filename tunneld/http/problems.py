"""Errors as HTTP responses: a status, a wire code of `tunneld.errors`, and one sentence.

    wire code         status    faultCode (XML-RPC)
    usage             400       1
    no-such-tunnel    404       2
    not-allowed       403       3     401 if the request could succeed with a credential
    limit             503       4
    shortage          503       5
    draining          503       6
    config            409       7
    cannot-listen     503       8
    protocol          400       9     the body is not XML-RPC
    internal          500       10    a bug, or a code that is not in this table
    ended             410       11
    expired           410       12
    no-certificate    502       13

Under `/api` an error is JSON (RFC 9457), elsewhere plain text: the reason phrase in the first line, the sentence in the
second.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

from starlette.responses import Response

from tunneld.errors import NotAllowedError, TunneldError, UsageError

API_PREFIX = "/api/"

STATUSES: dict[str, HTTPStatus] = {
    "usage": HTTPStatus.BAD_REQUEST,
    "no-such-tunnel": HTTPStatus.NOT_FOUND,
    "not-allowed": HTTPStatus.FORBIDDEN,
    "limit": HTTPStatus.SERVICE_UNAVAILABLE,
    "shortage": HTTPStatus.SERVICE_UNAVAILABLE,
    "draining": HTTPStatus.SERVICE_UNAVAILABLE,
    "config": HTTPStatus.CONFLICT,  # the request is correct, the file that it refers to is not
    "cannot-listen": HTTPStatus.SERVICE_UNAVAILABLE,
    "protocol": HTTPStatus.BAD_REQUEST,
    "internal": HTTPStatus.INTERNAL_SERVER_ERROR,
    "ended": HTTPStatus.GONE,
    "expired": HTTPStatus.GONE,
    "no-certificate": HTTPStatus.BAD_GATEWAY,  # the authority refused, or does not answer
}

FAULTS: dict[str, int] = {code: number for number, code in enumerate(STATUSES, start=1)}

INTERNAL = "the request failed because of a bug in the relay; see the log of the relay"


@dataclass(frozen=True, slots=True)
class Problem:
    """One error response."""

    status: HTTPStatus
    detail: str
    code: str = UsageError.code
    headers: Mapping[str, str] = field(default_factory=dict)


class HttpError(Exception):
    """A request refused by the HTTP service itself, not by a command."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem


def http_error(status: HTTPStatus, detail: str, **headers: str) -> HttpError:
    """A `HttpError` with the wire code that fits its status. An underscore in a header's name stands for a dash."""
    forbidden = status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.MISDIRECTED_REQUEST}
    code = NotAllowedError.code if forbidden else UsageError.code
    return HttpError(Problem(status, detail, code, {name.replace("_", "-"): value for name, value in headers.items()}))


def problem_of(error: TunneldError) -> Problem:
    """The error response to a command that failed."""
    return Problem(STATUSES.get(error.code, HTTPStatus.INTERNAL_SERVER_ERROR), str(error), error.code)


def internal_problem() -> Problem:
    """The error response to an unexpected exception: no detail of it leaves this process."""
    return Problem(HTTPStatus.INTERNAL_SERVER_ERROR, INTERNAL, TunneldError.code)


def respond(path: str, problem: Problem) -> Response:
    """Format a problem as JSON or text, as clients of `path` expect it."""
    status, phrase = problem.status.value, problem.status.phrase
    if path.startswith(API_PREFIX):
        facts = {"type": "about:blank", "title": phrase, "status": status}
        body = json.dumps({**facts, "detail": problem.detail, "code": problem.code}) + "\n"
        return Response(body, status, problem.headers, "application/problem+json")
    text = f"{status} {phrase}\n{problem.detail}\n".encode(errors="replace")
    return Response(text, status, problem.headers, "text/plain; charset=utf-8")
