"""`tunnel` as a process, against a real relay: its output and exit statuses."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

import tunneld
from tests.agent.support import PATIENCE, RelayHere, echo, local_server, relay_here, unused_port
from tests.agent.test_expose import ask
from tests.support.system import find_program
from tunneld.cli.common import SHELLS
from tunneld.cli.tunnel import main, parser
from tunneld.errors import EndedError
from tunneld.net.endpoint import Endpoint

ROOT = Path(tunneld.__file__).parents[1]
COMMAND = [sys.executable, "-c", "import sys; from tunneld.cli.tunnel import main; sys.exit(main())"]
KEPT = {key: value for key, value in os.environ.items() if not key.startswith("TUNNEL")}


async def tunnel(*arguments: str, relay: str = "", stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run the command until it exits."""
    environment = KEPT | {"PYTHONPATH": str(ROOT), "TUNNEL_RELAY": relay}
    done = await trio.run_process(
        [*COMMAND, *arguments], env=environment, stdin=stdin, check=False, capture_stdout=True, capture_stderr=True
    )
    assert b"Traceback" not in done.stderr
    return done


@asynccontextmanager
async def running(
    relay: RelayHere, *arguments: str, stdin: int = subprocess.DEVNULL, wrapper: Sequence[str] = ()
) -> AsyncIterator[trio.Process]:
    """The command as a process with pipes, killed if it outlives the block. A `wrapper` is a command that begins a new
    session, and becomes the command that is appended to it.
    """
    process = await trio.lowlevel.open_process(
        [*wrapper, *COMMAND, *arguments],
        env=KEPT | {"PYTHONPATH": str(ROOT), "TUNNEL_RELAY": relay.where},
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=bool(wrapper),
    )
    try:
        yield process
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            for stream in (process.stdout, process.stderr):
                assert stream is not None
                await stream.aclose()


class Reader:
    """A stream, line by line."""

    def __init__(self, stream: trio.abc.ReceiveStream | None) -> None:
        assert stream is not None
        self._stream = stream
        self._held = b""

    async def line(self) -> str:
        while b"\n" not in self._held:
            more = await self._stream.receive_some()
            assert more, f"the process ended its output after {self._held!r}"
            self._held += more
        line, _, self._held = self._held.partition(b"\n")
        return line.decode()


async def test_without_a_reader_of_its_address_the_agent_keeps_serving_and_says_so_once() -> None:
    with trio.fail_after(PATIENCE):
        async with AsyncExitStack() as stack:
            relay = await stack.enter_async_context(relay_here())
            target = await stack.enter_async_context(local_server(echo))
            async with running(relay, "expose", str(target.port), "--quiet") as process:
                address = Endpoint.parse(await Reader(process.stdout).line())
                assert process.stdout is not None
                await process.stdout.aclose()
                errors = Reader(process.stderr)
                for round_number in range(2):
                    relay.tunnel.close("a mishap")
                    assert "reconnecting" in await errors.line()
                    while not list(relay.service.tunnels()) or not relay.tunnel.parked:
                        await trio.lowlevel.checkpoint()
                    assert await ask(address, b"still here") == b"still here"
                    if round_number == 0:
                        assert await errors.line() == (
                            "could not write to standard output: broken pipe; the agent keeps serving, and prints no "
                            "more addresses there"
                        )
                process.terminate()
                assert await process.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_closes_the_tunnel_and_the_exit_status_is_0(number: signal.Signals) -> None:
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            local_server(echo) as target,
            running(relay, "expose", str(target), "--http") as process,
        ):
            url = await Reader(process.stdout).line()
            assert url == f"http://{relay.tunnel.client_uri.authority}/"
            assert await ask(relay.tunnel.client_uri, b"hello") == b"hello"
            process.send_signal(number)
            assert await process.wait() == 0
            assert list(relay.service.tunnels()) == []


async def test_events_are_lines_on_standard_error() -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, running(relay, "expose", str(port := unused_port())) as process:
            uri = Endpoint.parse(await Reader(process.stdout).line())
            with socket.create_connection((uri.host, uri.port)) as visitor:  # blocking: it may be reset at once
                me = f"127.0.0.1:{visitor.getsockname()[1]}"
            errors = Reader(process.stderr)
            assert f" nothing listens on 127.0.0.1:{port}" in await errors.line()
            assert await errors.line() == f"visitor {me}"
            refused = f"could not connect to 127.0.0.1:{port}: connection refused"
            assert (await errors.line()).endswith(f" visitor {me}: {refused}")


@pytest.mark.parametrize(
    ("flag", "line"), [([], "closed: {}; 0 visitors served, 0 B up, 0 B down"), (["--quiet"], "tunnel: {}")]
)
async def test_there_is_one_closing_message(flag: list[str], line: str) -> None:
    async with AsyncExitStack() as stack:
        stack.enter_context(trio.fail_after(PATIENCE))
        relay = await stack.enter_async_context(relay_here())
        target = await stack.enter_async_context(local_server(echo))
        process = await stack.enter_async_context(running(relay, "expose", str(target), *flag))
        await Reader(process.stdout).line()
        tunnel_id = relay.tunnel.id
        await relay.service.close(tunnel_id)
        errors = Reader(process.stderr)
        while (said := await errors.line())[0].isdigit():  # about lost connections, with the time
            pass
        assert said == line.format(f"tunnel {tunnel_id} was closed by request")
        assert await process.wait() == EndedError.exit_status
        assert process.stderr is not None
        assert await process.stderr.receive_some() == b""


async def test_json_lines_parse() -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target:
            async with running(relay, "expose", str(target), "--json", "--name", "blog") as process:
                lines = Reader(process.stdout)
                opened = json.loads(await lines.line())
                assert await ask(Endpoint.parse(opened["address"]), b"hello") == b"hello"
                events = [opened, json.loads(await lines.line()), json.loads(await lines.line())]
                process.terminate()
                events.append(json.loads(await lines.line()))
            assert [event["event"] for event in events] == ["opened", "visitor", "left", "closed"]
            assert (events[2]["up"], events[2]["down"]) == (5, 5)


async def test_a_closed_standard_output_ends_the_agent_and_its_tunnel() -> None:
    with trio.fail_after(PATIENCE):
        async with (
            relay_here() as relay,
            local_server(echo) as target,
            running(relay, "expose", str(target), "--json") as process,
        ):
            opened = json.loads(await Reader(process.stdout).line())
            assert process.stdout is not None
            await process.stdout.aclose()
            await ask(Endpoint.parse(opened["address"]), b"hello")
            assert await process.wait() == 141
            assert list(relay.service.tunnels()) == []


async def test_the_control_verbs() -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay:
            opened = await tunnel("open", "tcp", "persist=yes", "name=blog", relay=relay.where)
            server = str(relay.tunnel.server_uri)
            assert (opened.returncode, opened.stdout.decode()) == (0, server + "\n")
            address = await tunnel("address", server, relay=relay.where)
            assert address.stdout.decode() == f"{relay.tunnel.client_uri}\n"
            fields = (await tunnel("list", relay=relay.where)).stdout.decode().split("\t")
            assert fields[:6] == ["t1", "blog", "tcp", "waiting", str(relay.tunnel.client_uri), server]
            shown = json.loads((await tunnel("show", "t1", "--json", relay=relay.where)).stdout)
            assert (shown["id"], shown["persist"], shown["served"]) == ("t1", True, 0)
            closed = await tunnel("close", "t1", relay=relay.where)
            assert closed.stdout == b"closed t1\n"
            assert (await tunnel("list", relay=relay.where)).stdout == b""


async def test_watch_prints_events_as_they_come() -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, running(relay, "watch", "--json") as process:
            lines = Reader(process.stdout)
            assert json.loads(await lines.line()) == {"event": "watching", "id": "all"}
            await tunnel("open", relay=relay.where)
            assert json.loads(await lines.line())["event"] == "opened"
            process.send_signal(signal.SIGINT)
            assert await process.wait() == -signal.SIGINT


@pytest.mark.skipif(sys.platform != "linux", reason="reads the signal masks in /proc")
async def test_verbs_leave_ctrl_c_to_the_kernel_so_that_it_cannot_be_lost() -> None:
    """Python discards a KeyboardInterrupt that is raised in a destructor."""
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, running(relay, "watch", "--json") as process:
            await Reader(process.stdout).line()
            assert signal.SIGINT not in caught(process.pid)


def caught(pid: int) -> set[signal.Signals]:
    """The signals that a process handles or ignores."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    mask = int(status["SigCgt"], 16) | int(status["SigIgn"], 16)
    return {number for number in signal.Signals if mask & 1 << number - 1}


async def test_a_signal_that_is_ignored_at_the_start_stays_ignored() -> None:
    """Background jobs of a shell script are started with SIGINT ignored."""
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, AsyncExitStack() as stack:
            former = signal.signal(signal.SIGINT, signal.SIG_IGN)
            stack.callback(signal.signal, signal.SIGINT, former)
            process = await stack.enter_async_context(running(relay, "watch", "--json"))
            lines = Reader(process.stdout)
            await lines.line()
            process.send_signal(signal.SIGINT)
            await tunnel("open", relay=relay.where)
            assert json.loads(await lines.line())["event"] == "opened"


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["show", "t9"], 69, "no open tunnel"),
        (["open", "nonsense"], 64, "unrecognized backend"),
        (["open", "tll=5"], 64, "unrecognized option"),
        (["open", "a", "b"], 64, "more than one backend given"),
        (["expose", "nowhere"], 64, "invalid local server 'nowhere': expected PORT, HOST:PORT or unix:PATH"),
        (["expose", "http://localhost:80"], 64, "invalid local server 'http://localhost:80'"),
        (["expose", "80", "--prot", "1"], 64, "unrecognized arguments: --prot 1; did you mean --port?\n"),
        (["list", "--relay", "https://relay.example.org"], 64, "invalid relay address 'https://relay.example.org'"),
        (["expose", "80", "--pool", "9", "--max-pool", "8"], 64, "--pool 9 is more than --max-pool 8"),
        (["expose", "80", "--port", "x"], 64, "not a port between 1 and 65535"),
        (["expose", "80", "--name", "a b"], 64, "not a name"),
        (["list", "--ca", "/nowhere/ca.pem"], 78, "could not read ca /nowhere/ca.pem"),
        (["list", "--timeout", "-1"], 64, "not a number of seconds"),
        (["list", "--relay", "tcp://127.0.0.1:1"], 69, "127.0.0.1:1"),
        (["list", "--relay", "no.such.host.invalid:7010"], 69, "no.such.host.invalid"),
        (["nonsense"], 64, "invalid choice"),
        (["exposse", "80"], 64, "; did you mean expose?\n"),
        ([], 64, "required"),
    ],
)
async def test_a_user_error_gives_a_message_and_an_exit_status(arguments: list[str], status: int, says: str) -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay:
            done = await tunnel(*arguments, relay=relay.where)
    assert (done.returncode, done.stdout) == (status, b"")
    assert says in done.stderr.decode()


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", shell])
    assert ended.value.code == 0
    assert "expose" in capsys.readouterr().out


COMPLETE = {
    "bash": ". ./script; COMP_WORDS=(tunnel show ''); COMP_CWORD=2; _shtab_tunnel; printf '%s\\n' \"${COMPREPLY[@]}\"",
    "fish": "source ./script; complete -C 'tunnel show '",
}
"""Programs of shells that print the completions of the argument of `tunnel show`."""


@pytest.mark.parametrize("shell", COMPLETE)
def test_a_shell_completes_tunnels_and_executes_nothing_of_them(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--print-completion", shell])
    (tmp_path / "script").write_text(capsys.readouterr().out)
    fake = tmp_path / "tunnel"
    fake.write_text("#!/bin/sh\nprintf 't1\\tblog\\twebmux\\nt2\\t$(touch${IFS}evil)\\twebmux\\n'\n")
    fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    command = [find_program(shell), "-c", COMPLETE[shell]]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert {"t1", "blog", "t2"} <= {line.split("\t")[0] for line in done.stdout.splitlines()}
    assert not (tmp_path / "evil").exists()


def test_the_environment_gives_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNNEL_RELAY", "tls://relay.example.org:1")
    monkeypatch.setenv("TUNNEL_CA", "ca.pem")
    options = parser().parse_args(["list", "--key", "key.pem"])
    assert (options.relay, options.ca, options.cert, options.key) == (
        "tls://relay.example.org:1",
        "ca.pem",
        None,
        "key.pem",
    )
