"""`python -m benchmarks.inspector`: what `tunnel expose --inspect` costs the agent.

Sixteen visitors with connections that stay open send small requests, each after the answer to the one before, through a
relay on this machine. Samples with and without the inspector take turns. The numbers:

    CPU          microseconds of the agent's processor time for one request; they count on a busy machine
    requests/s   of all visitors together
    median       milliseconds of a lone request
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import trio

from benchmarks.exposures import processor_time
from benchmarks.processes import LOOPBACK, Crew, free_port, orphans_ended
from benchmarks.topologies import TUNNEL, TUNNELD
from tunneld.net.endpoint import Endpoint

VISITORS, REQUESTS, ROUNDS, LONE = 16, 1000, 3, 500
REQUEST = (
    b"GET /items?page=2 HTTP/1.1\r\nHost: blog.example.org\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64)\r\n"
    b"Accept: text/html,application/xhtml+xml\r\nAccept-Language: en\r\nAccept-Encoding: gzip, br\r\n"
    b"Cookie: session=0123456789abcdef\r\n\r\n"
)
RESPONSE = b"HTTP/1.1 200 OK\r\nServer: x\r\nContent-Type: text/plain\r\nContent-Length: 1000\r\n\r\n" + bytes(1000)
SERVER = """
import asyncio, sys
class Server(asyncio.Protocol):
    def connection_made(self, transport): self.transport = transport
    def data_received(self, data): self.transport.write(bytes.fromhex(sys.argv[2]))
async def main():
    async with await asyncio.get_running_loop().create_server(Server, "127.0.0.1", int(sys.argv[1])) as server:
        await server.serve_forever()
asyncio.run(main())
"""
RELAY_TOML = "[control]\nport = {control}\n[http]\nenabled = false\n[webmux]\nport = {carriers}\n"


async def visit(address: tuple[str, int], count: int) -> list[float]:
    """Send so many requests; returns the seconds of each."""
    times = []
    async with await trio.open_tcp_stream(*address) as stream:
        for _ in range(count):
            began, left = time.perf_counter(), len(RESPONSE)
            await stream.send_all(REQUEST)
            while left:
                left -= len(await stream.receive_some(left))
            times.append(time.perf_counter() - began)
    return times


async def sample(address: tuple[str, int], agent: int) -> tuple[float, float, float]:
    """CPU, requests/s and median of one agent, whose process this is."""
    await visit(address, 100)
    lone = statistics.median(await visit(address, LONE))
    before, began = processor_time(agent), time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(VISITORS):
            nursery.start_soon(visit, address, REQUESTS)
    took = time.perf_counter() - began
    await trio.sleep(0.5)  # the inspector is behind
    count = VISITORS * REQUESTS
    return 1e6 * (processor_time(agent) - before) / count, count / took, 1e3 * lone


def start_agent(crew: Crew, name: str, target: int, control: int, options: list[str]) -> tuple[tuple[str, int], int]:
    """Start an agent; returns the public address and the process."""
    command: list[str | Path] = [sys.executable, "-P", "-c", TUNNEL, "expose", str(target), "--json"]
    agent = crew.start(name, [*command, "--relay", f"{LOOPBACK}:{control}", *options])
    address = agent.line(lambda line: json.loads(line).get("address"))
    endpoint = Endpoint.parse(address)
    return (endpoint.host, endpoint.port), agent.process.pid


def main() -> None:
    """Print the numbers."""
    with orphans_ended(), Crew() as crew:
        target, control, carriers = free_port(), free_port(), free_port()
        crew.start("server", [sys.executable, "-c", SERVER, str(target), RESPONSE.hex()]).listening(target)
        config = crew.file("tunnel.toml", RELAY_TOML.format(control=control, carriers=carriers))
        crew.start("relay", [sys.executable, "-P", "-c", TUNNELD, "--config", config]).listening(control)
        agents = {
            "without": start_agent(crew, "without", target, control, []),
            "--inspect": start_agent(crew, "inspect", target, control, ["--inspect", "127.0.0.1:0"]),
        }
        samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in agents}
        for _ in range(ROUNDS):
            for name, agent in agents.items():
                samples[name].append(trio.run(sample, *agent))
    sys.stdout.write("| | CPU, µs | requests/s | median, ms |\n| --- | --: | --: | --: |\n")
    for name, found in samples.items():
        cpu, rate, median = (statistics.median(column) for column in zip(*found, strict=True))
        sys.stdout.write(f"| {name} | {cpu:.0f} | {rate:.0f} | {median:.3f} |\n")


if __name__ == "__main__":
    main()
