"""The address of a private tunnel belongs to the credential that opened it, and to the holder of the key."""

from __future__ import annotations

import pytest

from tests.directory.test_reservations import ALICE, BOB, HOUR, open_as
from tunneld.config.schema import TunnelSettings
from tunneld.directory.service import TunnelService
from tunneld.errors import LimitReachedError, NotAllowedError, UsageError
from tunneld.net.address import Private
from tunneld.policy.access import EVERYBODY, Grant
from tunneld.policy.private import PrivateClaim, claimed_text
from tunneld.tls.identity import Identity
from tunneld.tunnel.tunnel import Tunnel

NODE, OTHER = Identity.from_seed(bytes(32)), Identity.from_seed(bytes([1]) * 32)
SHELL = Private(NODE.id, "shell")


@pytest.fixture
def tunnel_settings() -> TunnelSettings:
    return TunnelSettings(ports="0", reservation=HOUR)


async def open_private(
    service: TunnelService, grant: Grant, identity: Identity = NODE, name: str = "shell", host: str = "127.0.0.1"
) -> Tunnel:
    """Open one as an agent of this credential does, with the key of `identity`."""
    claim = PrivateClaim(identity.public_key(), identity.sign(claimed_text(grant.name, name)))
    return await open_as(service, grant, host, name=name, persist="yes", private=str(claim))


def door(service: TunnelService) -> object:
    """Where visitors of the address are taken."""
    return service.privates.find(SHELL)


async def test_no_port_is_open_for_it(service: TunnelService) -> None:
    tunnel = await open_private(service, ALICE)
    assert tunnel.addresses == (SHELL,)
    assert str(tunnel.client_uri) == f"private://{SHELL}"
    assert not tunnel.ingresses[0].listeners
    for reference in (str(SHELL), f"private://{SHELL}", tunnel.id):
        assert (await service.find(reference)).id == tunnel.id
    assert door(service) is tunnel.ingresses[0]


async def test_another_credential_cannot_have_the_address_while_it_is_open_or_reserved(service: TunnelService) -> None:
    """Even with the same key: the relay cannot tell which of the two is the host that visitors mean."""
    first = await open_private(service, ALICE)
    with pytest.raises(LimitReachedError, match=f"private tunnel {SHELL} is open with another credential"):
        await open_private(service, BOB)
    await service.close(first.id, keep=True)
    with pytest.raises(LimitReachedError, match=f"private tunnel {SHELL} is reserved for another tunnel"):
        await open_private(service, BOB)
    again = await open_private(service, ALICE)
    assert (again.addresses, str(again.server_uri)) == (first.addresses, str(first.server_uri))
    await service.close(again.id)
    assert (await open_private(service, BOB)).addresses == (SHELL,)


async def test_each_key_has_the_name_for_itself(service: TunnelService) -> None:
    first, second = await open_private(service, ALICE), await open_private(service, BOB, OTHER)
    assert {first.addresses, second.addresses} == {(SHELL,), (Private(OTHER.id, "shell"),)}


async def test_a_new_agent_of_the_same_credential_takes_over(service: TunnelService) -> None:
    first = await open_private(service, ALICE)
    second = await open_private(service, ALICE, host="192.0.2.7")
    await first.wait_closed()
    assert door(service) is second.ingresses[0]


async def test_a_claim_is_good_for_one_credential_and_one_name(service: TunnelService) -> None:
    claim = str(PrivateClaim(NODE.public_key(), NODE.sign(claimed_text("alice", "shell"))))
    for grant, name in ((BOB, "shell"), (ALICE, "web"), (EVERYBODY, "shell")):
        with pytest.raises(NotAllowedError, match="the signature in private= does not fit"):
            await open_as(service, grant, name=name, persist="yes", private=claim)
    forged = str(PrivateClaim(OTHER.public_key(), NODE.sign(claimed_text("alice", "shell"))))
    with pytest.raises(NotAllowedError, match="does not fit"):
        await open_as(service, ALICE, name="shell", persist="yes", private=forged)
    assert not service.tunnels()


async def test_an_agent_with_a_certificate_does_not_know_the_name_of_its_credential(service: TunnelService) -> None:
    claim = str(PrivateClaim(NODE.public_key(), NODE.sign(claimed_text("", "shell"))))
    assert (await open_as(service, ALICE, name="shell", persist="yes", private=claim)).addresses == (SHELL,)


async def test_without_credentials_the_key_is_the_owner(service: TunnelService) -> None:
    """An agent that has moved to another address gets its tunnel again at once; another key does not."""
    first = await open_private(service, EVERYBODY, host="192.0.2.1")
    second = await open_private(service, EVERYBODY, host="192.0.2.2")
    await first.wait_closed()
    assert door(service) is second.ingresses[0]
    third = await open_private(service, EVERYBODY, OTHER, host="192.0.2.2")
    assert not second.is_closing
    assert third.addresses == (Private(OTHER.id, "shell"),)


async def test_it_has_no_public_address_beside(service: TunnelService) -> None:
    claim = str(PrivateClaim(NODE.public_key(), NODE.sign(claimed_text("alice", "shell"))))
    with pytest.raises(UsageError, match="option client_port is for public tunnels"):
        await open_as(service, ALICE, name="shell", persist="yes", private=claim, client_port="20000")


async def test_tickets_are_bounded_and_expire(service: TunnelService) -> None:
    privates = service.privates
    privates.invite(SHELL, "ticket", 0.0, 60.0)
    assert privates.invited("ticket", 59.0) == SHELL
    assert privates.invited("ticket", 60.0) is None
    assert privates.invited("another", 0.0) is None
    for number in range(99):
        privates.invite(SHELL, f"ticket {number}", 0.0, 60.0)
    with pytest.raises(LimitReachedError, match="100 have not expired yet"):
        privates.invite(SHELL, "one more", 0.0, 60.0)
    privates.invite(Private(OTHER.id, "shell"), "of another", 0.0, 60.0)
    privates.invite(SHELL, "later", 61.0, 60.0)
