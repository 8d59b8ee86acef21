"""The cost of attacks for a relay: `python -m benchmarks.siege` from the checkout prints one table in some minutes.

Everything runs on loopback: the relay with its default limits, a bystander with a tunnel that is always busy, and the
attackers in this process, which compete with the bystander for the processors. For attacks on TLS, all ports of the
relay use it, and the operator that calls `list` is already connected: among so many unauthenticated connections, a new
one would be refused at random, as intended.

Below the table: how long the relay takes to refuse an unknown name, and a wrong secret of a known one. A client must
not be able to tell them apart; see `tell_apart`.
"""

from __future__ import annotations

import argparse
import base64
import random
import resource
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from tests.support.attacked_relay import KIB, MIB, AttackedRelay, attacked_relay
from tests.support.attacks import crowd, flood, send_endlessly, send_in_tls
from tests.support.hidden_servers import connect_hidden
from tests.support.peers import close_connections
from tests.support.pki import Pki
from tunneld.wire.scram import decode, encode

LIMIT = 60.0
"""Seconds for one attack, without the start of the relay."""

WATCHING = 2.0
"""Seconds for which attacking connections stay open."""

MEASURE_INTERVAL = 0.1
"""Seconds between two measurements."""

AT_ONCE = 200
"""Visitors, and then as many server connections for them: fewer than `max_waiting`."""


@dataclass
class Cost:
    """One row: the highest values measured during an attack."""

    resident: int = 0
    descriptors: int = 0
    latency: float = 0.0

    async def measure(self, target: AttackedRelay) -> None:
        """Call `list`, measure, and keep the maxima."""
        self.latency = max(self.latency, await target.check_answers())
        self.resident = max(self.resident, target.resident)
        self.descriptors = max(self.descriptors, target.relay.descriptors)


async def no_attack(_siege: AttackedRelay, _scale: int) -> None:
    """Do nothing, for comparison."""
    await trio.sleep(WATCHING)


async def never_readers(target: AttackedRelay, scale: int) -> None:
    """Connect visitors that never read what the hidden server sends: two descriptors each, in relay and attacker."""
    room = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 - 500
    async with target.ports() as ports, AsyncExitStack() as stack:
        for _ in range(min(10_000 // scale, room) // AT_ONCE):
            await stack.enter_async_context(crowd(ports["client"], AT_ONCE))
            await stack.enter_async_context(crowd(ports["server"], AT_ONCE, bytes(64 * KIB)))
        await trio.sleep(WATCHING)


async def short_connections(target: AttackedRelay, scale: int) -> None:
    """Connect to the control port and disconnect."""
    await flood(target.control, 100_000 // scale)


async def slow_loris(target: AttackedRelay, _scale: int) -> None:
    """Use all connections of the control port except one for the operator, and send half a request."""
    async with crowd(target.control, 250, b"lis"):
        await trio.sleep(WATCHING)


async def silent_handshakes(target: AttackedRelay, _scale: int) -> None:
    """Open far more connections than permitted to every port with TLS; send nothing, or half a ClientHello."""
    async with target.ports() as ports, AsyncExitStack() as stack:
        for name in ("control", "http", "webmux", "server"):
            await stack.enter_async_context(crowd(ports[name], 250))
            await stack.enter_async_context(crowd(ports[name], 250, HELLO))
        await trio.sleep(WATCHING)


async def broken_handshakes(target: AttackedRelay, scale: int) -> None:
    """Send half a ClientHello and disconnect: each costs the relay a TLS object and a task."""
    await flood(target.control, 10_000 // scale, HELLO)


async def wrong_keys(target: AttackedRelay, scale: int) -> None:
    """Complete a handshake, then send an unknown key."""
    async with target.ports() as ports:
        for _ in range(1000 // scale):
            await send_in_tls(ports["server"], PKI[0], b"0" * 32 + b"\n")


async def never_readers_in_tls(target: AttackedRelay, scale: int) -> None:
    """Connect hidden servers that send over TLS to visitors that never read."""
    async with target.ports() as ports, AsyncExitStack() as stack, trio.open_nursery() as nursery:
        for _ in range(5):
            await stack.enter_async_context(crowd(ports["client"], AT_ONCE // scale))
            for _ in range(AT_ONCE // scale):
                server = await connect_hidden(ports["server"], PKI[0])
                stack.push_async_callback(server.aclose)
                nursery.start_soon(insist, server)
        await trio.sleep(WATCHING)
        nursery.cancel_scope.cancel()


async def insist(stream: trio.SocketStream) -> None:
    """Send, and ignore a broken connection."""
    with suppress(trio.BrokenResourceError):
        await stream.send_all(bytes(MIB))


async def wrong_secrets(target: AttackedRelay, scale: int) -> None:
    """Fail three logins on each connection. Loopback is exempt from penalties."""
    wrong = f"auth SCRAM-SHA-256 {encode(b'n,,n=root,r=x')}\nauth {encode(b'c=biws,r=x,p=AAAA')}\n" * 3
    await flood(target.control, 3000 // scale, wrong.encode())


async def endless_line(target: AttackedRelay, _scale: int) -> None:
    """Send a request line without end."""
    await send_endlessly(target.control, b"", b"a" * 64 * KIB, 1024 * MIB)


async def endless_body(target: AttackedRelay, _scale: int) -> None:
    """Send an XML body in chunks without end."""
    head = b"POST /RPC2 HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/xml\r\nTransfer-Encoding: chunked\r\n\r\n"
    await send_endlessly(target.http, head, b"10000\r\n" + b"<" * 0x10000 + b"\r\n", 1024 * MIB)


ATTACKS = [
    no_attack, never_readers, short_connections, slow_loris, wrong_secrets, endless_line, endless_body
]  # fmt: skip
IN_TLS = [no_attack, silent_handshakes, broken_handshakes, wrong_keys, never_readers_in_tls]
PKI: list[Pki] = []
HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
"""The beginning of a TLS handshake."""


async def measure(attack: Callable[[AttackedRelay, int], Awaitable[None]], scale: int, pki: Pki | None = None) -> str:
    """Run one attack on a new relay, and format its row."""
    cost = Cost()
    with tempfile.TemporaryDirectory() as folder:
        async with attacked_relay(Path(folder), pki) as target:
            if attack is wrong_secrets:
                await target.ask_for_secrets()
            before, resident, began = target.progress, target.resident, trio.current_time()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keep_measuring, target, cost)
                with trio.move_on_after(LIMIT) as limit:
                    await attack(target, scale)
                nursery.cancel_scope.cancel()
            took = trio.current_time() - began
            speed = (target.progress - before) / took / MIB
    close_connections()
    late = " (cut)" if limit.cancelled_caught else ""
    grown = (cost.resident - resident) / MIB
    name = attack.__name__.replace("_", " ") + (" (all in TLS)" if pki and attack is no_attack else "")
    return f"{name:22}{took:8.1f}{grown:10.1f}{cost.descriptors:12}{cost.latency * 1000:10.0f}{speed:12.0f}{late}"


async def keep_measuring(target: AttackedRelay, cost: Cost) -> None:
    """Measure until cancelled."""
    while True:
        await cost.measure(target)
        await trio.sleep(MEASURE_INTERVAL)


def main() -> int:
    """Print the table, each row when it is complete."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.siege", description="Measure the cost of attacks.")
    parser.add_argument("--quick", action="store_true", help="use a tenth of the attackers")
    scale = 10 if parser.parse_args().quick else 1
    print(f"{'':22}{'s':>8}{'RSS +MiB':>10}{'descriptors':>12}{'list, ms':>10}{'by, MiB/s':>12}")
    for attack in ATTACKS:
        print(f"... {attack.__name__}", file=sys.stderr)
        print(trio.run(measure, attack, scale), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        PKI.append(Pki.issue(Path(folder)))
        for attack in IN_TLS:
            print(f"... {attack.__name__} (TLS)", file=sys.stderr)
            print(trio.run(measure, attack, scale, PKI[0]), flush=True)
    print(trio.run(tell_apart, 2000 // scale))
    return 0


async def tell_apart(count: int) -> str:
    """Measure `count` refused logins of both kinds in turn on one relay. Formats the medians and their difference with
    its 95 % interval by bootstrap. If the interval includes 0, a client cannot tell them apart.
    """
    times: dict[str, list[float]] = {"root": [], "nobody": []}
    with tempfile.TemporaryDirectory() as folder:
        async with attacked_relay(Path(folder)) as target:
            await target.ask_for_secrets()
            for _ in range(count // 2):
                for name, taken in times.items():
                    taken.append(await refusal(target, name))
    close_connections()
    dice = random.Random(1)
    differences = sorted(
        statistics.median(dice.choices(times["root"], k=count // 2))
        - statistics.median(dice.choices(times["nobody"], k=count // 2))
        for _ in range(1000)
    )
    medians = {name: statistics.median(taken) * 1e6 for name, taken in times.items()}
    return (
        f"refused after: a wrong secret {medians['root']:.0f} us, an unknown name {medians['nobody']:.0f} us; "
        f"difference {medians['root'] - medians['nobody']:+.1f} us, 95 % between {differences[25] * 1e6:+.1f} and "
        f"{differences[974] * 1e6:+.1f} us, {count // 2} of each"
    )


async def refusal(target: AttackedRelay, name: str) -> float:
    """Return the seconds from the first message of a login to its refusal, on a new connection."""
    first = f"auth SCRAM-SHA-256 {encode(f'n,,n={name},r=abc'.encode(), padded=False)}\n".encode()
    async with await trio.open_tcp_stream(target.control.host, target.control.port) as stream:
        await line_of(stream)
        began = trio.current_time()
        await stream.send_all(first)
        nonce = decode((await line_of(stream)).removeprefix(b"OK ").decode()).split(b",")[0]
        final = b"c=biws," + nonce + b",p=" + base64.b64encode(bytes(32))
        await stream.send_all(f"auth {encode(final, padded=False)}\n".encode())
        answer = await line_of(stream)
        assert answer == b"ERR not-allowed authentication failed", answer
        return trio.current_time() - began


async def line_of(stream: trio.SocketStream) -> bytes:
    """Receive the next line."""
    line = b""
    while not line.endswith(b"\n"):
        line += await stream.receive_some()
    return line.strip()


if __name__ == "__main__":
    sys.exit(main())
