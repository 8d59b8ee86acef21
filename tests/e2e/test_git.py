"""git clone and git push through a tunnel, to git's own daemon."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from tests.support.exposed import exposed
from tests.support.programs import free_port, listening, run

Find = Callable[[str], str]
ME = ["-c", "user.name=me", "-c", "user.email=me@example.org", "-c", "init.defaultBranch=main"]


# `git daemon` would run the daemon as a child of its own, which outlives it


async def test_a_clone_and_a_push(tmp_path: Path, program_path: Find, way: str) -> None:
    git = [program_path("git"), *ME]
    await run([*git, "init", "-q", f"{tmp_path}/first"])
    for number in range(20):
        (tmp_path / "first" / f"file{number}").write_bytes(hashlib.sha512(b"%d" % number).digest() * 1000)
        await run([*git, "-C", f"{tmp_path}/first", "add", "."])
        await run([*git, "-C", f"{tmp_path}/first", "commit", "-q", "-m", f"commit {number}"])
    await run([*git, "clone", "-q", "--bare", f"{tmp_path}/first", f"{tmp_path}/served/it.git"])
    port = await free_port()
    words = ["--export-all", "--enable=receive-pack", f"--base-path={tmp_path}/served", "--listen=127.0.0.1"]
    programs = (await run([*git, "--exec-path"])).strip()
    daemon = [f"{programs}/git-daemon", "--reuseaddr", *words, f"--port={port}"]
    async with listening(daemon, port), exposed(way, tmp_path, str(port)) as server:
        await run([*git, "clone", "-q", server.url("/it.git", "git"), f"{tmp_path}/second"])
        assert await head(git, tmp_path / "second") == await head(git, tmp_path / "first")
        await run([*git, "-C", f"{tmp_path}/second", "commit", "-q", "--allow-empty", "-m", "from the visitor"])
        await run([*git, "-C", f"{tmp_path}/second", "push", "-q", "origin", "HEAD"])
        assert await head(git, tmp_path / "served" / "it.git") == await head(git, tmp_path / "second")
        await run([*git, "-C", f"{tmp_path}/second", "fsck", "--strict"])


async def head(git: list[str], folder: Path) -> str:
    return await run([*git, "-C", str(folder), "rev-parse", "HEAD"])
