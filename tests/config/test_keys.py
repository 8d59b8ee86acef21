"""diff and reloaded: what a reload changes, reports, and leaves to a restart."""

from __future__ import annotations

from pathlib import Path

from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from hypothesis import strategies as st

from tests.config import strategies
from tunneld.config import ControlSettings, DaemonSettings, Settings, TlsFiles, TunnelSettings, diff, reloaded
from tunneld.config.keys import keys, value

relaxed = limits(suppress_health_check=[HealthCheck.too_slow], deadline=None)

RESTART_KEYS = {
    *("tunnels.accept_backoff", "daemon.state", "daemon.user", "daemon.group", "daemon.spin"),
    *("egtp.identity", "ssh.host_key"),
}


def test_the_keys_that_need_a_restart() -> None:
    assert {key.path for key in keys() if not key.live} == RESTART_KEYS


def test_a_change_as_text() -> None:
    new = Settings(tunnels=TunnelSettings(linger=5, host="::1", accept_backoff=1), control=ControlSettings(port=0))
    assert [str(change) for change in diff(Settings(), new)] == [
        "control.port: 7010 -> 0",
        'tunnels.host: "127.0.0.1" -> "::1" (for tunnels opened from now on)',
        "tunnels.linger: 60.0 -> 5.0 (for tunnels opened from now on)",
        "tunnels.accept_backoff: 0.1 -> 1.0 (needs a restart)",
    ]


def test_an_added_table_is_a_change_of_its_keys() -> None:
    new = Settings(control=ControlSettings(tls=TlsFiles(certificate=Path("a"), key=Path("b"))))
    changes = diff(Settings(), new)
    assert [(change.key, change.old, change.new, change.live) for change in changes] == [
        ("control.tls.certificate", None, Path("a"), True),
        ("control.tls.key", None, Path("b"), True),
    ]


def test_a_key_that_needs_a_restart_keeps_its_value() -> None:
    old = Settings(tunnels=TunnelSettings(accept_backoff=1), daemon=DaemonSettings(drain_timeout=1))
    new = Settings(tunnels=TunnelSettings(accept_backoff=2, linger=7), daemon=DaemonSettings(drain_timeout=2))
    now = reloaded(old, new)
    assert (now.tunnels.accept_backoff, now.tunnels.linger, now.daemon.drain_timeout) == (1, 7, 2)


@relaxed
@given(st.data())
def test_diff_has_exactly_the_keys_that_differ(certificates: Path, data: st.DataObject) -> None:
    old, new = (data.draw(strategies.settings(certificates)) for _ in range(2))
    changes = {change.key: change for change in diff(old, new)}
    for key in (key for key in keys() if not key.repeated):
        before, after = value(old, key.path), value(new, key.path)
        if before == after:
            assert key.path not in changes
        else:
            assert (changes[key.path].old, changes[key.path].new) == (before, after)
    before, after = ({one.name: one for one in settings.credential} for settings in (old, new))
    for name in {**before, **after}:
        changed = any(f"{path}.".startswith(f"credential.{name}.") for path in changes)
        assert changed == (before.get(name) != after.get(name))


@relaxed
@given(st.data())
def test_after_a_reload_only_restart_keys_differ(certificates: Path, data: st.DataObject) -> None:
    old, new = (data.draw(strategies.settings(certificates)) for _ in range(2))
    now = reloaded(old, new)
    changes = diff(old, new)
    assert diff(old, now) == [change for change in changes if change.live]
    assert diff(now, new) == [change for change in changes if not change.live]
    assert type(now).model_validate(now.model_dump()) == now  # and the result is a valid configuration
