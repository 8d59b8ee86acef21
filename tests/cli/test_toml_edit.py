"""The text around a credential does not change, or nothing does."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.cli import toml_edit
from tunneld.errors import UsageError

TEXT = """\
# mine
tunnels.ports = "1-2"  # not 3

# the first
[[credential]]   # alice
name = "alice"
verifier = 'old'  # since May
max_tunnels = 3
# and no more

# the second
[[credential]]
name = "bob"
ports = [
    "5",
]
verifier = "b"

[log]
level = "info"
# the end
"""
FIRST = TEXT[TEXT.index("[[credential]]   #") : TEXT.index("\n# the second")]
SECOND = TEXT[TEXT.index('[[credential]]\nname = "bob"') : TEXT.index("\n[log]")]


def test_a_table_goes_and_everything_else_stays() -> None:
    assert toml_edit.removed(TEXT, "alice") == TEXT.replace(FIRST, "")
    assert toml_edit.removed(TEXT, "bob") == TEXT.replace(SECOND, "")
    assert toml_edit.credentials(toml_edit.removed(toml_edit.removed(TEXT, "bob"), "alice")) == []


def test_only_the_verifier_changes() -> None:
    assert toml_edit.rotated(TEXT, "alice", "new") == TEXT.replace("'old'", '"new"')
    assert toml_edit.rotated(TEXT, "bob", "new") == TEXT.replace('"b"', '"new"')


def test_a_table_comes_at_the_end() -> None:
    table = {"name": "carol", "ports": ["7", "8-9"], "max_ttl": 5.0}
    assert toml_edit.added(TEXT, table).startswith(TEXT)
    assert toml_edit.credentials(toml_edit.added(TEXT, table))[2] == table
    assert toml_edit.added("a = 1", table).startswith("a = 1\n\n[[credential]]\n")
    assert toml_edit.credentials(toml_edit.added("", table)) == [table]
    assert toml_edit.removed(toml_edit.added(TEXT, table), "carol").rstrip() == TEXT.rstrip()


def test_lines_may_end_as_on_windows() -> None:
    text = TEXT.replace("\n", "\r\n")
    assert toml_edit.removed(text, "bob") == text.replace(SECOND.replace("\n", "\r\n"), "")
    assert toml_edit.rotated(text, "alice", "new") == text.replace("'old'", '"new"')


TABLE = '[[credential]]\nname = "alice"\nverifier = "v"\n'
IN_A_STRING = f'text = """\n{TABLE}"""\n' + TABLE.replace("credential", '"\\u0063redential"')
"""What looks like the table is not it, and the table does not look like it."""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (IN_A_STRING, "change it by hand"),
        ('credential = [{name = "alice", verifier = "v"}]', "change it by hand"),
        ('a = """\n[[credential]]\n"""\n[[credential]]\nname = "alice"\nverifier = "v"', "change it by hand"),
        ("[[credential]]\nname = \"alice\"\nverifier = '''v'''", "change it by hand"),
        ('[[credential]]\nname = "alice"\n"verifier" = "v"', "change it by hand"),
        ('[[credential]]\nname = "alice"\nsecret_file = "s"', "no verifier, but a secret_file"),
        ('[[credential]]\nname = "bob"', "there is no credential 'alice'"),
        ('[[credential]]\nname = "alice"\n[[credential]]\nname = "alice"', "several"),
        ("credential = 1", "change it by hand"),
        ("credential = ", "not TOML"),
    ],
)
def test_what_cannot_be_changed_safely_is_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        toml_edit.rotated(text, "alice", "new")


def test_a_name_that_is_there_is_not_added() -> None:
    with pytest.raises(UsageError, match="there is a credential 'bob'"):
        toml_edit.added(TEXT, {"name": "bob"})
    with pytest.raises(UsageError, match="change it by hand"):
        toml_edit.added("credential = []", {"name": "bob"})


PIECES = (
    *("[[credential]]\n", " [[ credential ]] # c\n", "# [[credential]]\n", "[log]\n", "\n", "credential = []\n"),
    *('name = "alice"\n', 'name = "bob"\n', 'verifier = "v"\n', "verifier = 'v'\n"),
    *("x = [\n", "[1],\n", "]\n", '"""\n', 's = """\n', "'''\n", "s = '''\n"),
)


@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_of_any_text_only_the_one_credential_changes(text: str) -> None:
    for verifier in (None, "new"):
        try:
            new = toml_edit.rotated(text, "alice", verifier) if verifier else toml_edit.removed(text, "alice")
        except UsageError:
            continue
        before, after = tomllib.loads(text), tomllib.loads(new)
        others = [table for table in before.pop("credential") if table.get("name") != "alice"]
        assert [table for table in after.pop("credential", []) if table.get("name") != "alice"] == others
        assert before == after
