"""One end of a WebMUX connection (draft-gettys-webmux-00): octets in, items out. Pure.

`receive` is a generator, and that is the point: it stops at each item, so what the caller does about one (reset its
session, send, open another) is done before the next fragment is read, and never hits a later life of the same id.

A fragment is handed out as it arrives, in parts where reads cut it. Kept from one `receive` to the next are at most 7
octets of a header, how much is left of a fragment, and a text of at most `MAX_TEXT` octets; so cutting the input
finely costs no more than its octets. A buffer of the smallest fragments would keep everybody else waiting for as long
as a second, though; who wants to be fair says how many are read at once, and the rest of that input is kept, too.

What every session has many or one of takes a straight path in `_read`: plain data that is whole, SYN, and a FIN with
nothing that is no answer; everything else is a `_Fragment`.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator

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

_Reading = Generator[Item, None, int]
"""Reads some input; returns where the next header starts, which may be behind the end of the input."""

_word_at = WORD.unpack_from
_NOTHING = memoryview(b"")


class _Fragment:
    """A fragment whose payload is being read."""

    __slots__ = ("kept", "left", "life", "pad", "session", "text", "word")

    def __init__(self, word: int, size: int, session: Session) -> None:
        self.word = word
        self.left = size
        self.pad = -size & 3
        self.session = session
        self.life = session.life
        self.text = False  # to be heard as a whole, and so kept
        self.kept = bytearray()


class Mux(Receiver):
    """Both halves of one end. `initiator` says who made the TCP connection, which decides who opens which ids.

    Take what is to be written from `outgoing`: write from a memoryview of it, release the view, `del outgoing[:n]`.
    Every call may append to it, `receive` too.
    """

    def __init__(self, *, initiator: bool) -> None:
        super().__init__(initiator=initiator)
        self._reading = False
        self._head = bytearray()  # of a header that the last input cut
        self._fragment_in: _Fragment | None = None  # that it cut behind the header
        self._skip = 0  # octets of padding that it lacked
        self._behind = _NOTHING  # of the last input: more fragments than were to be read at once

    @property
    def has_unparsed(self) -> bool:
        """Whether the last input was not read to its end: go on with `receive(b"")`."""
        return len(self._behind) > 0

    def receive(self, data: bytes | bytearray | memoryview, most: int = sys.maxsize) -> Iterator[Item]:
        """Read what arrived: iterate to the end, and only then overwrite `data` or call this again.

        Items are `Data` tuples and `Event` objects, in order. Raises `RemoteProtocolError` in between, after which
        the connection is to be closed and nothing received any more. A memoryview must be one of octets. Of more
        fragments than `most` the rest is kept: see `behind`.
        """
        if self._reading:
            raise LocalProtocolError("receive before the last input was read to its end, or after an error")
        if self._behind and data:
            raise LocalProtocolError("receive before what is behind of the last input was read")
        behind, self._behind = self._behind, _NOTHING
        self._reading = True
        return self._read(behind or memoryview(data), most, is_ours=len(behind) > 0)

    def _read(self, data: memoryview, most: int, *, is_ours: bool) -> Iterator[Item]:
        size = len(data)
        at, self._skip = self._skip, 0
        if self._fragment_in or self._head:
            at = yield from self._resume(data)
        sessions = self._sessions
        for _ in range(most):
            if size - at < 4:
                break
            word = _word_at(data, at)[0]
            session = sessions[word >> 24]
            said = word & RARE
            if not said:
                length = word & FIELD
                start = at + 4
                end = start + length
                if 0 < length <= session.allowance and end <= size and session.state.receiving:
                    session.allowance -= length
                    yield session.sid, data[start:end], word & PUSH != 0
                    at = end + (-length & 3)
                    continue
            elif said == SYN:
                if event := self._hear_syn(session, word & FIELD):
                    yield event
                at += 4
                continue
            elif word & BARE == FIN and not session.state.calling:
                if event := self._hear_fin(session):
                    yield event
                at += 4
                continue
            at = yield from self._read_fragment(word, data, at)
        self._keep(data, at, is_ours=is_ours)
        if len(self.outgoing) > MAX_UNSENT:
            raise RemoteProtocolError(f"peer sends and does not read: {len(self.outgoing)} octets wait for it")
        self._reading = False

    def _keep(self, data: memoryview, at: int, *, is_ours: bool) -> None:
        """What was not read of this input, for the next `receive`."""
        left = len(data) - at
        if left >= 4:
            self._behind = data[at:] if is_ours else memoryview(bytes(data[at:]))
        elif left > 0:
            self._head += data[at:]
        else:
            self._skip = -left

    def _resume(self, data: memoryview) -> _Reading:
        """Go on in the fragment that the last input cut."""
        if self._fragment_in:
            return (yield from self._read_payload(self._fragment_in, data, 0))
        return (yield from self._read_head(data))

    def _read_head(self, data: memoryview) -> _Reading:
        """Complete a header that the last input cut."""
        head = self._head
        at = max(0, 4 - len(head))
        head += data[:at]
        if len(head) < 4:
            return len(data)
        (word,) = _word_at(head)
        if word & LONG:
            lack = 8 - len(head)
            head += data[at : at + lack]
            at += lack
            if len(head) < 8:
                return len(data)
        self._head = bytearray()
        value = TWO_WORDS.unpack(head)[1] if word & LONG else word & FIELD
        return (yield from self._begin(word, value, data, at))

    def _read_fragment(self, word: int, data: memoryview, at: int) -> _Reading:
        """Read from the header at `at`, which starts with `word`."""
        if not word & LONG:
            return (yield from self._begin(word, word & FIELD, data, at + 4))
        if len(data) - at < 8:
            self._head += data[at:]
            return len(data)
        return (yield from self._begin(word, _word_at(data, at + 4)[0], data, at + 8))

    def _begin(self, word: int, value: int, data: memoryview, at: int) -> _Reading:
        """A header is complete; `at` is behind it."""
        session = self._sessions[word >> 24]
        fragment = _Fragment(word, value, session)
        if word & CONTROL:
            code = code_of(word)
            if code in WITHOUT_PAYLOAD:
                yield from self._hear_control(code, session, value)
                return at
            if code == Code.INTERN_ATOM:
                self._check_atom(session.sid, value)
                fragment.text = True
        elif word & SYN:
            yield from self._begin_session(word, value)
            return at
        elif word & RST:
            fragment.text = True
        elif (value or word & PUSH) and (
            broken := self._hear_data(session, value)
        ):  # a FIN or nothing at all is no data
            yield broken
        self._fragment_in = fragment
        return (yield from self._read_payload(fragment, data, at))

    def _begin_session(self, word: int, protocol: int) -> Iterator[Item]:
        """SYN with whatever stands beside it."""
        session = self._sessions[word >> 24]
        if word & FIN and not word & RST:
            yield from self._hear_syn_and_fin(session, protocol)
            return
        event = self._hear_rst(session, b"") if word & RST else self._hear_syn(session, protocol)
        if event:
            yield event

    def _read_payload(self, fragment: _Fragment, data: memoryview, at: int) -> _Reading:
        session, end = fragment.session, min(at + fragment.left, len(data))
        fragment.left -= end - at
        marked = fragment.word & PUSH != 0 and not fragment.left
        if fragment.text:
            fragment.kept += data[at : min(end, at + MAX_TEXT - len(fragment.kept))]
        elif session.state.receiving and not fragment.word & CONTROL and (end > at or marked):
            yield session.sid, data[at:end], marked
        if fragment.left:
            return end
        self._fragment_in = None
        yield from self._end(fragment)
        return end + fragment.pad

    def _end(self, fragment: _Fragment) -> Iterator[Item]:
        """The payload is complete."""
        session, word = fragment.session, fragment.word
        if word & CONTROL:
            if code_of(word) == Code.INTERN_ATOM:
                yield self._hear_atom(session.sid, bytes(fragment.kept))
        elif session.life != fragment.life:
            return  # the id has been opened again since this began, so it means nothing any more
        elif word & FIN and session.state.calling and not word & RST:
            yield from self._hear_syn_and_fin(session, session.protocol)
        elif word & (FIN | RST):
            event = self._hear_rst(session, bytes(fragment.kept)) if word & RST else self._hear_fin(session)
            if event:
                yield event
