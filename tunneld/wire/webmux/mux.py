"""One end of a WebMUX connection (draft-gettys-webmux-00): bytes in, events out. Pure.

`receive` is a generator, for a reason: it stops at each item, so whatever the caller does about it (reset the session,
send, open another) happens before the next fragment is parsed, and never hits a later generation of the same id.

A fragment is handed out as it arrives, in parts if reads cut it. From one `receive` to the next are kept: at most 7
bytes of a header, how much is left of a fragment, and a text of at most `MAX_TEXT` bytes. So input that is cut finely
costs no more than its bytes. A buffer full of the smallest fragments would delay everything else by as much as a
second, though; a caller can therefore limit the fragments parsed at once, and the rest of that input is kept, too.

Messages that every session has once or often take a fast path in `_parse`: plain data that is complete, SYN, and a FIN
without data that is not an answer. Everything else becomes a `_Fragment`.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from typing import Final

from tunneld.errors import LocalProtocolError, RemoteProtocolError
from tunneld.wire.webmux.events import Item
from tunneld.wire.webmux.header import (
    BARE,
    CONTROL,
    FIELD,
    FIN,
    LONG,
    MAX_TEXT,
    MAX_UNSENT,
    PUSH,
    RARE,
    RST,
    SYN,
    TWO_WORDS,
    WITHOUT_PAYLOAD,
    WORD,
    Code,
    code_of,
)
from tunneld.wire.webmux.receiver import Receiver
from tunneld.wire.webmux.sessions import Session

_Parser = Generator[Item, None, int]
"""Parses some input; returns the offset of the next header, which may be beyond the end of the input."""

_word_at: Final = WORD.unpack_from
_NO_DATA: Final = memoryview(b"")


class _Fragment:
    """A fragment during the receipt of its payload."""

    __slots__ = ("generation", "is_text", "kept", "left", "padding", "session", "word")

    def __init__(self, word: int, size: int, session: Session) -> None:
        self.word = word
        self.left = size
        self.padding = -size & 3
        self.session = session
        self.generation = session.generation
        self.is_text = False  # handled when complete, so kept until then
        self.kept = bytearray()


class Mux(Receiver):
    """The codec of one end. `initiator` is whether this end made the TCP connection; it decides which ids it opens.

    The caller writes the bytes in `outgoing` to the connection: from a memoryview of it, then release the view and
    `del outgoing[:n]`. Every call may append to it, including `receive`.
    """

    def __init__(self, *, initiator: bool) -> None:
        super().__init__(initiator=initiator)
        self._parsing = False
        self._header = bytearray()  # the start of a header that the last input cut
        self._incoming: _Fragment | None = None  # a fragment that it cut after the header
        self._skip = 0  # bytes of padding that are still to come
        self._unparsed = _NO_DATA  # the rest of the last input, beyond `max_fragments`
        self.has_unparsed = False  # there is one: continue with `receive(b"")`

    def receive(self, data: bytes | bytearray | memoryview, max_fragments: int = sys.maxsize) -> Iterator[Item]:
        """Parse input: iterate to the end before you overwrite `data` or call this again.

        Items are `Data` tuples and `Event` objects, in order. May raise `RemoteProtocolError` at any item; close the
        connection then, and receive nothing more. A memoryview must have format B. If `data` has more fragments than
        `max_fragments`, the rest is kept: see `has_unparsed`.
        """
        if self._parsing:
            raise LocalProtocolError("receive before the last input was iterated to its end, or after an error")
        if self.has_unparsed and data:
            raise LocalProtocolError("receive before the rest of the last input was parsed")
        rest, is_ours = self._unparsed, self.has_unparsed
        self._unparsed, self.has_unparsed, self._parsing = _NO_DATA, False, True
        return self._parse(rest if is_ours else memoryview(data), max_fragments, is_ours=is_ours)

    def _parse(self, data: memoryview, max_fragments: int, *, is_ours: bool) -> Iterator[Item]:
        size = len(data)
        at, self._skip = self._skip, 0
        self.cost = 1
        if self._incoming or self._header:
            at = yield from self._resume(data)
        sessions = self._sessions
        for parsed in range(max_fragments):
            if size - at < 4:
                self.cost += parsed
                break
            word = _word_at(data, at)[0]
            session = sessions[word >> 24] or self.table.get(word >> 24)
            flags = word & RARE
            if not flags:
                length = word & FIELD
                start = at + 4
                end = start + length
                if 0 < length <= session.allowance and end <= size and session.state.receiving:
                    session.allowance -= length
                    yield session.sid, data[start:end], word & PUSH != 0
                    at = end + (-length & 3)
                    continue
            elif flags == SYN:
                if event := self._receive_syn(session, word & FIELD):
                    yield event
                at += 4
                continue
            elif word & BARE == FIN and not session.state.opening:
                if event := self._receive_fin(session):
                    yield event
                at += 4
                continue
            at = yield from self._parse_fragment(word, data, at)
        else:
            self.cost += max_fragments
        if at != size or self.table.has_new_default:
            yield from self._end_input(data, at, is_ours=is_ours)
        if len(self.outgoing) > MAX_UNSENT:
            raise RemoteProtocolError(f"peer sends but does not read: {len(self.outgoing)} bytes are pending for it")
        self._parsing = False

    def _end_input(self, data: memoryview, at: int, *, is_ours: bool) -> Iterator[Item]:
        """Keep the rest of this input, from `at` on, for the next `receive`; copy it unless it `is_ours`. Apply what
        was announced in it.
        """
        left = len(data) - at
        if left >= 4:
            self.has_unparsed = True
            self._unparsed = data[at:] if is_ours else memoryview(bytes(data[at:]))
        elif left > 0:
            self._header += data[at:]
        else:
            self._skip = -left
        if self.table.has_new_default:
            yield from self._apply_default_credit()

    def _resume(self, data: memoryview) -> _Parser:
        """Continue with the fragment that the last input cut."""
        if self._incoming:
            return (yield from self._parse_payload(self._incoming, data, 0))
        return (yield from self._parse_header(data))

    def _parse_header(self, data: memoryview) -> _Parser:
        """Complete the header that the last input cut."""
        header = self._header
        at = max(0, 4 - len(header))
        header += data[:at]
        if len(header) < 4:
            return len(data)
        (word,) = _word_at(header)
        if word & LONG:
            missing = 8 - len(header)
            header += data[at : at + missing]
            at += missing
            if len(header) < 8:
                return len(data)
        self._header = bytearray()
        value = TWO_WORDS.unpack(header)[1] if word & LONG else word & FIELD
        return (yield from self._begin(word, value, data, at))

    def _parse_fragment(self, word: int, data: memoryview, at: int) -> _Parser:
        """Parse the fragment whose header starts at `at` with `word`."""
        if not word & LONG:
            return (yield from self._begin(word, word & FIELD, data, at + 4))
        if len(data) - at < 8:
            self._header += data[at:]
            return len(data)
        return (yield from self._begin(word, _word_at(data, at + 4)[0], data, at + 8))

    def _begin(self, word: int, value: int, data: memoryview, at: int) -> _Parser:
        """Handle a complete header; `at` is the offset after it."""
        session = self.table.get(word >> 24)
        fragment = _Fragment(word, value, session)
        if word & CONTROL:
            code = code_of(word)
            if code in WITHOUT_PAYLOAD:
                yield from self._receive_control(code, session, value)
                return at
            if code == Code.INTERN_ATOM:
                self._check_atom(session.sid, value)
                fragment.is_text = True
        elif word & SYN:
            yield from self._begin_session(word, value)
            return at
        elif word & RST:
            fragment.is_text = True
        elif (value or word & PUSH) and (
            broken := self._receive_data(session, value)
        ):  # neither a bare FIN nor an empty fragment is data
            yield broken
        self._incoming = fragment
        return (yield from self._parse_payload(fragment, data, at))

    def _begin_session(self, word: int, protocol: int) -> Iterator[Item]:
        """SYN with other flags or LONG."""
        session = self.table.get(word >> 24)
        if word & FIN and not word & RST:
            yield from self._receive_syn_and_fin(session, protocol)
            return
        event = self._receive_rst(session, b"") if word & RST else self._receive_syn(session, protocol)
        if event:
            yield event

    def _parse_payload(self, fragment: _Fragment, data: memoryview, at: int) -> _Parser:
        session, end = fragment.session, min(at + fragment.left, len(data))
        fragment.left -= end - at
        is_record_end = fragment.word & PUSH != 0 and not fragment.left
        if fragment.is_text:
            fragment.kept += data[at : min(end, at + MAX_TEXT - len(fragment.kept))]
        elif session.state.receiving and not fragment.word & CONTROL and (end > at or is_record_end):
            yield session.sid, data[at:end], is_record_end
        if fragment.left:
            return end
        self._incoming = None
        yield from self._end(fragment)
        return end + fragment.padding

    def _end(self, fragment: _Fragment) -> Iterator[Item]:
        """Handle the end of a payload."""
        session, word = fragment.session, fragment.word
        if word & CONTROL:
            if code_of(word) == Code.INTERN_ATOM:
                yield self._receive_atom(session.sid, bytes(fragment.kept))
        elif session.generation != fragment.generation:
            return  # the id was opened again since this fragment began
        elif word & FIN and session.state.opening and not word & RST:
            yield from self._receive_syn_and_fin(session, session.protocol)
        elif word & (FIN | RST):
            event = self._receive_rst(session, bytes(fragment.kept)) if word & RST else self._receive_fin(session)
            if event:
                yield event
