"""The files in config/: the annotated default is the built-in one, the examples load, the units fit the daemon."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.support.system import lacking
from tunneld.agent.defaults import DRAIN_WITHIN
from tunneld.agent.expose_file import load_plans
from tunneld.agent.shutdown import CLOSE_WITHIN, FINISH_WITHIN
from tunneld.agent.status import AgentStatus
from tunneld.agent.status_server import answer
from tunneld.cli.probes import UPDATE_INTERVAL, parse_status_address
from tunneld.cli.tunnel import parser as tunnel_parser
from tunneld.config import Settings, TunnelSettings, load
from tunneld.config.keys import keys
from tunneld.daemon.listeners import SERVICES
from tunneld.errors import ConfigError, ExpiredError, LimitReachedError, NotAllowedError, UsageError

CONFIG = Path(__file__).parents[2] / "config"
ANNOTATED = CONFIG / "tunnel.toml"
EXPOSE_EXAMPLE = CONFIG / "examples/expose.toml"
EXAMPLES = sorted(set((CONFIG / "examples").glob("*.toml")) - {EXPOSE_EXAMPLE})
MAX_EXPOSURE = 1.5
"""The exposure by systemd-analyze security, of 10: 1.3 with systemd 252, slightly different with other versions."""
COMMENTED_OUT = re.compile(r"^#(?=\[|[a-z_]+ = )", re.MULTILINE)


def paths(table: dict[str, Any], prefix: str = "") -> list[str]:
    """The key paths in parsed TOML, in the order of the file."""
    found = []
    for name, value in table.items():
        match value:
            case dict():
                found += paths(value, f"{prefix}{name}.")
            case [dict(), *_]:
                found += [path for inner in value for path in paths(inner, f"{prefix}{name}.")]
            case _:
                found.append(prefix + name)
    return found


def unit_of(name: str) -> configparser.RawConfigParser:
    unit = configparser.RawConfigParser(strict=False, comment_prefixes=("#",))
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(CONFIG / name)
    return unit


def test_the_annotated_default_is_the_built_in_default() -> None:
    assert load(ANNOTATED) == Settings()


def test_the_annotated_default_has_every_key_each_with_a_comment() -> None:
    text = COMMENTED_OUT.sub("", ANNOTATED.read_text())
    assert sorted(paths(tomllib.loads(text))) == sorted(key.path for key in keys())
    for line in text.splitlines():
        assert not re.match(r"[a-z_]+ =", line) or "  # " in line, line


def test_the_annotated_default_marks_exactly_the_keys_that_need_a_restart() -> None:
    """With `[restart]` after a key, or after the header of its table."""
    table, table_marked, marked = "", False, set()
    for line in COMMENTED_OUT.sub("", ANNOTATED.read_text()).splitlines():
        if header := re.match(r"\[(.+?)\]", line):
            table, table_marked = header[1], "[restart]" in line
        elif (key := re.match(r"([a-z_]+) = ", line)) and (table_marked or "[restart]" in line):
            marked.add(f"{table}.{key[1]}")
    assert marked == {key.path for key in keys() if not key.live}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_each_example_loads_with_its_certificates(example: Path, certificates: Path) -> None:
    copy = certificates / example.name
    shutil.copy(example, copy)
    assert load(copy) != Settings()


def test_the_public_relay_requires_certificates(certificates: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or directory"):
        load(CONFIG / "examples/public-relay.toml")
    shutil.copy(CONFIG / "examples/public-relay.toml", certificates)
    control = load(certificates / "public-relay.toml").control
    assert control.tls is not None
    assert control.tls.client_ca is not None
    assert not control.open_to_anyone


def test_the_firewall_example_has_two_ports_for_each_tunnel() -> None:
    tunnels: TunnelSettings = load(CONFIG / "examples/behind-firewall.toml").tunnels
    assert len(tunnels.port_range) == 2 * tunnels.max_tunnels


def test_the_example_of_several_exposures_loads() -> None:
    file = load_plans(EXPOSE_EXAMPLE)
    assert file.relay
    assert list(file.plans) == ["blog", "shell", "files"]


def test_the_unit_of_the_agent_does_not_restart_after_permanent_errors() -> None:
    service = unit_of("tunnel.service")["Service"]
    assert float(service["TimeoutStopSec"]) > 2 * CLOSE_WITHIN + DRAIN_WITHIN + FINISH_WITHIN
    assert set(service["RestartPreventExitStatus"].split()) == {
        str(kind.exit_status) for kind in (UsageError, NotAllowedError, ConfigError, ExpiredError)
    }


def test_the_unit_of_the_agent_waits_for_its_messages() -> None:
    service = unit_of("tunnel.service")["Service"]
    assert service["Type"] == "notify"
    assert float(service["WatchdogSec"]) > 2 * UPDATE_INTERVAL


def test_the_example_for_kubernetes_has_probes_that_the_agent_answers() -> None:
    try:
        yaml: Any = import_module("yaml")  # not everywhere
    except ModuleNotFoundError:
        pytest.skip("the Python package yaml is not installed")
    deployment = yaml.safe_load((CONFIG / "examples/kubernetes.yaml").read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    options = tunnel_parser().parse_args(container["args"])
    _, port = parse_status_address(options.status_address)
    assert {one["containerPort"] for one in container["ports"]} == {port}
    for probe in ("livenessProbe", "readinessProbe"):
        line = f"GET {container[probe]['httpGet']['path']} HTTP/1.1".encode()
        assert b" 404 " not in answer(AgentStatus(), line)
    grace = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > CLOSE_WITHIN + DRAIN_WITHIN


@pytest.mark.parametrize("name", ["tunneld.service", "tunnel.service"])
def test_a_reload_by_systemd_fails_if_the_file_is_invalid(name: str) -> None:
    """The signal comes first: the program reloads while the check runs, for which systemctl waits."""
    lines = re.findall(r"^ExecReload=(.*)$", (CONFIG / name).read_text(), re.MULTILINE)
    start = unit_of(name)["Service"]["ExecStart"]
    assert lines == ["/bin/kill -HUP $MAINPID", f"{start} --check"]


def test_systemd_waits_for_the_drain_and_knows_the_exit_statuses() -> None:
    service = unit_of("tunneld.service")["Service"]
    assert float(service["TimeoutStopSec"]) > Settings().daemon.drain_timeout
    assert service["SuccessExitStatus"].split() == [str(LimitReachedError.exit_status), service["RestartKillSignal"]]
    assert LimitReachedError.exit_status == os.EX_TEMPFAIL
    assert set(service["RestartPreventExitStatus"].split()) == {
        str(UsageError.exit_status),
        str(ConfigError.exit_status),
    }


@pytest.mark.parametrize("name", ["tunneld.service", "tunnel.service", "ssh-tunnel.service"])
def test_systemd_restarts_after_temporary_errors_without_limit(name: str) -> None:
    """By default systemd gives up after five failures in ten seconds, for example while a port is taken."""
    assert unit_of(name)["Unit"]["StartLimitIntervalSec"] == "0"
    assert unit_of(name)["Service"]["Restart"] in {"on-failure", "always"}


def test_a_restart_by_systemd_hands_over_and_a_stop_drains() -> None:
    service = unit_of("tunneld.service")["Service"]
    assert service["RestartKillSignal"] == signal.SIGUSR1.name
    if sys.platform == "linux":
        from tunneld.daemon.handover.successor import MAX_STORED_FDS  # noqa: PLC0415

        assert int(service["FileDescriptorStoreMax"]) == MAX_STORED_FDS
    assert "KillSignal" not in service


def test_the_socket_unit_is_named_after_a_service() -> None:
    socket = unit_of("tunneld.socket")["Socket"]
    assert socket["FileDescriptorName"] in SERVICES
    assert socket["ListenStream"] == str(Settings().control.port)


def test_systemd_rates_the_exposure_as_low(program_path: Callable[[str], str]) -> None:
    command = [
        program_path("systemd-analyze"),
        "security",
        "--offline=true",
        "--no-pager",
        f"--threshold={round(MAX_EXPOSURE * 10)}",
    ]
    done = subprocess.run(
        [*command, CONFIG / "tunneld.service"], capture_output=True, text=True, check=False, timeout=60
    )
    if "unrecognized option" in done.stderr:
        lacking("this systemd-analyze cannot look at a file")
    assert done.returncode == 0, done.stdout.splitlines()[-1]
