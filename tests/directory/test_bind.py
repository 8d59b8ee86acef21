"""The address at which a tunnel has its port: where the credential allows it, and the relay listens."""

from __future__ import annotations

import sys

import pytest

from tests.support.peers import connect, is_refused
from tests.support.visitors import open_tunnel
from tunneld.config.schema import TunnelSettings
from tunneld.directory.opening import _check_bind
from tunneld.directory.service import TunnelService
from tunneld.errors import ListenError, NotAllowedError, UsageError
from tunneld.net.endpoint import Endpoint, parse_network
from tunneld.policy.access import Grant, Role, permit
from tunneld.policy.options import TunnelOptions

HERE = (parse_network("192.0.2.80/32"), parse_network("2001:db8::/64"))


def permitted(grant: Grant, address: str) -> TunnelOptions:
    return permit(grant, "tcp", TunnelOptions.parse({"bind": address}), "127.0.0.1", 0)


@pytest.mark.parametrize("address", ["192.0.2.80", "2001:db8::7"])
def test_a_credential_may_request_the_addresses_that_it_is_given(address: str) -> None:
    assert permitted(Grant("alice", bind=HERE), address).bind == address


@pytest.mark.parametrize(
    ("grant", "reason"),
    [
        (Grant("alice"), "credential 'alice' may not use the address 192.0.2.81, the relay chooses it"),
        (Grant("alice", bind=HERE), "only addresses in 192.0.2.80/32, 2001:db8::/64"),
        (Grant("root", Role.ADMIN, bind=HERE), "only addresses in 192.0.2.80/32, 2001:db8::/64"),
        (Grant("alice", bind=()), "the relay chooses it"),
    ],
)
def test_other_addresses_are_refused(grant: Grant, reason: str) -> None:
    with pytest.raises(NotAllowedError) as caught:
        permitted(grant, "192.0.2.81")
    assert reason in str(caught.value)


def test_an_admin_without_the_key_may_request_any() -> None:
    assert permitted(Grant("root", Role.ADMIN), "192.0.2.81").bind == "192.0.2.81"


@pytest.mark.parametrize(
    ("address", "host", "is_right"),
    [
        ("", "192.0.2.1", True),
        ("192.0.2.80", "0.0.0.0", True),
        ("2001:db8::1", "0.0.0.0", False),
        ("192.0.2.80", "::", True),
        ("192.0.2.80", "", True),
        ("192.0.2.80", "192.0.2.80", True),
        ("192.0.2.80", "192.0.2.81", False),
        ("127.0.0.2", "127.0.0.1", True),
        ("192.0.2.80", "127.0.0.1", False),
    ],
)
def test_the_relay_must_listen_there(address: str, host: str, is_right: bool) -> None:
    if is_right:
        _check_bind(address, host)
        return
    with pytest.raises(UsageError, match=f"only {host} \\(tunnels.host\\)"):
        _check_bind(address, host)


@pytest.mark.parametrize("text", ["0.0.0.0", "::", "relay.example.org", "192.0.2.0/24", ""])
def test_other_values_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        TunnelOptions.parse({"bind": text})


@pytest.mark.parametrize("words", [{"host": "blog"}])
def test_host_names_have_no_address_of_their_own(words: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="option bind is for tunnels with a port"):
        TunnelOptions.parse({"bind": "127.0.0.1", **words})


class TestOpen:
    @pytest.fixture
    def tunnel_settings(self) -> TunnelSettings:
        return TunnelSettings(host="0.0.0.0", ports="0")

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems have a single loopback address")
    async def test_the_port_is_at_that_address_alone(self, service: TunnelService) -> None:
        tunnel = await open_tunnel(service, bind="127.0.0.2")
        assert tunnel.client_uri.host == "127.0.0.2"
        await connect(tunnel.client_uri)
        assert await is_refused(Endpoint("tcp", "127.0.0.1", tunnel.client_uri.port))

    async def test_an_address_that_the_machine_lacks_is_an_error(self, service: TunnelService) -> None:
        with pytest.raises(ListenError):
            await open_tunnel(service, bind="192.0.2.80")
