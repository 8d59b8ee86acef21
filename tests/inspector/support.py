"""Conversations that are recorded without a relay, and requests to the page."""

from __future__ import annotations

from tunneld.inspector.conversation import Conversation
from tunneld.inspector.framing import NotHttpError
from tunneld.inspector.pages import Inspected, InspectorPages
from tunneld.inspector.recorder import Recorder
from tunneld.inspector.records import REQUEST, RESPONSE, Exchange
from tunneld.inspector.replay import Replayer
from tunneld.inspector.settings import InspectorLimits
from tunneld.inspector.store import ExchangeStore
from tunneld.inspector.web import PageAnswer, PageRequest

TOKEN = "the-token"
PORT = 4040


class Recorded:
    """A connection; `say` adds what a side sends."""

    def __init__(self, store: ExchangeStore | None = None, *, has_proxy_header: bool = False) -> None:
        self.store = ExchangeStore(InspectorLimits()) if store is None else store
        self.conversation = Conversation(self.store, "blog", "192.0.2.1:4", has_proxy_header=has_proxy_header)
        self.now = 0.0
        self.is_followed = True

    def say(self, side: int, data: bytes, chunk: int = 0) -> None:
        """Bytes of a side, in pieces of this size."""
        step = chunk or len(data) or 1
        for start in range(0, len(data), step):
            self.now += 1
            if not self.is_followed:
                return
            try:
                self.conversation.feed(side, data[start : start + step], self.now)
            except NotHttpError as error:
                self.is_followed = False
                self.conversation.give_up(str(error), self.now)

    def ask(self, data: bytes, chunk: int = 0) -> None:
        self.say(REQUEST, data, chunk)

    def reply(self, data: bytes, chunk: int = 0) -> None:
        self.say(RESPONSE, data, chunk)

    def end(self) -> None:
        self.now += 1
        if self.is_followed:
            self.conversation.end(self.now)

    @property
    def all(self) -> list[Exchange]:
        return list(self.store)

    @property
    def one(self) -> Exchange:
        (exchange,) = self.store
        return exchange


def recorded(request: bytes, response: bytes) -> Recorded:
    """One request and its response."""
    made = Recorded()
    made.ask(request)
    made.reply(response)
    return made


class PagesHere:
    """The pages without a server."""

    def __init__(self, store: ExchangeStore | None = None) -> None:
        self.recorder = Recorder(ExchangeStore(InspectorLimits()) if store is None else store)
        self.inspected = Inspected(self.recorder, Replayer(self.recorder), TOKEN, "127.0.0.1", PORT)
        self.pages = InspectorPages(self.inspected)

    async def get(self, path: str, **more: str) -> PageAnswer:
        """A request as the page makes it; `more` are header fields, `_` for `-`; an empty one is left out."""
        return await self._ask("GET", path, b"", {}, more)

    async def post(self, path: str, body: bytes, **more: str) -> PageAnswer:
        usual = {"origin": f"http://127.0.0.1:{PORT}", "content-type": "application/json"}
        return await self._ask("POST", path, body, usual, more)

    async def _ask(
        self, method: str, path: str, body: bytes, usual: dict[str, str], more: dict[str, str]
    ) -> PageAnswer:
        usual = {"host": f"127.0.0.1:{PORT}", "cookie": f"a=b; tunneld_inspector_{PORT}={TOKEN}", **usual}
        headers = usual | {name.replace("_", "-"): value for name, value in more.items()}
        path, _, query = path.partition("?")
        pairs = dict(pair.partition("=")[::2] for pair in query.split("&") if pair)
        present = {name: value for name, value in headers.items() if value}
        return await self.pages.answer(PageRequest(method, path, pairs, present, body))
