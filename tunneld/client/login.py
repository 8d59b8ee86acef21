"""The client's half of authentication: prove that we know the secret, and see that the relay does.

A relay that knows it not is not ours, whatever its address: somebody who stands in its place would pass on every
tunnel that we open there. So a credential that was given is used or the connection ends.
"""

from __future__ import annotations

import secrets

import trio

from tunneld.client.exchange import ControlExchange
from tunneld.errors import NotAllowedError, RefusedError, RemoteProtocolError, UsageError
from tunneld.net.endpoint import Endpoint
from tunneld.wire import scram
from tunneld.wire.lines import Request
from tunneld.wire.scram import ScramClient
from tunneld.wire.verifier import MECHANISM

NONCE_OCTETS = 18
"""Of randomness, 24 characters: never the same twice."""


async def authenticate(
    exchange: ControlExchange, relay: Endpoint, method: str, credential: tuple[str, str] | None
) -> None:
    """Do what the greeting's `auth=` asks for, with a name and its secret.

    Raises `NotAllowedError` where that cannot be done with what we have, `RefusedError` where the relay says no,
    `RemoteProtocolError` where it does not know the secret itself, and as `ControlExchange.request`.
    """
    if method == "none" and credential is not None:
        raise NotAllowedError(
            f"relay {relay} asks for no credential, so it cannot prove that it knows the secret of {credential[0]!r}; "
            "it may not be yours; leave the credential out to go on"
        )
    if method == "none" or (method == "certificate" and relay.scheme == "tls"):
        return  # in TLS both sides have shown certificates, and have checked them
    if method != MECHANISM.lower():
        raise NotAllowedError(f"relay {relay} wants authentication by {method!r}, which is not possible here")
    if credential is None:
        raise NotAllowedError(f"relay {relay} wants a credential: give the name of one and its secret")
    await _log_in(exchange, relay, ScramClient(*credential, secrets.token_urlsafe(NONCE_OCTETS)))


async def _log_in(exchange: ControlExchange, relay: Endpoint, login: ScramClient) -> None:
    """The two steps of RFC 5802 §3; the slow part is in a thread."""
    try:
        challenge = await _say(exchange, MECHANISM, scram.encode(login.message, padded=False))
        proof = await trio.to_thread.run_sync(login.prove, challenge)
        proof.check(await _say(exchange, scram.encode(proof.message, padded=False)))
    except RefusedError as error:
        advice = "; check its name and its secret" if error.reply_code == NotAllowedError.code else ""
        raise RefusedError(
            error.reply_code, f"relay {relay} refused the credential {login.name!r}: {error}{advice}"
        ) from None
    except RemoteProtocolError as error:
        detail = f"relay {relay} failed to prove that it knows the secret of {login.name!r}: {error}"
        raise RemoteProtocolError(f"{detail}; somebody may stand in its place") from None


async def _say(exchange: ControlExchange, *words: str) -> bytes:
    """One `auth` request; the text of its answer is a message. Raises `RemoteProtocolError` where it is none."""
    text = (await exchange.request(Request("auth", words))).text
    try:
        return scram.decode(text)
    except UsageError as error:
        raise RemoteProtocolError(f"its answer is none: {error}") from None
