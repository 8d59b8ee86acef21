"""A reader that stalls cannot stop the agent, and nothing is lost at the end."""

from __future__ import annotations

import os

import pytest
import trio

from tests.agent.support import PATIENCE
from tunneld.cli import writer
from tunneld.cli.common import OutputGoneError
from tunneld.cli.writer import Writer


async def test_a_writer_writes_everything_in_order_before_its_block_ends() -> None:
    receive, send = os.pipe()
    with trio.fail_after(PATIENCE):
        async with Writer(send, vital=True).open() as written:
            for number in range(1000):
                written.put(f"{number}\n")
    os.close(send)
    with os.fdopen(receive) as lines:
        assert [int(line) for line in lines] == list(range(1000))


async def test_a_writer_writes_what_an_error_leaves_in_its_queue() -> None:
    receive, send = os.pipe()
    with trio.fail_after(PATIENCE), pytest.RaisesGroup(ValueError):
        async with Writer(send, vital=True).open() as written:
            written.put("why it ended\n")
            raise ValueError
    os.close(send)
    with os.fdopen(receive) as lines:
        assert lines.read() == "why it ended\n"


async def test_a_stalled_reader_does_not_block_the_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "FINAL_WRITE_TIMEOUT", 0.01)
    receive, send = os.pipe()
    with trio.fail_after(PATIENCE):
        async with Writer(send, vital=True).open() as written:
            for _ in range(3 * writer.MAX_QUEUED_LINES):
                written.put("x" * 99 + "\n")
            await trio.lowlevel.checkpoint()
            assert written.queued <= writer.MAX_QUEUED_LINES
    os.close(receive)  # the thread that still writes ends by it
    os.close(send)


async def test_a_closed_reader_ends_only_a_vital_writer() -> None:
    receive, send = os.pipe()
    os.close(receive)
    with trio.fail_after(PATIENCE):
        failures: list[str] = []
        async with Writer(send, vital=False, on_failure=failures.append).open() as written:
            written.put("line\n")
            while not failures:
                await trio.lowlevel.checkpoint()
            written.put("another line\n")
        assert failures == ["could not write to standard output: broken pipe"]
        with pytest.RaisesGroup(OutputGoneError):
            async with Writer(send, vital=True).open() as written:
                written.put("line\n")
                await trio.sleep_forever()
    os.close(send)
