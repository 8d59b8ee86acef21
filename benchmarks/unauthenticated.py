"""What peers without a credential can do to a relay: `unshare --net python -m benchmarks.unauthenticated` as root.

It gives the loopback device addresses of 10.9.0.0/24, since loopback's own addresses have no penalties, starts a relay
with TLS on one of them, and attacks it from the others. One line per attack.
"""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random
from socket import SHUT_WR, create_connection

from asyncssh.packet import String

from tests.backends.ssh.test_hostile import VERSION, kexinit, plain
from tests.support.credentials import SECRET
from tests.support.pki import Pki
from tunneld.net.endpoint import Endpoint
from tunneld.wire.verifier import MIN_ITERATIONS, derive

RELAY = "10.9.0.1"
CONTROL, HTTP, SSH = 7010, 7011, 7022
NEWCOMER = "10.9.0.99"
OCCUPANTS = [f"10.9.0.{number}" for number in range(11, 19)]
PER_SOURCE = 16
"""`max_startups_per_source`; with 8 sources, `max_startups` is full."""
KEY_EXCHANGES = "10.9.0.97"
GARBAGE = "10.9.0.96"
SECONDS = 6.0
HOST_KEY_REPLY = b"\x1f" + String(b"")[:2]
"""The type of the last message of a key exchange, and the first bytes of its length."""

SCRIPT = f"""
import ssl, sys, trio; from tunneld import client
tls = ssl.create_default_context(); tls.check_hostname = False; tls.verify_mode = ssl.CERT_NONE
async def main(name, secret):
    async with client.connect('tls://{RELAY}:{CONTROL}', tls=tls, credential=(name, secret)) as relay:
        print(await relay.open_tunnel('tcp', secure='key', server_from='any'))
trio.run(main, *sys.argv[1:])
"""
"""Logs in with the name and secret in its arguments, opens a tunnel with a key, and prints its server URI."""

CLIENT = ssl.create_default_context()
CLIENT.check_hostname = False
CLIENT.verify_mode = ssl.CERT_NONE


def dial(source: str, port: int) -> ssl.SSLSocket:
    """Connect from an address, with TLS."""
    return CLIENT.wrap_socket(create_connection((RELAY, port), 5, (source, 0)))


def keep_alive() -> str:
    """Hold every place with idle connections that probe now and then; how many newcomers are served after 15 s."""
    held: list[ssl.SSLSocket] = []
    for source in OCCUPANTS * PER_SOURCE * 4:  # at random, some are refused
        if len(held) < len(OCCUPANTS) * PER_SOURCE:
            with suppress(OSError):
                held.append(dial(source, HTTP))
    for _ in range(3):
        for connection in held:
            with suppress(OSError):
                connection.sendall(f"GET /healthz HTTP/1.1\r\nhost: {RELAY}\r\n\r\n".encode())
                connection.recv(4096)
        time.sleep(5)
    served = sum(greeting(NEWCOMER).startswith("OK") for _ in range(20))
    for connection in held:
        connection.close()
    return f"{served} of 20 newcomers served"


def greeting(source: str) -> str:
    """The first line of the control port; empty if the connection is refused."""
    try:
        with dial(source, CONTROL) as connection:
            return connection.recv(200).decode()
    except OSError:
        return ""


def wrong_secret() -> str:
    """One device fails six logins; whether its neighbour at the same address is served."""
    for _ in range(6):
        subprocess.run([sys.executable, "-c", SCRIPT, "bad", "a wrong secret"], capture_output=True, check=False)
    done = subprocess.run([sys.executable, "-c", SCRIPT, "c0", SECRET], capture_output=True, check=False)
    return "neighbour served" if done.stdout else "neighbour refused: " + done.stderr.decode().strip().splitlines()[-1]


def abandoned_key_exchanges(pid: int) -> str:
    """Leave after the key exchange as often as possible for 6 s; what that costs the relay."""
    opening = VERSION + plain(kexinit(Random(0))) + plain(b"\x1e" + String(b"\x09" + bytes(31)))
    before, ends, answered = processor_time(pid), time.monotonic() + SECONDS, 0
    while time.monotonic() < ends:
        with create_connection((RELAY, SSH), 5, (KEY_EXCHANGES, 0)) as connection:
            connection.settimeout(5)
            with suppress(OSError):
                connection.sendall(opening)
                received = b""
                while HOST_KEY_REPLY not in received and (more := connection.recv(4096)):
                    received += more
                answered += HOST_KEY_REPLY in received
    return f"{answered} answered in {SECONDS:.0f} s, {processor_time(pid) - before:.1f} s of processor time"


def half_keys(log: Path) -> str:
    """Leave in the middle of the key of a tcp tunnel for 6 s; lines in the log, also per second."""
    uri = subprocess.run([sys.executable, "-c", SCRIPT, "c0", SECRET], capture_output=True, check=True).stdout.decode()
    port = Endpoint.parse(uri.strip()).port
    before, ends = len(log.read_text().splitlines()), time.monotonic() + SECONDS
    while time.monotonic() < ends:
        with create_connection((RELAY, port), 5, (GARBAGE, 0)) as connection, suppress(OSError):
            connection.sendall(b"half a key")
            connection.shutdown(SHUT_WR)
            connection.recv(100)
    lines = len(log.read_text().splitlines()) - before
    return f"{lines} lines in the log in {SECONDS:.0f} s"


def processor_time(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    """Print one line per attack."""
    for number in (1, *range(11, 19), 96, 97, 99):
        subprocess.run(["ip", "address", "add", f"10.9.0.{number}/32", "dev", "lo"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Pki.issue(folder)
        proof = derive(SECRET, b"salt", MIN_ITERATIONS).reveal()
        tls = 'certificate = "relay.pem"\nkey = "relay.key"\n'
        words = f'[control]\nhost = "{RELAY}"\n[control.tls]\n{tls}[tunnels]\nhost = "{RELAY}"\n'
        words += f'[http]\nhost = "{RELAY}"\n[http.tls]\n{tls}[ssh]\nenabled = true\nhost = "{RELAY}"\n'
        words += f'[daemon]\nstate = "state"\n[[credential]]\nname = "c0"\nverifier = "{proof}"\n'
        (folder / "tunnel.toml").write_text(words)
        log = folder / "log"
        command = [sys.executable, "-m", "tunneld", "--config", str(folder / "tunnel.toml")]
        with log.open("wb") as output, subprocess.Popen(command, stderr=output) as relay, ExitStack() as stack:
            stack.callback(relay.kill)
            while " ready " not in log.read_text():
                time.sleep(0.1)
            print("keep-alive:               ", keep_alive(), flush=True)
            print("a neighbour's wrong secret:", wrong_secret(), flush=True)
            print("abandoned key exchanges:  ", abandoned_key_exchanges(relay.pid), flush=True)
            print("half keys:                ", half_keys(log), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
