"""A daemon that is killed at any moment keeps every reservation that it acknowledged."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
import trio

from tests.support.peers import PATIENCE
from tests.support.programs import daemon

TUNNELS = 150


async def names_of(folder: Path) -> set[str]:
    """The names of the reservations that a new daemon reads."""
    async with daemon(folder) as relay:
        said = await relay.ask("reservations")
        assert str(folder / "state" / "reservations.db") in await relay.ask("status")
    return {word.removeprefix("name=") for word in said.split() if word.startswith("name=")}


@pytest.mark.parametrize("seed", range(4))
async def test_acknowledged_reservations_survive_kill_9(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    requests = "".join(f"openTunnel tcp name=n{number}\n" for number in range(TUNNELS))
    with trio.fail_after(4 * PATIENCE):
        async with daemon(tmp_path) as relay:
            stream = await trio.open_tcp_stream("127.0.0.1", relay.control_port)
            async with stream:
                await stream.send_all(requests.encode())
                enough, said = dice.randrange(1, TUNNELS), b""
                while said.count(b"\n") <= enough:  # the greeting is one more
                    said += await stream.receive_some(dice.randrange(1, 200))
                relay.process.send_signal(signal.SIGKILL)
                try:
                    async for chunk in stream:
                        said += chunk
                except trio.BrokenResourceError:
                    pass
            await relay.process.wait()
        acknowledged = said.count(b"OK tcp://")
        assert acknowledged >= enough
        assert {f"n{number}" for number in range(acknowledged)} <= await names_of(tmp_path)
