"""What went wrong, as HTTP says it: a status, a wire code of `tunneld.errors`, one sentence.

    wire code         status    faultCode (XML-RPC)
    usage             400       1
    no-such-tunnel    404       2
    not-allowed       403       3     401 where it would help to say who asks
    limit             503       4
    shortage          503       5
    draining          503       6
    config            409       7
    cannot-listen     503       8
    protocol          400       9     the body is not XML-RPC
    internal          500       10    a bug of ours, or a code that is not in this table
    ended             410       11

Under `/api` a problem is JSON (RFC 9457), elsewhere plain text: the phrase in the first line, the sentence in the
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
    "config": HTTPStatus.CONFLICT,  # the request was right, the file that it refers to is not
    "cannot-listen": HTTPStatus.SERVICE_UNAVAILABLE,
    "protocol": HTTPStatus.BAD_REQUEST,
    "internal": HTTPStatus.INTERNAL_SERVER_ERROR,
    "ended": HTTPStatus.GONE,
}

FAULTS: dict[str, int] = {code: number for number, code in enumerate(STATUSES, start=1)}

INTERNAL = "something went wrong here, not in your request; the log of the relay says what"


@dataclass(frozen=True, slots=True)
class Problem:
    """One answer that is not what was asked for."""

    status: HTTPStatus
    detail: str
    code: str = UsageError.code
    headers: Mapping[str, str] = field(default_factory=dict)


class HttpError(Exception):
    """A request that HTTP itself turns down, before or beside the table of commands."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem


def refuse(status: HTTPStatus, detail: str, **headers: str) -> HttpError:
    """A `HttpError` whose wire code follows from its status; an underscore in a header's name stands for a dash."""
    forbidden = status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.MISDIRECTED_REQUEST}
    code = NotAllowedError.code if forbidden else UsageError.code
    return HttpError(Problem(status, detail, code, {name.replace("_", "-"): value for name, value in headers.items()}))


def of_error(error: TunneldError) -> Problem:
    """The problem that a refused command is."""
    return Problem(STATUSES.get(error.code, HTTPStatus.INTERNAL_SERVER_ERROR), str(error), error.code)


def of_bug() -> Problem:
    """The problem that an unexpected exception is: nothing of it leaves this process."""
    return Problem(HTTPStatus.INTERNAL_SERVER_ERROR, INTERNAL, TunneldError.code)


def respond(path: str, problem: Problem) -> Response:
    """Word a problem as the face at `path` does."""
    status, phrase = problem.status.value, problem.status.phrase
    if path.startswith(API_PREFIX):
        facts = {"type": "about:blank", "title": phrase, "status": status}
        body = json.dumps({**facts, "detail": problem.detail, "code": problem.code}) + "\n"
        return Response(body, status, problem.headers, "application/problem+json")
    text = f"{status} {phrase}\n{problem.detail}\n".encode(errors="replace")
    return Response(text, status, problem.headers, "text/plain; charset=utf-8")
