"""`tunnel up` as a process: its file, its signals, its output and its exit status."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import trio

from tests.agent.support import PATIENCE, RelayHere, echo, local_server, relay_here
from tests.agent.test_expose import ask
from tests.cli.test_tunnel import Reader, running, tunnel
from tests.support.peers import connect, read_exactly
from tunneld.agent.access import RelayAccess
from tunneld.cli import up
from tunneld.errors import UsageError
from tunneld.net.endpoint import Endpoint
from tunneld.tunnel.tunnel import Tunnel


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "expose.toml"


def edit(file: Path, text: str) -> None:
    file.write_text(text)


def tunnels(relay: RelayHere) -> dict[str, Tunnel]:
    return {tunnel.spec.options.name: tunnel for tunnel in relay.service.tunnels()}


async def test_each_address_is_a_line_with_its_name(file: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target:
            edit(file, f"[expose.a]\ntarget = {target.port}\nscheme = 'http'\n[expose.b]\ntarget = {target.port}")
            async with running(relay, "up", "--file", str(file)) as process:
                lines = Reader(process.stdout)
                told = dict([(await lines.line()).split("\t"), (await lines.line()).split("\t")])
                opened = tunnels(relay)
                assert told == {
                    "a": f"http://{opened['a'].client_uri.authority}/",
                    "b": str(opened["b"].client_uri),
                }
                process.terminate()
                assert await process.wait() == 0
                assert tunnels(relay) == {}


async def test_sighup_reads_the_file_again_and_an_error_in_it_changes_nothing(file: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target:
            both = "[expose.a]\ntarget = {0}\n[expose.{1}]\ntarget = {0}\n"
            edit(file, both.format(target.port, "b"))
            async with running(relay, "up", "--file", str(file), "--json") as process:
                lines, errors = Reader(process.stdout), Reader(process.stderr)
                opened = [json.loads(await lines.line()), json.loads(await lines.line())]
                assert {event["exposure"] for event in opened} == {"a", "b"}
                before = tunnels(relay)["a"].id

                edit(file, "[expose.a]\ntraget = 1")
                process.send_signal(signal.SIGHUP)
                assert await errors.line() == f"{file}: expose.a.target: missing, and it has no default"
                assert await errors.line() == f"{file}: expose.a.traget: unrecognized key; did you mean target?"
                assert await errors.line() == f"{file}: not reloaded, nothing was changed"
                assert set(tunnels(relay)) == {"a", "b"}

                edit(file, both.format(target.port, "c"))
                process.send_signal(signal.SIGHUP)
                assert await errors.line() == f"{file}: reloaded: opened c; closed b"
                events = [json.loads(await lines.line()), json.loads(await lines.line())]
                assert {(event["exposure"], event["event"]) for event in events} == {("b", "closed"), ("c", "opened")}
                assert set(tunnels(relay)) == {"a", "c"}
                assert tunnels(relay)["a"].id == before
                (address,) = (event["address"] for event in opened if event["exposure"] == "a")
                assert await ask(Endpoint.parse(address), b"hello") == b"hello"


TAKE_TERMINAL = (
    "import fcntl, os, signal, sys, termios; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)
"""A program that makes its standard input the controlling terminal, and becomes another program, which does not ignore
SIGHUP even where the tests run under nohup.
"""


async def test_an_agent_whose_terminal_is_closed_ends_although_its_output_goes_elsewhere(file: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target:
            edit(file, f"[expose.a]\ntarget = {target.port}")
            terminal, stdin = os.openpty()
            async with running(
                relay, "up", "--file", str(file), stdin=stdin, wrapper=[sys.executable, "-c", TAKE_TERMINAL]
            ) as process:
                os.close(stdin)
                await Reader(process.stdout).line()
                process.send_signal(signal.SIGHUP)
                assert (await Reader(process.stderr).line()).endswith("reloaded: nothing changed")
                os.close(terminal)
                assert await process.wait() == 0
                assert tunnels(relay) == {}


async def test_sighup_cuts_no_visitors_and_the_new_server_keeps_the_address(file: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as old, local_server(echo) as new:
            edit(file, f"[expose.a]\ntarget = {old.port}\n")
            async with running(relay, "up", "--file", str(file), "--json") as process:
                lines = Reader(process.stdout)
                opened = json.loads(await lines.line())
                address = Endpoint.parse(opened["address"])
                visitor = await connect(address)
                await visitor.send_all(b"before")
                assert await read_exactly(visitor, 6) == b"before"
                assert json.loads(await lines.line())["event"] == "visitor"

                edit(file, f"[expose.a]\ntarget = {new.port}\n")
                process.send_signal(signal.SIGHUP)
                events = {event["event"]: event for event in [json.loads(await lines.line()) for _ in range(2)]}
                assert (events["draining"]["id"], events["draining"]["visitors"]) == (opened["id"], 1)
                assert (events["opened"]["address"], events["opened"]["id"]) == (opened["address"], "t2")
                assert await ask(address, b"hello") == b"hello"
                await visitor.send_all(b"after")
                assert await read_exactly(visitor, 5) == b"after"
                await visitor.aclose()
                while (event := json.loads(await lines.line()))["event"] != "closed":
                    pass
                assert (event["id"], event["reason"], event["served"]) == (opened["id"], "configuration changed", 1)


async def test_a_permanent_failure_sets_the_exit_status_and_the_other_exposures_continue(file: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay, local_server(echo) as target:
            edit(
                file, f"[expose.good]\ntarget = {target.port}\n[expose.bad]\ntarget = {target.port}\nbackend = 'webmux'"
            )
            async with running(relay, "up", "--file", str(file)) as process:
                said = await Reader(process.stderr).line()
                assert " bad: failed permanently: " in said
                name, address = (await Reader(process.stdout).line()).split("\t")
                assert name == "good"
                assert await ask(Endpoint.parse(address), b"hello") == b"hello"
                process.terminate()
                assert await process.wait() not in (0, 1)


async def test_only_the_named_exposures_are_served(file: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with relay_here() as relay:
            edit(file, "[expose.a]\ntarget = 1\n[expose.b]\ntarget = 1")
            async with running(relay, "up", "--file", str(file), "b") as process:
                assert (await Reader(process.stdout).line()).startswith("b\t")
                assert set(tunnels(relay)) == {"b"}
            unknown = await tunnel("up", "--file", str(file), "c")
            assert (unknown.returncode, unknown.stdout) == (64, b"")
            assert unknown.stderr.decode() == f"tunnel: {file} has no [expose.c]; it has a, b\n"


async def test_check_reports_errors_and_exposes_nothing(file: Path) -> None:
    edit(file, "[expose.a]\ntarget = 1")
    good = await tunnel("up", "--file", str(file), "--check")
    assert (good.returncode, good.stdout.decode()) == (0, f"{file}: ok\n")
    edit(file, "[relay]\nwhere = 'tcp://h:1'\ninsecure = true\n[expose.a]\ntarget = 1")
    wrong = await tunnel("up", "--file", str(file), "--check")
    assert (wrong.returncode, wrong.stderr.decode()) == (
        64,
        "tunnel: relay tcp://h:1 does not use TLS; relay.insecure requires tls://\n",
    )
    edit(file, "[expose.a]\ntarget = 1\nclient_port = 20000\n[expose.b]\ntarget = 1\nclient_port = 20000")
    twice = await tunnel("up", "--file", str(file), "--check")
    assert (twice.returncode, twice.stderr.decode()) == (
        78,
        f"{file}: expose.a and expose.b have the same client_port, 20000: change one of them\n",
    )
    assert (await tunnel("up", "b", "--file", str(file), "--check")).returncode == 0, "only one of them is served"
    missing = await tunnel("up", "--file", f"{file}.nowhere", "--check")
    assert (missing.returncode, missing.stderr.count(b"\n")) == (78, 1)


def test_the_default_file_is_in_the_configuration_folder_of_the_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert up.default_file() == tmp_path / "tunneld/expose.toml"


# The way to the relay


@pytest.fixture
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CREDENTIAL", "SECRET", "SECRET_FILE", "PIN", "RELAY", "CA", "CERT", "KEY"):
        monkeypatch.delenv(f"TUNNEL_{name}", raising=False)


@pytest.mark.usefixtures("_nothing_set")
def test_the_relay_configuration_is_the_same_object_until_it_changes(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("one secret")
    secret.chmod(0o600)
    table = {"where": "tls://h:1", "credential": "alice", "secret_file": secret}
    first = up.relay_config(table, None)
    assert up.relay_config(dict(table), first) is first
    secret.write_text("another secret")
    second = up.relay_config(table, first)
    assert second.access.credential == ("alice", "another secret")
    third = up.relay_config({"where": "tls://i:1", "credential": "alice", "secret_file": secret}, second)
    assert third.access.where == "tls://i:1"


@pytest.mark.usefixtures("_nothing_set")
def test_a_reload_does_not_prompt_for_a_secret() -> None:
    table = {"where": "127.0.0.1:1", "credential": "alice"}
    first = up.RelayConfig(RelayAccess("127.0.0.1:1", credential=("alice", "typed")), table, ())
    assert up.relay_config(table, first) is first
    with pytest.raises(UsageError, match="no secret for the credential 'bob'"):
        up.relay_config({"credential": "bob"}, first)


@pytest.mark.usefixtures("_nothing_set")
def test_relay_keys_that_are_not_set_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNNEL_RELAY", "relay.example.org:7010")
    assert up.relay_config({}, None).access.where == "relay.example.org:7010"
    assert up.relay_config({"where": "h:1"}, None).access.where == "h:1"
