"""Units of the system's manager, or of a user's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.machine.inside.journal import JOURNAL, Line, messages, now
from tests.machine.inside.tools import WrongError, sh, wait_until

AS_USER = "setpriv --reuid {0} --regid {0} --init-groups env XDG_RUNTIME_DIR=/run/user/$(id -u {0}) "


class Unit:
    """One of them."""

    def __init__(self, name: str, user: str = "") -> None:
        self.name = name
        self._as_user = AS_USER.format(user) if user else ""
        self.ctl = f"{self._as_user}systemctl --user" if user else "systemctl"
        self._folder = Path(f"/home/{user}/.config/systemd/user" if user else "/etc/systemd/system") / f"{name}.d"
        self._whose = "_SYSTEMD_USER_UNIT" if user else "_SYSTEMD_UNIT"
        self._of_manager = "USER_UNIT" if user else "UNIT"
        self._began = 0.0

    def __getattr__(self, name: str) -> str:
        """A property, as `systemctl show` has it: `unit.MainPID`."""
        if not name[0].isupper():
            raise AttributeError(name)
        return sh(f"{self.ctl} show --value -p {name} {self.name}")

    @property
    def state(self) -> str:
        """ActiveState/SubState, both of one moment."""
        return "/".join(sh(f"{self.ctl} show --value -p ActiveState -p SubState {self.name}").split())

    def listen(self) -> None:
        """What is looked for in the journal from here on is what comes from here on."""
        self._began = now()

    def do(self, verb: str, *, status: int | None = 0) -> str:
        """`unit.do("restart")`; and `listen`, before it."""
        self.listen()
        return sh(f"{self.ctl} {verb} {self.name}", status=status)

    def journal(self) -> list[Line]:
        """Its own lines."""
        return JOURNAL.since(self._began, self._is_ours)

    def of_manager(self) -> str:
        """What systemd says of it."""
        lines = JOURNAL.since(self._began, lambda line: line.get(self._of_manager) == self.name)
        return "\n".join(messages(lines))

    def must_say(self, text: str) -> str:
        """The line with this text, waited for. Raises `WrongError`."""
        what = f"{self.name} says {text!r}"
        line = JOURNAL.wait(self._began, lambda line: self._is_ours(line) and text in line["MESSAGE"], what)
        return str(line["MESSAGE"])

    def must_not_say(self, *texts: str) -> None:
        """Raises `WrongError` where it has said any of them."""
        for said in messages(self.journal()):
            if any(text in said for text in texts):
                raise WrongError(f"{self.name} says {said!r}")

    def must_be(self, state: str) -> None:
        """Waits for an ActiveState/SubState. Raises `WrongError`."""
        wait_until(f"{self.name} is {state}", lambda: self.state == state)

    def drop_in(self, text: str) -> None:
        """What `systemctl edit` writes; empty: no more."""
        self._folder.mkdir(exist_ok=True, parents=True)
        (self._folder / "override.conf").write_text(text)
        sh(f"{self.ctl} daemon-reload")

    def _is_ours(self, line: Line) -> bool:
        return line.get(self._whose) == self.name and line.get("_COMM") != "systemctl"


def no_tracebacks(units: Sequence[Unit]) -> None:
    """Raises `WrongError` where a person who did nothing wrong would see one."""
    for unit in units:
        unit.must_not_say("Traceback", "internal error", "a bug")
