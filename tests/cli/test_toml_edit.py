"""An edit changes one credential and no other text, or is refused."""

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


def test_removing_a_table_keeps_all_other_text() -> None:
    assert toml_edit.removed(TEXT, "alice") == TEXT.replace(FIRST, "")
    assert toml_edit.removed(TEXT, "bob") == TEXT.replace(SECOND, "")
    assert toml_edit.credentials(toml_edit.removed(toml_edit.removed(TEXT, "bob"), "alice")) == []


def test_only_the_verifier_changes() -> None:
    assert toml_edit.rotated(TEXT, "alice", "new") == TEXT.replace("'old'", '"new"')
    assert toml_edit.rotated(TEXT, "bob", "new") == TEXT.replace('"b"', '"new"')


def test_only_the_given_keys_change() -> None:
    assert toml_edit.changed(TEXT, "alice", {"max_tunnels": 4}) == TEXT.replace("= 3", "= 4")
    assert toml_edit.changed(TEXT, "alice", {"max_tunnels": None}) == TEXT.replace("max_tunnels = 3\n", "")
    assert toml_edit.changed(TEXT, "bob", {"ports": None}) == TEXT.replace('ports = [\n    "5",\n]\n', "")
    assert toml_edit.changed(TEXT, "bob", {"ports": ["6", "7"]}) == TEXT.replace('"5",', '"6",\n    "7",')
    assert toml_edit.changed(TEXT, "bob", {"quota": 9}) == TEXT.replace('= "b"\n', '= "b"\nquota = 9\n')
    assert toml_edit.changed(TABLE.rstrip(), "alice", {"quota": 9}) == f"{TABLE}quota = 9\n"


def test_a_table_is_added_at_the_end() -> None:
    table = {"name": "carol", "ports": ["7", "8-9"], "max_ttl": 5.0}
    assert toml_edit.added(TEXT, table).startswith(TEXT)
    assert toml_edit.credentials(toml_edit.added(TEXT, table))[2] == table
    assert toml_edit.added("a = 1", table).startswith("a = 1\n\n[[credential]]\n")
    assert toml_edit.credentials(toml_edit.added("", table)) == [table]
    assert toml_edit.removed(toml_edit.added(TEXT, table), "carol").rstrip() == TEXT.rstrip()


def test_lines_may_end_with_crlf() -> None:
    text = TEXT.replace("\n", "\r\n")
    assert toml_edit.removed(text, "bob") == text.replace(SECOND.replace("\n", "\r\n"), "")
    assert toml_edit.rotated(text, "alice", "new") == text.replace("'old'", '"new"')


TABLE = '[[credential]]\nname = "alice"\nverifier = "v"\n'
IN_A_STRING = f'text = """\n{TABLE}"""\n' + TABLE.replace("credential", '"\\u0063redential"')
"""A string that looks like a credential table, and a table whose header does not."""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (IN_A_STRING, "edit the file by hand"),
        ('credential = [{name = "alice", verifier = "v"}]', "edit the file by hand"),
        ('a = """\n[[credential]]\n"""\n[[credential]]\nname = "alice"\nverifier = "v"', "edit the file by hand"),
        ("[[credential]]\nname = \"alice\"\nverifier = '''v'''", "edit the file by hand"),
        ('[[credential]]\nname = "alice"\n"verifier" = "v"', "edit the file by hand"),
        ('[[credential]]\nname = "alice"\nsecret_file = "s"', "no verifier but a secret_file"),
        ('[[credential]]\nname = "bob"', "no credential 'alice'"),
        ('[[credential]]\nname = "alice"\n[[credential]]\nname = "alice"', "more than one credential 'alice'"),
        ("credential = 1", "edit the file by hand"),
        ("credential = ", "not valid TOML"),
    ],
)
def test_a_change_that_cannot_be_verified_is_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        toml_edit.rotated(text, "alice", "new")


def test_adding_an_existing_name_is_refused() -> None:
    with pytest.raises(UsageError, match="credential 'bob' already exists"):
        toml_edit.added(TEXT, {"name": "bob"})
    with pytest.raises(UsageError, match="edit the file by hand"):
        toml_edit.added("credential = []", {"name": "bob"})


PIECES = (
    *("[[credential]]\n", " [[ credential ]] # c\n", "# [[credential]]\n", "[log]\n", "\n", "credential = []\n"),
    *('name = "alice"\n', 'name = "bob"\n', 'verifier = "v"\n', "verifier = 'v'\n"),
    *("x = [\n", "[1],\n", "]\n", '"""\n', 's = """\n', "'''\n", "s = '''\n"),
)


@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_only_one_credential_changes_in_any_text(text: str) -> None:
    for verifier in (None, "new"):
        try:
            new = toml_edit.rotated(text, "alice", verifier) if verifier else toml_edit.removed(text, "alice")
        except UsageError:
            continue
        before, after = tomllib.loads(text), tomllib.loads(new)
        others = [table for table in before.pop("credential") if table.get("name") != "alice"]
        assert [table for table in after.pop("credential", []) if table.get("name") != "alice"] == others
        assert before == after
