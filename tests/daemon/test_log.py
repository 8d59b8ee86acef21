"""Logs: one event is one line, a log never hurts, a reload applies to everybody."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast

import pytest
import structlog
from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from hypothesis import strategies as st

from tests.support.system import open_terminal
from tunneld.config import LogSettings
from tunneld.daemon import log
from tunneld.daemon.log.lines import Human, Json, brief
from tunneld.daemon.log.sink import Sink

UTC_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ")


@pytest.fixture(autouse=True)
def left_as_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Logging belongs to the process; other tests have theirs."""
    root = logging.getLogger()
    level = root.level
    for name in ("JOURNAL_STREAM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    yield
    root.removeHandler(log._libraries)
    root.level = level
    logging.captureWarnings(False)
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()


@contextlib.contextmanager
def pipe() -> Iterator[tuple[TextIO, TextIO]]:
    """A pipe as two text streams: to read, to write."""
    reading, writing = os.pipe()
    with open(reading, encoding="utf-8") as reader, open(writing, "w", encoding="utf-8") as writer:  # noqa: PTH123
        yield reader, writer


def lines_of(action: Any, **settings: str) -> list[str]:
    stream = io.StringIO()
    log.configure(LogSettings.model_validate(settings), stream)
    action(structlog.get_logger())
    return stream.getvalue().splitlines()


def test_a_line_for_people() -> None:
    (line,) = lines_of(
        lambda logger: logger.bind(tunnel="t4").info("visitor came", visitor="192.0.2.7:51311", octets=0)
    )
    assert UTC_TIME.match(line)
    assert UTC_TIME.sub("", line) == "info    visitor came             tunnel=t4 visitor=192.0.2.7:51311 octets=0"


def test_a_line_for_programs() -> None:
    (line,) = lines_of(
        lambda logger: logger.bind(tunnel="t4").warning("visitor gone", octets=7, why=None), format="json"
    )
    found = json.loads(line)
    assert UTC_TIME.match(found.pop("time") + " ")
    assert found == {"level": "warning", "event": "visitor gone", "tunnel": "t4", "octets": 7, "why": None}


def test_values_whose_end_would_not_be_seen_are_quoted() -> None:
    (line,) = lines_of(
        lambda logger: logger.info("x", a="two words", b="", c='say "hi"', d="a=b", e=None, f=True, g=0.25)
    )
    assert line.endswith(r'a="two words" b="" c="say \"hi\"" d="a=b" e=- f=true g=0.25')


@pytest.mark.parametrize("nasty", ["a\nb", "a\rb", "\x1b[2J", "\x00", "\x7f", "\x85", "\u2028", "\u202eevil", "\ud800"])
@pytest.mark.parametrize("where", ["event", "key", "value"])
@pytest.mark.parametrize("shape", ["human", "json"])
def test_nothing_a_stranger_says_breaks_or_paints_a_line(nasty: str, where: str, shape: str) -> None:
    event, context = {
        "event": (nasty, {}),
        "key": ("x", {nasty: 1}),
        "value": ("x", {"value": nasty}),
    }[where]
    (line,) = lines_of(lambda logger: logger.info(event, **cast("dict[str, Any]", context)), format=shape)
    assert line.isprintable()


@limits(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(),
    st.dictionaries(
        st.text(), st.recursive(st.none() | st.booleans() | st.floats() | st.text() | st.binary(), st.lists)
    ),
)
def test_any_event_is_one_line_in_both_shapes(event: str, context: dict[str, Any]) -> None:
    assert Human(time=None)("info", event, context).isprintable()
    line = Json()("info", event, context)
    assert line.isprintable()
    assert json.loads(line, parse_constant=pytest.fail)["event"] == event  # NaN and Infinity are not JSON


def test_values_that_cannot_be_printed_cost_nothing_else() -> None:
    class Broken:
        def __str__(self) -> str:
            raise RuntimeError("no")

    itself: list[Any] = []
    itself.append(itself)
    for shape in ("human", "json"):
        (line,) = lines_of(lambda logger: logger.info("x", a=Broken(), b=itself, c=2), format=shape)
        assert "a Broken that cannot be printed" in line


def test_an_exception_is_told_on_one_line() -> None:
    def fail(logger: Any) -> None:
        try:
            raise ExceptionGroup("two", [ValueError("no\nsuch verb"), OSError(1, "not permitted")])
        except ExceptionGroup:
            logger.exception("tunnel failed", tunnel="t1")

    (line,) = lines_of(fail)
    assert line.isprintable()
    assert line.count("ValueError: no\\nsuch verb") == 1
    assert "test_log.py:" in line
    (line,) = lines_of(fail, format="json")
    assert "Traceback" in json.loads(line)["exception"]
    assert json.loads(line)["level"] == "error"


def test_the_reason_of_an_exception_is_told_too() -> None:
    error = ValueError("outer")
    error.__cause__ = OSError("inner")
    assert brief(error) == "ValueError: outer (from OSError: inner)"


def test_what_is_bound_to_the_context_is_on_every_line() -> None:
    structlog.contextvars.bind_contextvars(connection="c9")
    (line,) = lines_of(lambda logger: logger.info("x"))
    assert line.endswith(" connection=c9")


def test_lines_below_the_level_are_not_written() -> None:
    def say(logger: Any) -> None:
        for level in ("debug", "info", "warning", "error"):
            getattr(logger, level)(level)

    assert len(lines_of(say, level="debug")) == 4
    assert len(lines_of(say, level="warning")) == 2


def test_a_logger_bound_long_ago_follows_a_reload() -> None:
    first, second = io.StringIO(), io.StringIO()
    log.configure(LogSettings(level="error"), first)
    logger = structlog.get_logger().bind(tunnel="t1")
    logger.info("unheard")
    log.configure(LogSettings(level="debug", format="json"), second)
    logger.debug("heard")
    assert first.getvalue() == ""
    assert json.loads(second.getvalue())["tunnel"] == "t1"


def test_libraries_speak_in_the_same_shape_from_warning_on() -> None:
    def say(_: Any) -> None:
        library = logging.getLogger("hypercorn.error")
        library.info("running")
        library.warning("bad %s\n", "request")
        library.warning("bad %d", "arguments")
        warnings.warn("old", stacklevel=1)

    logging.getLogger().handlers.clear()  # pytest's own would raise where ours must not
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        told = lines_of(say, level="debug", format="json")
    events = [json.loads(line)["event"] for line in told]
    assert events[:2] == ["bad request\n", "bad %d"]
    assert [json.loads(line)["logger"] for line in told] == ["hypercorn.error", "hypercorn.error", "py.warnings"]


def test_a_stream_that_is_closed_or_missing_is_survived() -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        log.configure(LogSettings(), stream)
        structlog.get_logger().info("x")
    assert Sink(None).put("x")


def test_a_reader_that_left_and_a_full_disk_are_survived() -> None:
    with pipe() as (reader, writer):
        reader.close()
        assert not Sink(writer).put("x")
    with Path("/dev/full").open("w") as full:
        assert not Sink(full).put("x")


def test_a_descriptor_that_is_gone_is_survived() -> None:
    with pipe() as (_, writer):
        sink = Sink(writer)
        with Path(os.devnull).open() as unwritable:
            os.dup2(unwritable.fileno(), writer.fileno())
        assert not sink.put("x")


def test_a_reader_that_sleeps_costs_lines_and_is_told_how_many() -> None:
    """Without the poll before each write this test hangs."""
    with pipe() as (reader, writer):
        log.configure(LogSettings(format="json"), writer)
        logger = structlog.get_logger()
        sent = 400
        for number in range(sent):  # a pipe holds 64 KiB; this is 400 KiB
            logger.info("x", number=number, ballast="y" * 1000)
        held = os.read(reader.fileno(), 1 << 20)
        logger.info("awake")
        writer.close()
        told = (held + reader.read().encode()).decode().splitlines()
    whole = [json.loads(line) for line in told if line.endswith("}")]
    numbers = [line["number"] for line in whole if line["event"] == "x"]
    assert numbers == list(range(len(numbers)))
    (lost,) = [line["lines"] for line in whole if line["event"] == "log lines lost"]
    assert lost == sent - len(numbers) > 0
    assert whole[-1]["event"] == "awake"


def test_a_line_longer_than_a_pipe_takes_at_once_arrives_whole() -> None:
    with pipe() as (reader, writer):
        assert Sink(writer).put("y" * 50_000)
        writer.close()
        assert reader.read() == "y" * 50_000 + "\n"


def test_a_long_line_that_nobody_reads_is_cut_and_the_next_one_begins_anew() -> None:
    """Without the pieces of `PIPE_BUF` the first line would block for ever."""
    with pipe() as (reader, writer):
        sink = Sink(writer)
        assert not sink.put("y" * 200_000)
        assert set(os.read(reader.fileno(), 200_000)) == {ord("y")}
        assert sink.put("next")
        assert os.read(reader.fileno(), 200_000) == b"\nnext\n"


def test_a_terminal_gets_short_times_and_colours_unless_it_wants_none(monkeypatch: pytest.MonkeyPatch) -> None:
    leader, follower = open_terminal()
    with open(follower, "w") as terminal, open(leader, "rb", buffering=0) as screen:  # noqa: PTH123
        log.configure(LogSettings(), terminal)
        structlog.get_logger().warning("x")
        line = screen.read(1000).decode()
        assert re.fullmatch(r"\d\d:\d\d:\d\d \x1b\[33mwarning\x1b\[0m x\r\n", line)
        monkeypatch.setenv("NO_COLOR", "1")
        log.configure(LogSettings(), terminal)
        structlog.get_logger().warning("x")
        assert re.fullmatch(r"\d\d:\d\d:\d\d warning x\r\n", screen.read(1000).decode())


def test_the_journal_keeps_the_time_itself_and_learns_the_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    with pipe() as (reader, writer):
        status = os.fstat(writer.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        for shape in ("auto", "human"):
            log.configure(LogSettings.model_validate({"format": shape}), writer)
            structlog.get_logger().error("x", tunnel="t1")
        writer.close()
        automatic, human = reader.read().splitlines()
    assert automatic == "<3>error   x                        tunnel=t1"
    assert UTC_TIME.match(human)


def test_a_journal_that_we_do_not_write_to_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "1:2")  # as a child whose standard error was redirected inherits it
    with pipe() as (reader, writer):
        log.configure(LogSettings(), writer)
        structlog.get_logger().error("x")
        writer.close()
        assert UTC_TIME.match(reader.read())
