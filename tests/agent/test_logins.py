"""Passwords for visitors, from flags and files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunneld.agent.expose_file import load_plans
from tunneld.agent.logins import MAX_FILE, auth_option
from tunneld.errors import ConfigError, UsageError
from tunneld.policy.logins import Login, parse_auth


def users(text: str) -> list[str]:
    return [login.user if isinstance(login, Login) else login for login in parse_auth(text)]


def written(path: Path, content: str, mode: int = 0o600) -> Path:
    path.write_text(content)
    path.chmod(mode)
    return path


def test_flags_and_a_file_together(tmp_path: Path) -> None:
    file = written(tmp_path / "passwords", "# for friends\n\nbob:battery-staple\r\n carol:with : colon \n")
    assert users(auth_option(["alice:correct-horse", "link"], file, "blog")) == ["alice", "link", "bob", "carol"]
    assert auth_option([], None, "blog") == ""


def test_the_same_is_asked_for_each_time() -> None:
    assert auth_option(["alice:correct-horse"], None, "") == auth_option(["alice:correct-horse"], None, "")


@pytest.mark.parametrize(
    ("content", "mode", "error"),
    [
        ("bob:battery-staple", 0o644, "chmod"),
        ("", 0o600, "must have lines"),
        ("# nothing\n", 0o600, "must have lines"),
        ("b" * (MAX_FILE + 1), 0o600, "at most"),
        ("bob", 0o600, "USER:PASSWORD"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, content: str, mode: int, error: str) -> None:
    with pytest.raises(UsageError, match=error):
        auth_option([], written(tmp_path / "passwords", content, mode), "blog")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="could not read"):
        auth_option([], tmp_path / "missing", "blog")


def test_expose_toml_has_both(tmp_path: Path) -> None:
    written(tmp_path / "passwords", "bob:battery-staple")
    file = tmp_path / "expose.toml"
    table = "[expose.blog]\ntarget = 8000\nhost = 'blog'\n"
    file.write_text(table + "auth = ['alice:correct-horse']\nauth_file = 'passwords'\n")
    plans = [load_plans(file).plans["blog"] for _ in range(2)]
    assert users(str(plans[0].request.options["auth"])) == ["alice", "bob"]
    assert plans[0] == plans[1]
    file.write_text(table + "auth = ['alice:short']\n")
    with pytest.raises(ConfigError, match="password of 'alice'") as caught:
        load_plans(file)
    assert "short" not in str(caught.value)
