"""Configurations of exposures: read from expose.toml, and the changes from one file to the next."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.agent import config
from tunneld.agent.config import ExposureConfig, changes, conflict, plan_of
from tunneld.agent.expose_file import load_plans
from tunneld.agent.health import Check, UnhealthyPolicy
from tunneld.agent.pool import PoolLimits
from tunneld.agent.request import TunnelRequest
from tunneld.cli.tunnel import parser
from tunneld.errors import ConfigError
from tunneld.inspector.settings import InspectorLimits, InspectSettings
from tunneld.net.endpoint import Target
from tunneld.tls.identity import Identity
from tunneld.wire.lines import Value

configs = st.dictionaries(st.sampled_from("abcde"), st.integers(0, 2))


@given(configs, configs)
def test_applying_the_changes_to_the_old_set_gives_the_new_set(old: dict[str, int], new: dict[str, int]) -> None:
    made = changes(old, new)
    running = {name: config for name, config in old.items() if name not in {*made.removed, *made.replaced}}
    untouched = dict(running)
    running |= {name: new[name] for name in (*made.added, *made.replaced)}
    assert running == new
    assert untouched == {name: config for name, config in new.items() if old.get(name) == config}


def read(folder: Path, content: str) -> dict[str, ExposureConfig]:
    path = folder / "expose.toml"
    path.write_text(content)
    return dict(load_plans(path).plans)


def problems(folder: Path, content: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(folder, content)
    return [problem.removeprefix(f"{folder / 'expose.toml'}: ") for problem in caught.value.problems]


def test_a_table_with_a_target_is_enough(tmp_path: Path) -> None:
    request = TunnelRequest({"name": "blog", "linger": 60.0}, PoolLimits(8, 200))
    assert read(tmp_path, "[expose.blog]\ntarget = 8000") == {
        "blog": ExposureConfig(Target("127.0.0.1", 8000), request)
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", None),
        ("inspect = false", None),
        ("inspect = true", InspectSettings()),
        ('inspect = "127.0.0.1:5000"', InspectSettings(port=5000, is_default=False)),
        (
            'inspect = "[::1]:0"\ninspect_body = "16M"\ninspect_memory = "64M"',
            InspectSettings("::1", 0, is_default=False, limits=InspectorLimits(body=16_000_000, memory=64_000_000)),
        ),
        ("inspect = true\ninspect_memory = 1000000", InspectSettings(limits=InspectorLimits(memory=1_000_000))),
    ],
)
def test_the_inspector(tmp_path: Path, words: str, expected: InspectSettings | None) -> None:
    assert read(tmp_path, f"[expose.blog]\ntarget = 8000\n{words}")["blog"].inspect == expected


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("inspect = 4040", "is not true, false or a string"),
        ('inspect = "4040"', "is not ADDRESS:PORT, such as 127.0.0.1:4040; a target goes in front"),
        ('inspect_body = "17M"', "more than 16M"),
        ('inspect_memory = "999k"', "not between 1M and 4G"),
        ('inspect = true\ninspect_body = "5M"', "16M bytes for all requests are less than four bodies of 5M"),
        ('inspect = true\nscheme = "https"', "inspect cannot read TLS between visitors"),
        (
            'inspect = true\nhost = "blog"\ntls = "pass"',
            "inspect cannot read TLS between visitors",
        ),
    ],
)
def test_mistakes_of_the_inspector(tmp_path: Path, words: str, problem: str) -> None:
    (said,) = problems(tmp_path, f"[expose.blog]\ntarget = 8000\n{words}")
    assert problem in said


def test_the_inspector_needs_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "find_spec", lambda _name: None)
    (said,) = problems(tmp_path, "[expose.blog]\ntarget = 8000\ninspect = true")
    assert said == "expose.blog: inspect needs the Python package h11, which is not installed"


def test_an_inspector_in_front_of_the_target_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["expose", "--inspect", "8000"])
    assert "a target goes in front: tunnel expose TARGET --inspect" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("8000", "localhost:8000"),
        ("127.0.0.1:80", "localhost:80"),
        ("[::1]:8000", "localhost:8000"),
        ("web.lan:8000", "web.lan:8000"),
        ("192.0.2.1:8000", "192.0.2.1:8000"),
        ("unix:/run/web", "localhost"),
    ],
)
def test_local_as_host_header_is_the_target_as_a_browser_beside_it_would_name_it(
    tmp_path: Path, target: str, expected: str
) -> None:
    table = f'[expose.web]\ntarget = "{target}"\nhost = "blog"\nhost_header = '
    assert read(tmp_path, f'{table}"local"')["web"].request.options["host_header"] == expected
    assert read(tmp_path, f'{table}"other:81"')["web"].request.options["host_header"] == "other:81"


def test_every_key_reaches_the_configuration(tmp_path: Path) -> None:
    (config,) = read(
        tmp_path,
        """
        [expose.x]
        target = "unix:/run/x"
        scheme = "https"
        name = "blog"
        client_port = 20080
        backend = "tcp"
        secure = "key"
        ttl = 3600.0
        idle_timeout = 60.0
        pairing_timeout = 5.0
        linger = 7.0
        pool = 1
        max_pool = 2
        proxy_protocol = true
        allow_from = ["192.0.2.0/24", "2001:db8::1"]
        deny_from = ["192.0.2.7"]
        max_visitors = 10
        max_per_source = 2
        visitor_rate = "3/m"
        bandwidth = "2M"
        quota = "50G"
        health = "http"
        health_path = "/up"
        health_interval = 1.0
        health_timeout = 0.5
        unhealthy_after = 1
        healthy_after = 4
        unhealthy = "withdraw"
        """,
    ).values()
    options: dict[str, Value] = {
        "name": "blog",
        "secure": "key",
        "client_port": 20080,
        "ttl": 3600.0,
        "idle_timeout": 60.0,
        "pairing_timeout": 5.0,
        "linger": 7.0,
        "allow_from": "192.0.2.0/24,2001:db8::1/128",
        "deny_from": "192.0.2.7/32",
        "max_visitors": 10,
        "max_per_source": 2,
        "visitor_rate": "3/m",
        "bandwidth": "2M",
        "quota": "50G",
        "scheme": "https",
    }
    assert config == ExposureConfig(
        Target(path="/run/x"),
        TunnelRequest(options, PoolLimits(1, 2), keep_header=True, backend="tcp"),
        Check("http", "/up", 1.0, 0.5, 1, 4, UnhealthyPolicy.WITHDRAW),
        "https",
        7.0,
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "expose: there is nothing to expose: add a table [expose.NAME] with a target"),
        ("expose = 3", "expose: 3 is not a table"),
        ("[expose.b]", "expose.b.target: missing, and it has no default"),
        ("[expose.b]\ntarget = 80\ntraget = 1", "expose.b.traget: unrecognized key; did you mean target?"),
        ("[expose.b]\ntarget = 80\npin = 'x'", "expose.b.pin: unrecognized key; did you mean relay.pin?"),
        ("[expose.b]\ntarget = 80\n[exposed.b]", "exposed: unrecognized table; did you mean expose?"),
        (
            '[expose."a b"]\ntarget = 80',
            'expose: "a b" is not a name of at most 64 letters, digits, dots, dashes and underscores',
        ),
        ("[expose.b]\ntarget = true", "expose.b.target: true is not a string in quotes"),
        ("[expose.b]\ntarget = 0", "expose.b.target: port out of range in '0': 0 is not between 1 and 65535"),
        ("[expose.b]\ntarget = 80\nhealth = 'htp'", 'expose.b.health: "htp" is not one of tcp, http'),
        ("[expose.b]\ntarget = 80\npool = 9\nmax_pool = 8", "expose.b: pool 9 is more than max_pool 8"),
        ("[expose.b]\ntarget = 80\nunhealthy_after = 101", "expose.b.unhealthy_after: 101 is not between 1 and 100"),
        ("[expose.b]\ntarget = 80\nclient_port = 0", "expose.b.client_port: 0 is not between 1 and 65535"),
        (
            "[expose.b]\ntarget = 80\nallow_from = ['9']",
            'expose.b.allow_from[0]: "9" is not an address or a network',
        ),
        (
            "[expose.b]\ntarget = 80\nhealth_path = 'x y'",
            'expose.b.health_path: "x y" is not a path for an HTTP request: it must start with / and contain no spaces',
        ),
        ("[relay]\nwhre = 'x'", "relay.whre: unrecognized key; did you mean where?"),
        (
            "[relay]\npin = 'x'",
            "relay.pin: not a fingerprint of the form sha256: and 64 hexadecimal digits: 'x'",
        ),
    ],
)
def test_each_mistake_is_one_sentence(tmp_path: Path, content: str, problem: str) -> None:
    assert problems(tmp_path, content)[0] == problem


@pytest.mark.parametrize(
    ("one", "other", "problem"),
    [
        ("name = 'x'", "name = 'x'", "have the same name, x: change one of them, or set share = true in both"),
        ("name = 'b'", "", "have the same name, b: change one of them, or set share = true in both"),
        (
            "name = 'x'\nshare = true",
            "name = 'x'",
            "have the same name, x: change one of them, or set share = true in both",
        ),
        ("client_port = 20000", "client_port = 20000", "have the same client_port, 20000: change one of them"),
        ("name = 'x'\nshare = true\nclient_port = 2", "name = 'x'\nshare = true\nclient_port = 2", ""),
        ("client_port = 20000", "client_port = 20001", ""),
        ("host = 'Blog.'", "host = 'blog'", "have the same host, blog: change one of them"),
        ("host = 'shop,blog'", "host = 'x,blog'", "have the same host, blog: change one of them"),
        ("host = '*.t.example/a/'", "host = '*.T.example/a'", "have the same host, *.t.example/a: change one of them"),
        ("host = 'blog/a'", "host = 'blog/b'", ""),
        ("host = 'blog'", "host = 'shop'", ""),
        ("host = 'any'", "host = 'any'", ""),
        ("host = 'blog'\nname = 'x'\nshare = true", "host = 'blog'\nname = 'x'\nshare = true", ""),
        ("host = 'blog'\nshare = true\nname = 'x'", "host = 'blog'", "have the same host, blog: change one of them"),
        ("", "", ""),
    ],
)
def test_two_exposures_that_exclude_each_other_are_named(tmp_path: Path, one: str, other: str, problem: str) -> None:
    file = tmp_path / "expose.toml"
    file.write_text(f"[expose.a]\ntarget = 80\n{one}\n[expose.b]\ntarget = 81\n{other}\n")
    assert conflict(load_plans(file).plans) == (problem and f"expose.a and expose.b {problem}")


def test_all_mistakes_are_reported_at_once_each_with_its_table(tmp_path: Path) -> None:
    found = problems(tmp_path, "[expose.a]\ntarget = 'x'\n[expose.b]\ntarget = 80\nttl = 0.0\n[relay]\nca = 'nowhere'")
    assert [problem.split(":")[0] for problem in found] == ["relay.ca", "expose.a.target", "expose.b.ttl"]


HTTPS = 'target = 8000\nhost = "blog"\nhttps_here = true\nacme_agree = true\n'


def test_https_here_passes_tls_on_and_orders_a_certificate(tmp_path: Path) -> None:
    config = read(tmp_path, f"[expose.x]\n{HTTPS}proxy_protocol = true\n")["x"]
    assert config.https is not None
    assert config.https.directory == "https://acme-v02.api.letsencrypt.org/directory"
    assert config.request.options["tls"] == "pass"
    assert config.proxy_header
    assert not config.request.keep_header


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("acme_agree = true", ""), "accept them with acme_agree"),
        (('host = "blog"', ""), "https_here requires host with one name"),
        (('"blog"', '"blog,shop"'), "https_here requires host with one name"),
        (('"blog"', '"*"'), "https_here requires host with one name"),
        (("true\n", 'true\nhost_header = "local"\n'), "host_header requires that TLS ends at the relay"),
        (("true\n", 'true\ntls = "terminate"\n'), "leave tls out"),
        (("true\n", 'true\nallow_from = ["192.0.2.0/24"]\n'), "cannot be combined with allow_from"),
        (("true\n", 'true\nacme_contact = "nobody"\n'), "acme_contact: 'nobody' is not an e-mail address"),
        (("true\n", 'true\nacme_directory = "http://x"\n'), "acme_directory: 'http://x' is not an https:// URL"),
    ],
)
def test_what_https_here_requires(tmp_path: Path, change: tuple[str, str], reason: str) -> None:
    (problem,) = problems(tmp_path, f"[expose.x]\n{HTTPS.replace(*change, 1)}")
    assert reason in problem.replace('"', "'")


def test_https_here_needs_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunneld.agent.config.find_spec", lambda _name: None)
    (problem,) = problems(tmp_path, f"[expose.x]\n{HTTPS}")
    assert "install tunneld[acme]" in problem


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("Blog", "blog"), ("shop.example.com.", "shop.example.com"), ("any", None), ("a,b", None), ("*", None),
        ("a.example/api", None),
    ],
)  # fmt: skip
def test_a_host_name_of_its_own_is_the_name_of_the_tunnel(host: str, name: str | None) -> None:
    def planned(*words: str) -> object:
        options = parser().parse_args(["expose", "8000", "--host", host, *words])
        return plan_of(vars(options), str).request.options.get("name")

    assert planned() == name
    assert planned("--name", "mine") == "mine"


def test_with_egtp_each_exposure_has_a_key_or_that_of_a_file(tmp_path: Path) -> None:
    kept = Identity.create()
    kept.save(tmp_path / "key.pem")
    own = '[expose.a]\ntarget = 1\nbackend = "egtp"\n'
    first, second = (read(tmp_path, own)["a"].request for _ in range(2))
    assert first.identity is not None
    assert first.open_options["node"] == str(first.identity.id)
    assert first.identity != second.identity
    assert first == second  # a reload changes nothing
    named = read(tmp_path, f'{own}identity = "{tmp_path}/key.pem"\n')["a"].request
    assert named.identity == kept
    assert read(tmp_path, "[expose.a]\ntarget = 1\n")["a"].request.identity is None


def test_only_egtp_polls_and_in_whole_seconds(tmp_path: Path) -> None:
    own = "[expose.a]\ntarget = 1\n"
    assert read(tmp_path, f'{own}backend = "egtp"\npoll = 30\n')["a"].request.poll == 30
    for words, reason in (
        ("poll = 30", "poll is for the backend egtp; add backend egtp"),
        ('backend = "egtp"\npoll = 0', "0 is not between 1 and 3600"),
        ('backend = "egtp"\npoll = 3601', "3601 is not between 1 and 3600"),
        ('backend = "egtp"\npoll = 1.5', "1.5 is not an integer"),
    ):
        with pytest.raises(ConfigError, match=reason):
            read(tmp_path, own + words)
