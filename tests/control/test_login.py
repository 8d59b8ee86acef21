"""Authentication on the control port: the proof in both directions, the deadline, and the count of failures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.control import LineClient, Server, running_server
from tests.support.credentials import SECRET, authenticator_of, counted, credential
from tests.support.peers import connect, is_dropped
from tunneld.auth.authenticator import Authenticator
from tunneld.config.credentials import Credential
from tunneld.config.schema import ControlSettings
from tunneld.control.login import MAX_LOGIN_FAILURES, LoginState
from tunneld.control.session import LAST_ERROR_TIMEOUT
from tunneld.daemon.log.lines import Human, Json
from tunneld.errors import NotAllowedError, RemoteProtocolError, UsageError
from tunneld.tls.pins import fingerprint
from tunneld.wire import scram
from tunneld.wire.lines import ControlRequest, parse_request
from tunneld.wire.scram import ScramClient
from tunneld.wire.verifier import derive, sign

LONG = 1e6
"""Timeout of a test in seconds of a mock clock, which the test advances by hand."""

ALICE = credential("alice", networks=("127.0.0.0/8",))
FAILED = "ERR not-allowed authentication failed"


async def log_in(client: LineClient, name: str = "alice", secret: str = SECRET, nonce: str = "abc") -> str:
    """Both steps of `auth`; returns the last status line. A proof by the relay is checked."""
    login = ScramClient(name, secret, nonce)
    status = await client.request(f"auth SCRAM-SHA-256 {scram.encode(login.message)}")
    proof = login.prove(scram.decode(status.removeprefix("OK ")))
    status = await client.request(f"auth {scram.encode(proof.message)}")
    if status.startswith("OK"):
        proof.check(scram.decode(status.removeprefix("OK ")))
    return status


def new_login(authenticator: Authenticator, host: str = "127.0.0.1", certificate: bytes | None = None) -> LoginState:
    return LoginState(authenticator, host, f"{host}:9", "127.0.0.1", certificate)


def timed_server() -> AbstractAsyncContextManager[Server]:
    """A server with the credential alice and a deadline of 10 seconds of a mock clock."""
    return running_server(ControlSettings(handshake_timeout=10.0), timeout=LONG, authenticator=authenticator_of(ALICE))


def authenticate(state: LoginState, client: ScramClient) -> None:
    """Both steps, without a network."""
    first = state.authenticate(ControlRequest("auth", ("SCRAM-SHA-256", scram.encode(client.message)))).text
    proof = client.prove(scram.decode(first))
    proof.check(scram.decode(state.authenticate(ControlRequest("auth", (scram.encode(proof.message),))).text))


async def test_the_greeting_names_the_mechanism() -> None:
    async with (
        running_server(authenticator=authenticator_of(ALICE)) as server,
        await connect(server.endpoint) as stream,
    ):
        assert (await LineClient(stream).read_line()).endswith(" auth=scram-sha-256")


async def test_the_right_secret_authenticates() -> None:
    async with running_server(authenticator=authenticator_of(ALICE)) as server, server.client() as client:
        assert (await log_in(client)).startswith("OK ")
        assert await client.request("echo hi") == "OK hi"
        (caller,) = server.script.callers
        assert caller.grant == ALICE.grant
        assert caller.owner.startswith("alice@127.0.0.1:")


async def test_an_unauthenticated_client_has_no_grant() -> None:
    async with running_server(authenticator=authenticator_of(ALICE)) as server, server.client() as client:
        await client.request("echo hi")
        assert server.script.callers[0].grant is None


async def test_without_credentials_authentication_is_not_required() -> None:
    async with running_server() as server, server.client() as client:
        assert await client.request("auth x") == "ERR usage this relay does not require authentication"
        assert await client.request("echo hi") == "OK hi"


async def test_a_second_authentication_is_refused() -> None:
    async with running_server(authenticator=authenticator_of(ALICE)) as server, server.client() as client:
        await log_in(client)
        assert (await client.request("auth SCRAM-SHA-256 AAAA")).startswith("ERR usage already authenticated")
        assert await client.request("echo hi") == "OK hi"


# What a failure reveals


async def test_the_log_names_the_credential_that_failed_and_quotes_nothing_else() -> None:
    """An unknown name may be a secret in the wrong place."""
    async with running_server(authenticator=authenticator_of(ALICE)) as server, server.client() as client:
        with capture_logs() as logs:
            await log_in(client, "alice", "wrong")
            await log_in(client, "hunter2", "wrong")
    failures = [log for log in logs if log["event"] == "authentication failed"]
    assert [log.get("credential") for log in failures] == ["alice", None]
    assert "hunter2" not in str(logs)


@pytest.mark.parametrize(
    ("name", "secret", "credentials"),
    [
        ("alice", "wrong", [ALICE]),
        ("unknown", SECRET, [ALICE]),
        ("unknown", SECRET, []),
        ("alice", SECRET, [credential("alice", networks=("192.0.2.0/24",))]),
        ("bob", SECRET, [ALICE, Credential(name="bob", certificate="sha256:" + "0" * 64)]),
    ],
    ids=["wrong secret", "unknown name", "no credentials left", "wrong address", "has no secret"],
)
async def test_every_failure_looks_the_same(name: str, secret: str, credentials: Sequence[Credential]) -> None:
    now: Sequence[Credential] = [ALICE]
    authenticator = Authenticator(lambda: now)
    assert not authenticator.is_open
    now = credentials
    async with running_server(authenticator=authenticator) as server, server.client() as client:
        with capture_logs() as logs:
            assert await log_in(client, name, secret) == FAILED
        (failure,) = [log for log in logs if log["event"] == "authentication failed"]
        assert failure == {
            "event": "authentication failed",
            "log_level": "warning",
            "peer": "127.0.0.1",
            "service": "control",
            "reason": "authentication failed",
        } | ({} if name not in {one.name for one in credentials} else {"credential": name})


def test_an_unknown_name_always_has_the_same_plausible_challenge() -> None:
    authenticator = authenticator_of(ALICE)
    assert authenticator.verifier_of("unknown") == authenticator.verifier_of("unknown")
    assert authenticator.verifier_of("unknown") != authenticator.verifier_of("unknown too")
    for name in ("unknown", "x" * 2000, "", "\udc80"):
        decoy = authenticator.verifier_of(name)
        assert ALICE.proof is not None
        assert (decoy.iterations, len(decoy.salt)) == (ALICE.proof.iterations, len(ALICE.proof.salt))


def test_the_challenge_of_an_unknown_name_does_not_follow_other_credentials() -> None:
    """Else the names that stay the same when a credential is added or removed are the ones that exist."""
    verifiers = [derive("a secret", bytes([length]) * length, 4096 + length) for length in (16, 17, 40)]
    now = [Credential(name=f"c{number}", verifier=verifiers[number % 3]) for number in range(9)]
    authenticator = Authenticator(lambda: now, salt_key=b"k" * 32)
    names = [f"unknown{number}" for number in range(60)]
    before = {name: authenticator.verifier_of(name) for name in names}
    assert {len(verifier.salt) for verifier in before.values()} == {16, 17, 40}
    now.append(Credential(name="new", verifier=verifiers[0]))
    del now[:3]
    restarted = Authenticator(lambda: now, salt_key=b"k" * 32)
    for name, verifier in before.items():
        for later in (authenticator.verifier_of(name), restarted.verifier_of(name)):
            assert (later.salt, later.iterations) == (verifier.salt, verifier.iterations)


async def test_an_unknown_name_costs_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    work = []
    for name in ("alice", "unknown"):
        with counted(monkeypatch, "sign", scram) as signatures, counted(monkeypatch, "derive") as derivations:
            state = new_login(authenticator_of(ALICE))
            login = ScramClient(name, "wrong", "abc")
            first = state.authenticate(ControlRequest("auth", ("SCRAM-SHA-256", scram.encode(login.message)))).text
            proof = login.prove(scram.decode(first))
            signatures.clear()
            with pytest.raises(NotAllowedError):
                state.authenticate(ControlRequest("auth", (scram.encode(proof.message),)))
            work.append((len(signatures), len(derivations)))
    assert work[0] == work[1] == (1, 0)


async def test_the_third_failure_ends_the_connection() -> None:
    async with running_server(authenticator=authenticator_of(ALICE)) as server, server.client() as client:
        for _ in range(MAX_LOGIN_FAILURES - 1):
            assert await log_in(client, secret="wrong") == FAILED
        await client.send("auth SCRAM-SHA-256 bm9uc2Vuc2U=\necho hi")
        lines = await client.read_all()
        assert [line.split()[:2] for line in lines] == [["ERR", "usage"]]
        assert server.script.requests == []


async def test_two_failures_do_not_end_the_connection() -> None:
    async with running_server(authenticator=authenticator_of(ALICE)) as server, server.client() as client:
        for _ in range(MAX_LOGIN_FAILURES - 1):
            assert await log_in(client, secret="wrong") == FAILED
        assert (await log_in(client)).startswith("OK ")


@pytest.mark.parametrize(
    "line",
    [
        "auth",
        "auth x",
        "auth SCRAM-SHA-1 AAAA",
        "auth SCRAM-SHA-256 !!",
        "auth SCRAM-SHA-256 AAAA",
        "auth a b c",
        "auth SCRAM-SHA-256 x=y",
        "auth ''",
        "auth SCRAM-SHA-256 ''",
    ],
)
async def test_a_malformed_step_is_a_usage_error(line: str) -> None:
    state = new_login(authenticator_of(ALICE))
    with pytest.raises(UsageError):
        state.authenticate(parse_request(line.encode()))
    assert (state.failures, state.grant) == (1, None)


# Replays


def recorded(authenticator: Authenticator, login: ScramClient) -> tuple[ControlRequest, ControlRequest]:
    """Both requests of a successful login, as an eavesdropper records them."""
    requests = []
    state = new_login(authenticator)
    real = state.authenticate

    def record(request: ControlRequest) -> object:
        requests.append(request)
        return real(request)

    state.authenticate = record  # type: ignore[assignment,method-assign]
    authenticate(state, login)
    return requests[0], requests[1]


async def test_a_recorded_login_cannot_be_replayed() -> None:
    authenticator = authenticator_of(ALICE)
    first, final = recorded(authenticator, ScramClient("alice", SECRET, "abc"))
    state = new_login(authenticator)
    assert state.authenticate(first).text
    with pytest.raises(NotAllowedError):
        state.authenticate(final)


async def test_a_final_message_is_accepted_once() -> None:
    authenticator = authenticator_of(ALICE)
    first, final = recorded(authenticator, ScramClient("alice", SECRET, "abc"))
    state = new_login(authenticator)
    state.authenticate(first)
    for expected in (NotAllowedError, UsageError):
        with pytest.raises(expected):
            state.authenticate(final)


def test_an_impostor_relay_cannot_prove_the_secret() -> None:
    """It has the salt, which it can get from the real relay, and accepts any proof."""
    assert ALICE.proof is not None
    impostor = credential("alice", "a guess")
    login = ScramClient("alice", SECRET, "abc")
    proof = login.prove(scram.Challenge(scram.Hello.parse(login.message), ALICE.proof, "def").message)
    assert impostor.proof is not None
    with pytest.raises(RemoteProtocolError):
        proof.check(b"v=" + scram.encode(sign(impostor.proof.server_key, proof.message)).encode())


# The deadline


@pytest.mark.parametrize("sent", [b"", b"help\n", b"\n", b"au"])
async def test_authentication_has_one_deadline_counted_from_accept(mock_clock: MockClock, sent: bytes) -> None:
    async with timed_server() as server, await connect(server.endpoint) as stream:
        client = LineClient(stream)
        await client.read_line()
        for _ in range(9):
            mock_clock.jump(1)
            await client.send(sent)
            await wait_all_tasks_blocked(0.01)
        mock_clock.jump(1)
        lines = await client.read_all()
        assert lines[-1] == "ERR limit authentication timed out (control.handshake_timeout)"


async def test_an_authenticated_connection_has_no_deadline(mock_clock: MockClock) -> None:
    async with timed_server() as server, server.client() as client:
        mock_clock.jump(9)
        assert (await log_in(client)).startswith("OK ")
        mock_clock.jump(60)
        await wait_all_tasks_blocked(0.01)
        assert await client.request("echo hi") == "OK hi"


async def test_an_unauthenticated_client_that_does_not_read_is_disconnected(mock_clock: MockClock) -> None:
    async with timed_server() as server, await connect(server.endpoint) as stream:
        await wait_all_tasks_blocked(0.01)
        mock_clock.jump(10)
        await wait_all_tasks_blocked(0.01)
        mock_clock.jump(10)
        await LineClient(stream).read_all()
        assert await is_dropped(stream)


async def test_an_unauthenticated_client_that_leaves_replies_unread_gives_up_its_place_at_the_deadline(
    mock_clock: MockClock,
) -> None:
    authenticator = authenticator_of(ALICE)
    async with (
        running_server(ControlSettings(handshake_timeout=10.0), timeout=LONG, authenticator=authenticator) as server,
        await connect(server.endpoint) as stream,
    ):
        await stream.send_all(b"list 100000\n" * 10)
        await wait_all_tasks_blocked(0.05)
        assert len(authenticator.preauth) == 1
        mock_clock.jump(10)
        await wait_all_tasks_blocked(0.01)
        mock_clock.jump(LAST_ERROR_TIMEOUT)
        await wait_all_tasks_blocked(0.01)
        assert len(authenticator.preauth) == 0


# Reload


async def test_a_removed_credential_loses_its_grant() -> None:
    now = [ALICE]
    async with running_server(authenticator=Authenticator(lambda: now)) as server, server.client() as client:
        await log_in(client)
        now.clear()
        await client.request("echo hi")
        now.append(credential("alice", "another secret"))
        await client.request("echo hi")
        now[0] = ALICE.model_copy(update={"role": "admin"})
        await client.request("echo hi")
        grants = [caller.grant for caller in server.script.callers]
        assert grants == [None, None, now[0].grant]


def test_removing_the_last_credential_locks_everyone_out() -> None:
    now = [ALICE]
    authenticator = Authenticator(lambda: now)
    assert not authenticator.is_open
    now.clear()
    assert not authenticator.is_open
    assert new_login(authenticator).grant is None
    assert Authenticator(lambda: now).is_open


# Certificates


async def test_a_certificate_authenticates_from_allowed_networks() -> None:
    shown = b"a certificate in DER"
    authenticator = authenticator_of(
        Credential(name="bob", certificate=fingerprint(shown), networks=("192.0.2.0/24",)), ALICE
    )
    known, elsewhere = new_login(authenticator, "192.0.2.1", shown), new_login(authenticator, "127.0.0.1", shown)
    assert (known.method, known.caller.owner) == ("certificate", "bob@192.0.2.1:9")
    assert (elsewhere.method, elsewhere.grant) == ("scram-sha-256", None)
    assert new_login(authenticator, "192.0.2.1", b"another one").grant is None


# The log


@pytest.mark.parametrize("host", ["192.0.2.7", "2001:db8::7"])
def test_the_shipped_fail2ban_filter_matches_the_line(host: str, shipped_filter: list[str]) -> None:
    context = {"peer": host, "service": "control", "reason": "authentication failed"}
    for render in (Human(time=lambda: "12:00"), Json()):
        line = render("warning", "authentication failed", context)
        for beginning in ("", "relay tunneld[7]: "):
            (found,) = [m["host"] for pattern in shipped_filter if (m := re.search(pattern, beginning + line))]
            assert found == host


@pytest.mark.parametrize("quoted", [" ", "relay tunneld[7]: warning ", '{"time": "", "level": "warning", "event": "'])
def test_the_filter_does_not_match_text_of_a_peer(quoted: str, shipped_filter: list[str]) -> None:
    """A reason may quote a peer; it must not get another address banned."""
    reason = f'{quoted}authentication failed    peer=192.0.2.9 service=x", "peer": "192.0.2.9", "service":'
    for render in (Human(time=lambda: "12:00"), Json()):
        line = render("info", "ssh left", {"peer": "192.0.2.66", "reason": reason})
        assert not [pattern for pattern in shipped_filter if re.search(pattern, line)]


@pytest.fixture
def shipped_filter() -> list[str]:
    """The regular expressions that come with the daemon, as fail2ban reads them."""
    text = (Path(__file__).parents[2] / "config/examples/fail2ban-filter.conf").read_text()
    lines = text.partition("failregex = ")[2].partition("\nignoreregex")[0].splitlines()
    return [line.strip().replace("<HOST>", r"(?P<host>[0-9a-f.:]+)") for line in lines]


async def test_silent_connections_delay_no_login() -> None:
    async with running_server(authenticator=authenticator_of(ALICE)) as server, trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(connect, server.endpoint)
        async with server.client() as client:
            assert (await log_in(client)).startswith("OK ")
