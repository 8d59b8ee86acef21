"""Asks the operator's authorization service about logins, tunnels and visitors: `control.authorize`.

    question   {"version": 1, "event": "open", "credential": "alice", "address": "203.0.113.5", "tunnel": {...}}
    answer     {"allow": true}, or {"allow": false, "reason": "..."}

The service is a URL, which gets the question in a POST request, or a program, which gets it on its standard input and
answers on its standard output with exit status 0. What it has not allowed in time is refused. An answer is remembered
for `control.authorize_cache`; a failure is not. Several equal questions at a time are asked once.

Admins are exempt from questions about logins and tunnels: an operator must reach a relay whose service has failed.
"""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import structlog
import trio

from tunneld.auth.http_question import AskFailedError, exchange, request_head
from tunneld.auth.remembered import Remembered
from tunneld.config.schema import ControlSettings
from tunneld.errors import LimitReachedError, NotAllowedError, reason_of
from tunneld.policy.access import Grant
from tunneld.policy.places import share_of
from tunneld.policy.rates import LogLimiter, Rate
from tunneld.policy.site_rules import AuthUrl

log: structlog.stdlib.BoundLogger = structlog.get_logger("auth")

MAX_ANSWER = 64 * 1024
"""Bytes that a program may write: an answer has one sentence."""

MAX_REASON = 200
"""Characters of a reason that are shown: a line of a terminal or two."""

MAX_ANSWERS = 10_000
"""Answers that are remembered, at about 150 bytes each; the oldest are forgotten."""

FAILURE_LOG_RATE = Rate.parse("60/m")
"""Log lines about failures of the service."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What the service decided. The reason is for the user where it is a refusal."""

    allow: bool
    reason: str = ""


@dataclass(slots=True, eq=False)
class _Asking:
    """A question under way: all that ask the same wait for it."""

    done: trio.Event = field(default_factory=trio.Event)
    answer: Decision | None = None  # None: it failed
    failure: str = ""


Question = Mapping[str, object]


class Authority:
    """Asks, and remembers the answers."""

    def __init__(self, settings: Callable[[], ControlSettings] = ControlSettings) -> None:
        """`settings` is called for each question, so that a reload applies to the next one."""
        self._settings = settings
        self._answers = Remembered[Decision](lambda: settings().authorize_cache, MAX_ANSWERS)
        self._asking: dict[str, _Asking] = {}  # by question
        self._owners = Counter[str]()  # of these
        self._limiter = LogLimiter(FAILURE_LOG_RATE)
        self._context: ssl.SSLContext | None = None

    def asks(self, event: str) -> bool:
        """Whether the service is asked about events of this kind: `login`, `open` or `visitor`."""
        settings = self._settings()
        return bool(settings.authorize) and event in settings.authorize_events

    async def check_login(self, grant: Grant, host: str) -> None:
        """Ask whether a credential may be used from the address `host`. Raises as `check_open`."""
        if grant.name and not grant.is_admin and self.asks("login"):
            await self._check({"event": "login", "credential": grant.name, "address": host}, grant.name)

    async def check_open(self, grant: Grant, host: str, tunnel: Question) -> None:
        """Ask whether a `tunnel` may be opened. Raises `NotAllowedError` where the service refuses it, and
        `LimitReachedError` where it gives no answer: a later attempt may succeed.
        """
        if not (grant.name and grant.is_admin) and self.asks("open"):
            question = {"event": "open", "credential": grant.name, "address": host, "tunnel": tunnel}
            await self._check(question, grant.name or host)

    async def check_visitor(self, host: str, tunnel: Question, owner: str) -> Decision:
        """The decision about a visitor from the address `host` of a tunnel of `owner`. A failure is a refusal."""
        question = {"event": "visitor", "address": host, "tunnel": tunnel}
        try:
            return await self.ask(question, owner)
        except AskFailedError as error:
            return Decision(False, str(error))

    def remembered_visitor(self, host: str, tunnel: Question) -> Decision | None:
        """The same where no question is needed; otherwise None."""
        return self._remembered(_text_of({"event": "visitor", "address": host, "tunnel": tunnel}))

    async def _check(self, question: Question, owner: str) -> None:
        try:
            answer = await self.ask(question, owner)
        except AskFailedError:  # the log has the reason, which is about the operator's machines
            raise LimitReachedError("the relay's authorization service gave no answer; try again later") from None
        if not answer.allow:
            because = f": {answer.reason}" if answer.reason else ""
            raise NotAllowedError(f"the relay's authorization service refused this {question['event']}{because}")

    async def ask(self, question: Question, owner: str) -> Decision:
        """Ask, or return the answer that is remembered. Raises `AskFailedError` with the reason. `owner` is the
        credential, or else the address, whose questions these are: one of them never takes all places.
        """
        text = _text_of(question)
        while (known := self._remembered(text)) is None:
            if (asking := self._asking.get(text)) is None:
                asking = await self._ask_service(text, question, owner)
            else:
                await asking.done.wait()
            if asking.answer is not None:
                return asking.answer
            if asking.failure:
                raise AskFailedError(asking.failure)
            # The task that asked was cancelled: this one asks.
        return known

    async def _ask_service(self, text: str, question: Question, owner: str) -> _Asking:
        settings = self._settings()
        places, share = settings.max_authorizing, share_of(settings.max_authorizing, settings.credential_share)
        if len(self._asking) >= places or self._owners[owner] >= share:
            raise self._failed(question, f"too many questions to the authorization service ({places}, max_authorizing)")
        self._asking[text] = asking = _Asking()
        self._owners[owner] += 1
        try:
            await self._ask(text, question, asking, settings)
        finally:
            asking.done.set()
            del self._asking[text]
            self._owners[owner] -= 1
            if not self._owners[owner]:
                del self._owners[owner]
        return asking

    async def _ask(self, text: str, question: Question, asking: _Asking, settings: ControlSettings) -> None:
        timeout, key = settings.authorize_timeout, self._key(text)
        try:
            with trio.move_on_after(timeout) as scope:
                data = await self._send(settings.authorize, text.encode())
                asking.answer = _parse(data)
                self._answers.put(key, asking.answer, trio.current_time())
            if scope.cancelled_caught:
                late = f"no answer of the authorization service within {timeout:g} s (control.authorize_timeout)"
                raise AskFailedError(late)
        except AskFailedError as error:
            asking.failure = str(self._failed(question, str(error)))

    async def _send(self, service: str, text: bytes) -> bytes:
        if service.startswith("/"):
            return await _run(service, text)
        url = AuthUrl.parse(service)
        if self._context is None and url.secure:
            self._context = await trio.to_thread.run_sync(ssl.create_default_context)
        sizes = [(b"Content-Type", b"application/json"), (b"Content-Length", b"%d" % len(text))]
        server = "the authorization service"
        answer = await exchange(url, request_head(b"POST", url, sizes) + text, self._context, server)
        if answer.status != 200:
            raise AskFailedError(f"{server} answered with status {answer.status}")
        return answer.body

    def _failed(self, question: Question, reason: str) -> AskFailedError:
        if (left_out := self._limiter.passes(trio.current_time())) is not None:
            facts = {"question": question["event"], "credential": question.get("credential"), "left_out": left_out}
            log.warning("authorization failed: refused", peer=question["address"], reason=reason, **facts)
        return AskFailedError(reason)

    def _remembered(self, text: str) -> Decision | None:
        return self._answers.get(self._key(text), trio.current_time())

    def _key(self, text: str) -> bytes:
        """Where the answer to a question is remembered: another service, after a reload, is asked anew."""
        return self._answers.digest(self._settings().authorize.encode(), text.encode())


class VisitorAuthority:
    """Decides about the visitors of one tunnel."""

    def __init__(self, authority: Authority, tunnel: Question, owner: str) -> None:
        """`tunnel` is what the service learns of it; `owner` its credential, or else the address of its agent."""
        self._authority = authority
        self._tunnel = tunnel
        self._owner = owner

    @property
    def is_active(self) -> bool:
        """Whether the service is asked about visitors at all."""
        return self._authority.asks("visitor")

    def remembered(self, host: str) -> Decision | None:
        """The decision about a visitor from the address `host` where no question is needed; otherwise None."""
        return self._authority.remembered_visitor(host, self._tunnel)

    async def ask(self, host: str) -> Decision:
        """The decision. A failure is a refusal."""
        return await self._authority.check_visitor(host, self._tunnel, self._owner)


def _text_of(question: Question) -> str:
    return json.dumps({"version": 1, **question}, sort_keys=True, separators=(",", ":"))


def _parse(data: bytes) -> Decision:
    """Read an answer. Raises `AskFailedError`."""
    try:
        found: Any = json.loads(data)
    except (ValueError, RecursionError):
        raise AskFailedError("the answer of the authorization service is no JSON") from None
    if not isinstance(found, dict) or not isinstance(found.get("allow"), bool):
        raise AskFailedError('the answer of the authorization service has no "allow": true or false')
    reason = found.get("reason", "")
    text = reason if isinstance(reason, str) else ""
    return Decision(found["allow"], "".join(filter(str.isprintable, text))[:MAX_REASON])


async def _run(program: str, text: bytes) -> bytes:
    """Run the program, and kill it and what it has started where this is cancelled. Raises `AskFailedError`."""
    try:
        process = await trio.lowlevel.open_process(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
    except OSError as error:
        raise AskFailedError(f"could not run {program} (control.authorize): {reason_of(error)}") from None
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with process.stdin, process.stdout:
            with suppress(trio.BrokenResourceError):  # it may answer without reading the question
                await process.stdin.send_all(text + b"\n")
            await process.stdin.aclose()
            answer = await _read_all(process.stdout, program)
        if status := await process.wait():
            raise AskFailedError(f"{program} failed with status {status} (control.authorize)")
        return answer
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with trio.CancelScope(shield=True):  # it has been killed
                await process.wait()


async def _read_all(stream: trio.abc.ReceiveStream, program: str) -> bytes:
    data = bytearray()
    while chunk := await stream.receive_some():
        data += chunk
        if len(data) > MAX_ANSWER:
            raise AskFailedError(f"the answer of {program} exceeds {MAX_ANSWER} bytes (control.authorize)")
    return bytes(data)
