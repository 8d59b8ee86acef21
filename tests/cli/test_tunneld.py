"""`tunneld` as a process: its output and exit statuses."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import pytest

from tests.support.system import find_program
from tunneld import __version__
from tunneld.cli import common
from tunneld.cli.tunneld import FORMATS, LEVELS, parser
from tunneld.config import Settings, load
from tunneld.config.keys import keys
from tunneld.errors import ConfigError, ListenError, RefusedError, UsageError
from tunneld.net.endpoint import Endpoint
from tunneld.tls.self_signed import LIFE, make_self_signed

ROOT = Path(__file__).parents[2]
ON_ANY_PORT = '[control]\nport = 0\n[http]\nport = 0\n[tunnels]\nports = "0"\n[webmux]\nport = 0\n'

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a user without any configuration. What root stores goes into a folder of the test, too."""
    kept = {key: value for key, value in os.environ.items() if key in {"PATH", "LANG", "LC_ALL", "XDG_STATE_HOME"}}
    return kept | {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}


@pytest.fixture
def tunneld(tmp_path: Path, environment: dict[str, str]) -> Run:
    """Run the command in a folder of its own until it exits."""

    def run(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        here: dict[str, Any] = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "env": environment,
            "cwd": tmp_path,
        }
        done: subprocess.CompletedProcess[str] = subprocess.run(
            command(*arguments), text=True, timeout=60, check=False, **here | options
        )
        assert "Traceback" not in (done.stderr or "")
        return done

    return run


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "tunneld", *map(str, arguments)]


# Output


def test_version_and_help_go_to_standard_output(tunneld: Run) -> None:
    assert tunneld("--version").stdout == f"tunneld {__version__}\n"
    helped = tunneld("--help")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert "--print-config" in helped.stdout


def test_check_says_ok(tunneld: Run, tmp_path: Path) -> None:
    (tmp_path / "good.toml").write_text("control.port = 0")
    done = tunneld("--check", "--config", "good.toml")
    assert (done.returncode, done.stdout, done.stderr) == (0, "good.toml: ok\n", "")


def test_check_warns_of_files_of_the_group_and_of_expired_certificates(tunneld: Run, tmp_path: Path) -> None:
    made = make_self_signed("relay.example.org", datetime.now(UTC) - 2 * LIFE)
    (tmp_path / "relay.pem").write_bytes(made.certificate + made.key)
    config = tmp_path / "good.toml"
    config.write_text('control.tls = { certificate = "relay.pem", key = "relay.pem" }')
    config.chmod(0o664)
    done = tunneld("--check", "--config", "good.toml")
    assert (done.returncode, done.stdout) == (0, "good.toml: ok\n")
    advice = "run chmod g-w on it unless that is intended"
    assert done.stderr.splitlines() == [
        f"tunneld: warning: --config: the members of its group can change good.toml; {advice}",
        f"tunneld: warning: certificate {tmp_path}/relay.pem has expired",
    ]
    config.chmod(0o646)
    done = tunneld("--check", "--config", "good.toml")
    assert (done.returncode, done.stdout) == (os.EX_CONFIG, "")
    assert "every user of this machine can change good.toml" in done.stderr


def test_check_without_a_file_checks_the_usual_places(
    tunneld: Run, tmp_path: Path, environment: dict[str, str]
) -> None:
    usual = tmp_path / "home/.config/tunneld/tunnel.toml"
    usual.parent.mkdir(parents=True)
    usual.write_text("")
    assert tunneld("--check").stdout == f"{usual}: ok\n"
    done = tunneld("--check", env=environment | {"TUNNELD_CONFIG": "none.toml"})
    assert (done.returncode, done.stdout) == (os.EX_CONFIG, "")
    assert done.stderr == "none.toml: could not read the configuration: no such file or directory\n"


@pytest.mark.parametrize("mode", [["--check"], ["--print-config"], []])
def test_all_errors_are_reported_at_once(tunneld: Run, tmp_path: Path, mode: list[str]) -> None:
    (tmp_path / "bad.toml").write_text("tunnels.pairing_timout = 3\ncontrol.port = 70000")
    done = tunneld(*mode, "--config", "bad.toml")
    assert (done.returncode, done.stdout) == (os.EX_CONFIG, "")
    assert done.stderr.splitlines() == [
        "bad.toml: control.port: 70000 is not between 0 and 65535",
        "bad.toml: tunnels.pairing_timout: unrecognized key; did you mean pairing_timeout?",
    ]


def test_a_folder_is_no_configuration(tunneld: Run, tmp_path: Path) -> None:
    done = tunneld("--config", tmp_path)
    assert (done.returncode, done.stdout) == (os.EX_CONFIG, "")
    assert done.stderr == f"{tmp_path}: could not read the configuration: is a directory\n"


def test_a_pipe_is_a_configuration(tunneld: Run) -> None:
    done = tunneld("--print-config", "--config", "/dev/stdin", input="tunnels.linger = 7")
    assert "linger = 7.0\n" in done.stdout


def test_print_config_is_complete_and_includes_the_options(tunneld: Run, tmp_path: Path) -> None:
    done = tunneld("--print-config", "--log-level", "debug", "--log-format=json")
    (tmp_path / "printed.toml").write_text(done.stdout)
    printed = load(tmp_path / "printed.toml")
    assert printed.log.model_dump() == {"level": "debug", "format": "json"}
    assert printed.model_copy(update={"log": Settings().log}) == Settings()


# Usage errors


@pytest.mark.parametrize(
    "arguments",
    [
        ["--unknown"],
        ["extra"],
        ["--config"],
        ["--check", "--print-config"],
        ["--log-level", "loud"],
        ["--print-completion", "fish-and-chips"],
        ["--conf", "x"],  # an abbreviation would mean something else one day
    ],
)
def test_usage_errors_exit_with_64_and_a_message(tunneld: Run, arguments: list[str]) -> None:
    done = tunneld(*arguments)
    assert (done.returncode, done.stdout) == (os.EX_USAGE, "")
    assert done.stderr.startswith("usage: tunneld ")
    assert done.stderr.splitlines()[-1].startswith("tunneld: ")


def test_the_choices_are_those_of_the_schema() -> None:
    fields = {key.path: key.field.annotation for key in keys()}
    assert fields["log.format"].__args__ == FORMATS  # type: ignore[union-attr]
    assert fields["log.level"].__args__ == LEVELS  # type: ignore[union-attr]


# Standard descriptors that are closed, full or broken


@pytest.mark.parametrize("option", ["--help", "--print-config", "--check", "--version"])
def test_a_full_disk_behind_standard_output_is_reported(tunneld: Run, option: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = tunneld(option, stdout=full)
    assert done.returncode == os.EX_IOERR
    assert done.stderr == "tunneld: could not write to standard output: no space left on device\n"


def test_a_closed_pipe_on_standard_output_is_no_error(tunneld: Run) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = tunneld("--print-config", stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_closed_standard_descriptors_are_opened(environment: dict[str, str], tmp_path: Path) -> None:
    script = "import os; from tunneld.cli.common import run; raise SystemExit(run('x', lambda: os.dup(0) - 3))"
    closing = ["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', sys.executable, "-c", script]
    assert subprocess.run(closing, env=environment, timeout=60, check=False).returncode == 0


# Errors


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UsageError("no such verb"), 64, "tunneld: no such verb\n"),
        (ListenError("could not listen on x: in use"), 71, "tunneld: could not listen on x: in use\n"),
        (ConfigError(["f: a: 1", "f: b: 2"]), 78, "f: a: 1\nf: b: 2\n"),
        (RefusedError("limit", "enough"), 75, "tunneld: enough\n"),
        (KeyboardInterrupt(), 130, ""),
        (BaseExceptionGroup("", [KeyboardInterrupt()]), 130, ""),
        (ExceptionGroup("", [ExceptionGroup("", [ListenError("in use")])]), 71, "tunneld: in use\n"),
        (BaseExceptionGroup("", [KeyboardInterrupt(), ListenError("in use")]), 71, "tunneld: in use\n"),
    ],
    ids=["usage", "listen", "config", "refused", "Ctrl-C", "Ctrl-C in a nursery", "in nurseries", "both"],
)
def test_an_exception_gives_a_message_and_an_exit_status(
    error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise error

    assert common.run("tunneld", fail) == status
    assert capsys.readouterr().err == said


def test_a_bug_prints_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise ExceptionGroup("", [UsageError("no such verb"), ZeroDivisionError("a bug")])

    assert common.run("tunneld", fail) == os.EX_SOFTWARE
    assert "ZeroDivisionError: a bug" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "lines"), [(["--config", "tunnel.toml"], 2), (["--cofnig"], 1)])
def test_errors_at_startup_have_error_priority_in_the_journal(
    tunneld: Run, environment: dict[str, str], tmp_path: Path, words: list[str], lines: int
) -> None:
    (tmp_path / "tunnel.toml").write_text("[contrl]\n[htp]\n")
    with (tmp_path / "journal").open("w") as journal:
        status = os.fstat(journal.fileno())
        environment["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
        tunneld(*words, stderr=journal)
    said = (tmp_path / "journal").read_text().splitlines()
    assert [line[:3] for line in said[-lines:]] == ["<3>"] * lines


# Completion


@pytest.mark.parametrize("shell", common.SHELLS)
def test_completion_scripts_know_every_option(tunneld: Run, shell: str) -> None:
    script = tunneld("--print-completion", shell).stdout
    for action in parser()._actions:
        for option in action.option_strings:
            assert option.lstrip("-") in script


@pytest.mark.parametrize("shell", common.SHELLS)
def test_completion_scripts_are_valid_for_their_shell(tunneld: Run, tmp_path: Path, shell: str) -> None:
    (tmp_path / "script").write_text(tunneld("--print-completion", shell).stdout)
    subprocess.run([find_program(shell), "-n", "script"], cwd=tmp_path, check=True, timeout=60)


def test_bash_completes_an_option_its_choices_and_files(tunneld: Run, tmp_path: Path) -> None:
    bash = find_program("bash")
    (tmp_path / "script").write_text(tunneld("--print-completion", "bash").stdout)
    (tmp_path / "my.toml").touch()

    def completed(*words: str) -> list[str]:
        line = (
            f"COMP_WORDS=(tunneld {' '.join(words)}); COMP_CWORD={len(words)}; _shtab_tunneld; echo ${{COMPREPLY[@]}}"
        )
        asked = subprocess.run(
            [bash, "-c", f". ./script; {line}"], cwd=tmp_path, check=True, timeout=60, capture_output=True, text=True
        )
        return asked.stdout.split()

    assert completed("--print-con") == ["--print-config"]
    assert completed("--log-level", "e") == ["error"]
    assert completed("--config", "my") == ["my.toml"]


# Running


@pytest.fixture
def running(tmp_path: Path, environment: dict[str, str]) -> Any:
    """Start the daemon; yields a function that returns its process."""
    (tmp_path / "tunnel.toml").write_text(ON_ANY_PORT)
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command("--config", "tunnel.toml", *arguments),
            cwd=tmp_path, env=environment | variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for(stream: IO[str] | None, word: str) -> str:
    """Wait for a line of the log that has the word in it, and return it."""
    assert stream is not None
    seen = []
    for line in stream:
        seen.append(line)
        if word in line:
            return line
    raise AssertionError(f"{word!r} is not in {''.join(seen)}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_0_and_nothing_on_standard_output(running: Any, number: signal.Signals) -> None:
    process = running("--log-format", "json")
    wait_for(process.stderr, '"ready"')
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")


def test_a_port_in_use_is_reported(tunneld: Run, tmp_path: Path, running: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (tmp_path / "tunnel.toml").write_text(ON_ANY_PORT.replace("port = 0", f"port = {port}", 1))
        done = tunneld("--config", "tunnel.toml")
    assert done.returncode == os.EX_OSERR
    assert re.search(
        rf"^tunneld: could not listen on .*127\.0\.0\.1:{port}: address already in use$", done.stderr, re.MULTILINE
    )


def test_a_drain_reports_how_many_visitors_remain_and_when_they_are_cut(running: Any, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        process = running("--log-format", "json", NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="60000000")
        port = urlsplit(json.loads(wait_for(process.stderr, '"control listens"'))["uri"]).port
        wait_for(process.stderr, '"ready"')
        while b"WATCHDOG=1" not in manager.recv(1000):
            pass
        with (
            socket.create_connection(("127.0.0.1", port)) as control,
            control.makefile("rw") as lines,
            socket.create_connection(call(lines, "openTunnel tcp")) as hidden,
            socket.create_connection(
                call(lines, "getTunnelAddress tcp://{}:{}".format(*hidden.getpeername()))
            ) as visitor,
        ):
            visitor.sendall(b"x")
            assert hidden.recv(1) == b"x"
            process.send_signal(signal.SIGTERM)
            facts = json.loads(wait_for(process.stderr, '"event": "draining"'))
            assert (facts["tunnels"], facts["visitors"], facts["seconds"]) == (1, 1, 30)
            while b"STATUS=stopping: 1 visitor still connected, disconnecting in 30 s" not in manager.recv(1000):
                pass
        assert process.wait(timeout=60) == 0


def test_the_log_has_a_stack_trace_when_the_watchdog_ends_the_process(running: Any, tmp_path: Path) -> None:
    process = running(NOTIFY_SOCKET=str(tmp_path / "nobody"), WATCHDOG_USEC="60000000")
    wait_for(process.stderr, " ready ")
    process.send_signal(signal.SIGABRT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGABRT
    assert "most recent call first" in said


def client_address(lines: Any, server: tuple[str, int]) -> tuple[str, int]:
    """The client address that belongs to a server address."""
    return call(lines, f"getTunnelAddress tcp://{server[0]}:{server[1]}")


def call(lines: Any, request: str) -> tuple[str, int]:
    """Send a request line to the control port; returns the address in the URI of the answer."""
    lines.write(f"{request}\n")
    lines.flush()
    while "://" not in (line := lines.readline()):
        assert not line.startswith("ERR")
    found = Endpoint.parse(line.split()[-1])
    return found.host, found.port
