"""Two listeners on one port: found before the daemon starts, with both keys and their lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunneld.config import Settings, load
from tunneld.config.ports import collisions, key_lines, services_among_tunnels
from tunneld.config.schema import TunnelSettings
from tunneld.errors import ConfigError

FREE = "control.port = 0\nhttp.port = 0\nwebmux.port = 0\n"


def problems(folder: Path, content: str) -> list[str]:
    path = folder / "tunnel.toml"
    path.write_text(content)
    try:
        load(path)
    except ConfigError as error:
        return [problem.removeprefix(f"{path}: ") for problem in error.problems]
    return []


def test_the_built_in_defaults_do_not_collide() -> None:
    assert list(collisions(Settings())) == []


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            "[control]\nport = 7100\n\n[http]  # the other\nport = 7100\n",
            "control.port (line 2) and http.port (line 5) are both 7100 on the same address; change one of them",
        ),
        (
            "http.port = 7010",
            "control.port (the default) and http.port (line 1) are both 7010 on the same address; change one of them",
        ),
        (
            'control = { port = 7012 }\n"webmux" . "host" = "localhost"\n',
            "control.port (line 1) and webmux.port (the default) are both 7012 on the same address; change one of them",
        ),
    ],
)
def test_a_collision_names_both_keys_and_their_lines(tmp_path: Path, content: str, problem: str) -> None:
    assert problems(tmp_path, content) == [problem]


def test_a_service_among_the_ports_for_tunnels_is_only_dubious(tmp_path: Path) -> None:
    assert problems(tmp_path, '[tunnels]\nports = "7000-7010"\n') == []
    settings = Settings(tunnels=TunnelSettings(ports="7000-7010"))
    assert list(services_among_tunnels(settings)) == [
        "control.port is 7010, which is one of the ports for tunnels (tunnels.ports = 7000-7010); change one of them"
    ]
    assert list(services_among_tunnels(Settings())) == []


def test_all_collisions_are_reported(tmp_path: Path) -> None:
    assert len(problems(tmp_path, "control.port = 7012\nhttp.port = 7012\n")) == 3


@pytest.mark.parametrize(
    ("one", "other", "collide"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "127.0.0.2", False),
        ("127.0.0.1", "::1", False),
        ("localhost", "127.0.0.1", True),
        ("localhost", "::1", True),
        ("", "127.0.0.1", True),
        ("", "::1", True),
        ("::", "127.0.0.1", True),
        ("0.0.0.0", "127.0.0.2", True),
        ("0.0.0.0", "::1", False),
        ("0.0.0.0", "::", True),
        ("::ffff:127.0.0.1", "127.0.0.1", True),
        ("relay.example.org", "relay.example.org", True),
        ("relay.example.org", "127.0.0.1", False),
        ("", "relay.example.org", True),
        ("0.0.0.0", "relay.example.org", True),
    ],
)
def test_only_listeners_that_share_an_address_collide(tmp_path: Path, one: str, other: str, collide: bool) -> None:
    for first, second in ((one, other), (other, one)):
        webmux = f'[webmux]\nport = 7700\nhost = "{first}"\n[control]\nport = 0\n[http]\nport = 0\n'
        content = f'{webmux}[ssh]\nenabled = true\nport = 7700\nhost = "{second}"\n'
        assert bool(problems(tmp_path, content)) is collide


@pytest.mark.parametrize(
    "content",
    [
        f'{FREE}tunnels.ports = "1-65535"',
        "http.port = 7010\nhttp.enabled = false",
        "webmux.port = 7010\nwebmux.enabled = false",
        "ssh.port = 7010",
        'tunnels.ports = "0"',
    ],
)
def test_a_free_port_and_a_disabled_service_collide_with_nothing(tmp_path: Path, content: str) -> None:
    assert problems(tmp_path, content) == []


def test_the_lines_of_keys_are_found_in_any_style() -> None:
    text = 'a.b = 1\n# c = 2\n[ d ]\ne=3\n"f" = 4\n[[g]]\nh = 5\n[d . "i"]\n  j = 6  # k = 7\n'
    assert key_lines(text) == {"a.b": 1, "d.e": 4, "d.f": 5, "g.h": 7, "d.i.j": 9}
