"""Loading: all errors at once, each one a sentence with file, key path, reason and hint. Dumping: what loads back."""

from __future__ import annotations

import contextlib
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from tests.config import strategies
from tunneld.config import Settings, dump, load
from tunneld.config.file import parse
from tunneld.config.keys import keys, value
from tunneld.config.toml_file import MAX_CONFIG_BYTES
from tunneld.errors import ConfigError


def problems(folder: Path, content: str | bytes) -> list[str]:
    """The problems of a file, without its name."""
    path = folder / "tunnel.toml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError) as caught:
        load(path)
    for problem in caught.value.problems:
        assert problem.startswith(f"{path}: ")
        assert problem.isprintable()
    return [problem.removeprefix(f"{path}: ") for problem in caught.value.problems]


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "tunnel.toml"
    path.touch()
    assert load(path) == Settings()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        # unrecognized: the nearest key of any table
        (
            "[tunnels]\npairing_timout = 3",
            "tunnels.pairing_timout: unrecognized key; did you mean pairing_timeout?",
        ),
        ("[daemon]\nlinger = 3", "daemon.linger: unrecognized key; did you mean tunnels.linger?"),
        ("pairing_timeout = 3", "pairing_timeout: unrecognized key; did you mean tunnels.pairing_timeout?"),
        ("[tunnel]", "tunnel: unrecognized table; did you mean tunnels?"),
        ("[log]\ncolour = 1", "log.colour: unrecognized key; [log] accepts format, level"),
        ("[daemon]\nwatch_log = 1", "daemon.watch_log: unrecognized key; did you mean watch_backlog?"),
        (
            "[gopher]",
            (
                "gopher: unrecognized table; the file accepts control, http, tunnels, webmux, ssh, egtp, names, "
                "daemon, log, events, metrics, records, acme, certificate, credential"
            ),
        ),
        ('[log]\n"a\\nb" = 1', 'log."a\\u000ab": unrecognized key; [log] accepts format, level'),
        # wrong types
        ("control = 5", "control: 5 is not a table"),
        ("[[control]]\nport = 1", "control: an array of tables is not a table"),
        ('control.port = "7010"', 'control.port: "7010" is not an integer'),
        ("control.port = true", "control.port: true is not an integer"),
        ("control.port = 7010.0", "control.port: 7010.0 is not an integer"),
        ("control.port = {}", "control.port: a table is not an integer"),
        ('tunnels.linger = "1m"', 'tunnels.linger: "1m" is not a number'),
        ("tunnels.linger = 2026-01-01", "tunnels.linger: 2026-01-01 is not a number"),
        ("http.enabled = 1", "http.enabled: 1 is not true or false"),
        ("tunnels.host = 1", "tunnels.host: 1 is not a string in quotes"),
        ('http.allowed_hosts = "a"', 'http.allowed_hosts: "a" is not an array'),
        ("http.allowed_hosts = ['a', 2]", "http.allowed_hosts[1]: 2 is not a string in quotes"),
        # wrong values
        ("control.port = 70000", "control.port: 70000 is not between 0 and 65535"),
        ("control.port = -1", "control.port: -1 is not between 0 and 65535"),
        ("control.max_connections = 0", "control.max_connections: 0 is not between 1 and 1000000"),
        ("tunnels.linger = 0", "tunnels.linger: 0 is not between 0.001 and 31536000"),
        ("tunnels.linger = inf", "tunnels.linger: inf is not between 0.001 and 31536000"),
        ("tunnels.linger = nan", "tunnels.linger: nan is not between 0.001 and 31536000"),
        (
            f"tunnels.linger = 1{'0' * 400}",
            "tunnels.linger: a number of more than 60 digits is not between 0.001 and 31536000",
        ),
        ("control.credential_share = 0.0", "control.credential_share: 0.0 is not above 0 and at most 1"),
        ("control.credential_share = 1.5", "control.credential_share: 1.5 is not above 0 and at most 1"),
        ("http.max_body = 1023", "http.max_body: 1023 is not between 1024 and 1048576"),
        ('log.level = "verbose"', 'log.level: "verbose" is not one of debug, info, warning, error'),
        ('tunnels.host = "a b"', 'tunnels.host: "a b" is not a host name or an address'),
        ('tunnels.host = "300.1.1.1"', 'tunnels.host: "300.1.1.1" is not a host name or an address'),
        ('tunnels.host = "fe80::x"', 'tunnels.host: "fe80::x" is not a host name or an address'),
        ("http.allowed_hosts = ['a', '']", "http.allowed_hosts[1]: an empty name matches no request"),
        (
            'tunnels.advertised_host = "0.0.0.0"',
            'tunnels.advertised_host: "0.0.0.0" means all addresses of this machine, so clients cannot connect to it',
        ),
        ('tunnels.ports = "a-b"', 'tunnels.ports: "a-b" is not a port range; use FIRST-LAST, a single port, or 0'),
        ("control.tls.certificate = 4\ncontrol.tls.key = 5", "control.tls.certificate: 4 is not a path in quotes"),
        ("[control.tls]", "control.tls.certificate: missing, and it has no default"),
        (
            f'log.level = "{"x" * 300}"',
            f'log.level: "{"x" * 59}…" is not one of debug, info, warning, error',
        ),
    ],
)
def test_each_error_is_one_sentence(tmp_path: Path, content: str, problem: str) -> None:
    assert problems(tmp_path, content)[0] == problem


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[control]\nport 7", "line 2, column 6: expected '=' after a key in a key/value pair"),
        ("a = ", "line 1, column 5: invalid value"),
        ("[control]\nport = 1\nport = 2", "line 3, column 9: cannot overwrite a value"),
        ('[control]\n"a', "line 2, column 3: unterminated string"),
        (b"# caf\xc3\xa9\n# x\xff", "line 2, column 4: byte 0xff is not UTF-8"),
        ("x = " + "[" * 100_000, "could not read the configuration: nested too deeply"),
        ("x = 1" + "0" * 5000, "could not read the configuration: an integer has thousands of digits"),
        (b" " * (MAX_CONFIG_BYTES + 1), f"could not read the configuration: larger than {MAX_CONFIG_BYTES} bytes"),
    ],
    ids=["no equals", "no value", "twice", "no end of string", "not UTF-8", "deep", "long integer", "large"],
)
def test_a_syntax_error_has_its_position(tmp_path: Path, content: str | bytes, problem: str) -> None:
    (found,) = problems(tmp_path, content)
    place, _, reason = problem.partition(": ")
    assert found.startswith(
        place.rpartition(",")[0]
    )  # the parser's columns and words differ between versions of Python
    assert found.partition(": ")[2]
    if "expected" not in reason and "overwrite" not in reason and "unterminated" not in reason:
        assert found == problem


def test_all_errors_are_reported_in_schema_order(tmp_path: Path) -> None:
    content = """
        [log]
        level = "loud"
        [control]
        port = 70000
        host = "0.0.0.0"
        wrong = 1
        [http]
        host = "::"
        max_body = 1
    """
    assert [problem.partition(": ")[0] for problem in problems(tmp_path, content)] == [
        "control.port",
        "control.open_to_anyone",  # although another key of its table is wrong
        "control.wrong",
        "http.open_to_anyone",
        "http.max_body",
        "log.level",
    ]


def test_a_byte_order_mark_and_crlf_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "tunnel.toml"
    path.write_bytes(b"\xef\xbb\xbf[control]\r\nport = 1\r\n")
    assert load(path).control.port == 1


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none.toml", "no such file or directory"), (tmp_path, "is a directory")):
        with pytest.raises(ConfigError) as caught:
            load(path)
        assert caught.value.problems == [f"{path}: could not read the configuration: {reason}"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "tunnel.toml"
    path.touch(0)
    with pytest.raises(ConfigError, match="permission denied"):
        load(path)


@given(st.binary())
def test_garbage_is_an_error(content: bytes) -> None:
    with contextlib.suppress(ValidationError, ValueError):  # and no other exception
        parse(content, Path("/"))


TOML_VALUES = st.one_of(
    st.booleans().map(lambda value: str(value).lower()),
    st.integers().map(str),
    st.floats().map(repr),
    st.from_regex(r'"[ -!#-\[\]-~]*"', fullmatch=True),
    st.sampled_from(["[]", "{}", "[1]", "[[{}]]", "{a=1}", "2026-01-01", "12:00:00", "inf", "nan"]),
)


@given(st.dictionaries(st.sampled_from([key.path for key in keys()] + ["x", "control.x", "log"]), TOML_VALUES))
def test_any_toml_value_of_any_key_is_accepted_or_explained(
    tmp_path_factory: pytest.TempPathFactory, given_: dict[str, str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text("".join(f"{key} = {value}\n" for key, value in given_.items()))
    try:
        load(path)
    except ConfigError as error:
        for problem in error.problems:
            assert problem.startswith(f"{path}: ")
            assert problem.isprintable()


# Dumping


@limits(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.data())
def test_a_dump_of_any_configuration_loads_back_equal(certificates: Path, data: st.DataObject) -> None:
    settings = data.draw(strategies.settings(certificates))
    assert parse(dump(settings).encode(), Path("/nowhere")) == settings


def test_a_dump_has_every_key_that_is_set() -> None:
    written = tomllib.loads(dump(Settings()))

    def paths(table: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for key, inner in table.items():
            if isinstance(inner, dict):
                yield from paths(inner, f"{prefix}{key}.")
            elif prefix:  # and no array of tables
                yield f"{prefix}{key}"

    assert set(paths(written)) == {
        key.path for key in keys() if value(Settings(), key.path) not in (None, PydanticUndefined) and not key.repeated
    }
