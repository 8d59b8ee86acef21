"""PostgreSQL through a tunnel: psql, a bulk copy each way, and pgbench with many clients at once."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from tests.support.exposed import exposed
from tests.support.peers import PATIENCE, read_all
from tests.support.programs import free_port, listening, program, run
from tests.support.system import lacking

Find = Callable[[str], str]
OWNER = "postgres"
"""The user that the PostgreSQL package creates, since it does not run as root."""


@asynccontextmanager
async def postgres(find: Find) -> AsyncIterator[str]:
    """Run an empty PostgreSQL cluster in a folder that `OWNER` can access, and yield its port."""
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    options: dict[str, Any] = {}
    if os.getuid() == 0:
        try:
            owner = pwd.getpwnam(OWNER)
        except KeyError:
            lacking(f"no user {OWNER}, and PostgreSQL does not run as root")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        options = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
    try:
        initdb = [find("initdb"), "-D", f"{folder}/data", "-U", OWNER, "-A", "trust", "--no-sync"]
        await run(initdb, **options, cwd=folder)
        port = await free_port()
        command = [find("postgres"), "-D", f"{folder}/data", "-p", str(port), "-k", str(folder), "-F"]
        async with listening(command, port, **options, cwd=folder) as server:
            yield str(port)
            server.send_signal(signal.SIGINT)
            await server.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def test_psql_and_pgbench(tmp_path: Path, program_path: Find, way: str) -> None:
    async with postgres(program_path) as port, exposed(way, tmp_path, port) as server:
        where = ["-h", server.address.host, "-p", str(server.address.port), "-U", OWNER]
        psql = [program_path("psql"), *where, "-d", "postgres", "-v", "ON_ERROR_STOP=1", "-Atq"]
        await run([*psql, "-c", "create table numbers as select generate_series(1, 200000) as number"])
        copied = await run([*psql, "-c", "copy numbers to stdout"])
        assert copied.split() == [str(number) for number in range(1, 200001)]
        await run(
            [*psql, "-c", "create table copied (number int)", "-c", "copy copied from stdin"], stdin=copied.encode()
        )
        assert await run([*psql, "-c", "select sum(number), count(*) from copied"]) == "20000100000|200000\n"
        pgbench = [program_path("pgbench"), *where]
        await run([*pgbench, "-i", "-q", "-s", "1", "postgres"])
        said = await run([*pgbench, "-c", "10", "-t", "20", "-n", "postgres"])
        assert "number of transactions actually processed: 200/200" in said


async def test_a_query_is_cancelled_over_a_second_connection(tmp_path: Path, program_path: Find, way: str) -> None:
    """As psql does on Ctrl-C: a second connection names the query to cancel."""
    async with postgres(program_path) as port, exposed(way, tmp_path, port) as server:
        where = ["-h", server.address.host, "-p", str(server.address.port), "-U", OWNER, "-d", "postgres"]
        psql = [program_path("psql"), *where, "-At"]
        sleeping = [*psql, "-c", "select pg_sleep(300)"]
        async with program(sleeping, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as sleeper:
            busy = "select count(*) from pg_stat_activity where query = 'select pg_sleep(300)' and state = 'active'"
            with trio.fail_after(PATIENCE):
                while await run([*psql, "-c", busy]) != "1\n":
                    pass
            sleeper.send_signal(signal.SIGINT)
            assert sleeper.stderr is not None
            with trio.fail_after(PATIENCE):
                assert b"canceling statement due to user request" in await read_all(sleeper.stderr)
