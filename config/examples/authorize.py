#!/usr/bin/env python3
"""A program for `control.authorize`, see AUTHORIZATION in tunneld(8): who may open which tunnels is in a table.

Copy it, make it executable (chmod +x), set `authorize = "/etc/tunneld/authorize.py"` in [control], and reload.
"""

import json
import sys

PLANS = {
    "alice": {"names": ["blog", "shop"]},
    "bob": {"names": []},
}
"""Customers by credential, and the names of tunnels that each may open."""


def decide(question: dict) -> str:
    """Return the reason for a refusal; empty: it is allowed."""
    if question["event"] == "visitor":
        return ""
    plan = PLANS.get(question["credential"])
    if plan is None:
        return "no such customer"
    if question["event"] == "open" and question["tunnel"]["name"] not in plan["names"]:
        return f"your plan has no tunnel called {question['tunnel']['name']!r}"
    return ""


refusal = decide(json.load(sys.stdin))
json.dump({"allow": not refusal, "reason": refusal}, sys.stdout)
