"""Fixtures for all tests: a running engine, a running service, system programs that may be missing."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Callable, Generator, Iterator

import pytest
import trio
from hypothesis import settings

from tests.support.peers import close_connections
from tests.support.system import find_program, only_skip
from tunneld.backends import BACKENDS
from tunneld.cli.common import COMPILED
from tunneld.config.schema import ControlSettings, Settings, TunnelSettings
from tunneld.directory.service import TunnelService
from tunneld.engine import new_engine
from tunneld.engine.engine import Engine

settings.register_profile("house", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("house")


BIG_SECONDS = 1200


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that replace functions of the data plane if it is compiled, and give big tests their time."""
    for item in items:
        if COMPILED and item.get_closest_marker("interpreted"):
            item.add_marker(pytest.mark.skip(reason="the data plane is compiled"))
        if item.get_closest_marker("big"):
            item.add_marker(pytest.mark.timeout(BIG_SECONDS))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """Report a skip inside a nursery with its reason, which pytest-trio drops."""
    try:
        return (yield)
    except (BaseExceptionGroup, pytest.skip.Exception) as raised:
        group = raised if isinstance(raised, BaseExceptionGroup) else raised.__context__
        skip = only_skip(group) if isinstance(group, BaseExceptionGroup) else None
        if skip is None:
            raise
        raise skip from None


@pytest.fixture(autouse=True, scope="session")
def _signals_as_on_a_terminal() -> None:
    """Handle SIGINT, which a shell ignores for background jobs, and which started programs would ignore, too."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _close_connections() -> Iterator[None]:
    """Close all connections of a test at its end."""
    yield
    close_connections()


@pytest.fixture(autouse=True, scope="session")
def _state_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give daemons of tests a state folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.delenv("STATE_DIRECTORY", raising=False)
        yield


@pytest.fixture
async def engine(nursery: trio.Nursery) -> AsyncIterator[Engine]:
    """A running engine."""
    engine = new_engine()
    await nursery.start(engine.run)
    yield engine
    nursery.cancel_scope.cancel()


@pytest.fixture
def tunnel_settings() -> TunnelSettings:
    """Any free port; a module overrides this fixture for other settings."""
    return TunnelSettings(ports="0")


@pytest.fixture
async def service(nursery: trio.Nursery, engine: Engine, tunnel_settings: TunnelSettings) -> TunnelService:
    """A running service on loopback."""
    settings = Settings(tunnels=tunnel_settings, control=ControlSettings(credential_share=1.0))  # ranges are tiny
    service = TunnelService(lambda: settings, engine, BACKENDS)
    await nursery.start(service.run)
    return service


@pytest.fixture
def program_path() -> Callable[[str], str]:
    """A function that returns the path of a system program, and skips the test if it is missing."""
    return find_program
