"""Completion scripts for shells. shtab makes them from the parser, so that they are always complete.

Tunnels are completed, too: the script asks the relay of the environment for a list. What a relay sends is reduced to
the characters of ids and names, because bash expands the words that it chooses from.
"""

from __future__ import annotations

import argparse

import shtab

from tunneld.cli.common import all_actions

LIST = "tunnel list --timeout 2 2>/dev/null </dev/null | cut -f1,2"
"""Prints the id and the name of each tunnel. Without a terminal, no secret is asked for."""
FILTER = r"LC_ALL=C tr -cd '[:alnum:]._\t\n-'"
TUNNEL: dict[str, str | dict[str, str]] = {
    "bash": "_tunnel_complete_tunnels",
    "zsh": "_tunnel_complete_tunnels",
    "fish": f"({LIST} | string split \\t)",
    "tcsh": "",
    "preamble": {
        "bash": f'_tunnel_complete_tunnels() {{ compgen -W "$({LIST} | {FILTER})" -- "$1"; }}',
        "zsh": f"_tunnel_complete_tunnels() {{ compadd -- $({LIST} | {FILTER}); }}",
    },
}
"""How a tunnel is completed."""


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script of a parser whose commands have their options."""
    for action in all_actions(parser):
        if action.metavar == "FILE":
            vars(action)["complete"] = shtab.FILE
        elif action.metavar == "REF":
            vars(action)["complete"] = TUNNEL
    return shtab.complete(parser, shell)
