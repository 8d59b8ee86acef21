"""The addresses of tunnels: parsed, printed, compared."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.errors import UsageError
from tunneld.net.address import MAX_NAME, Address, HostName, Port, parse_address

LABELS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
PATHS = st.sampled_from(["", "/api", "/api/v1.0", "/~user/%20x"])
NAMES = st.builds(
    lambda star, labels, last, path: HostName(star + ".".join([*labels, last]), path),
    st.sampled_from(["", "*."]), st.lists(LABELS, max_size=4), LABELS, PATHS,
)  # fmt: skip
ADDRESSES = st.builds(Port, st.integers(1, 65535)) | NAMES.filter(lambda one: not one.name.split(".")[-1].isdigit())


@given(ADDRESSES)
def test_an_address_is_parsed_from_what_it_prints(address: Address) -> None:
    assert parse_address(str(address)) == address
    assert hash(parse_address(str(address))) == hash(address)


def test_a_name_is_compared_in_lower_case_without_the_final_dot() -> None:
    assert parse_address("Blog.Example.ORG.") == HostName("blog.example.org")
    assert parse_address("A.org/Api/") == HostName("a.org", "/Api")


def test_a_port_and_a_name_are_different_addresses() -> None:
    assert len({Port(80), Port(80), parse_address("a80"), HostName("a80")}) == 2


@pytest.mark.parametrize(
    "text",
    [
        *("", ".", "0", "65536", "-1", "a..b", "-a.org", "a-.org", "a_b.org", "ä.org", "192.0.2.1", "[::1]", "a b"),
        *("*", "*.", "*.*.org", "a.*.org", "https://a.org", "a/../b", "a//b", "a/b?c", "a/ b", "a/.", "a/" + "b" * 256),
        *("a:80", "a" * 64, ".".join(["a" * 49] * 5) + ".toolong"),
    ],
)
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_address(text)


def test_the_longest_name() -> None:
    name = ".".join(["a" * 49] * 5) + ".abc"
    assert len(name) == MAX_NAME
    assert parse_address(name) == HostName(name)
