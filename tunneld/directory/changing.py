"""Changes of an open tunnel: limits that its owner or an admin sets, and networks that a reload allows or denies.

They last as long as the tunnel, also across a restart of the relay. An agent that opens the tunnel again does so with
options of its own; limits that are to last belong to the credential.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tunneld.config.schema import TunnelSettings
from tunneld.errors import UsageError
from tunneld.policy.access import Grant
from tunneld.policy.limits import effective_limits
from tunneld.policy.options import OPTIONS, TunnelOptions
from tunneld.tunnel.spec import TunnelSpec

NO_LIMIT = "none"
"""The value that takes a limit away; those of the credential and of the relay stay."""

CHANGEABLE = {
    key: replace(OPTIONS[key], takes=f"{OPTIONS[key].takes}|{NO_LIMIT}")
    for key in ("allow_from", "deny_from", "max_visitors", "max_per_source", "visitor_rate", "bandwidth", "quota")
}
"""The options that can be changed while the tunnel is open."""

RELOADED = ("allow_from", "deny_from")
"""Keys of [tunnels] that a reload applies to open tunnels, as an operator expects who keeps a network out."""


def changed_spec(
    spec: TunnelSpec, words: Mapping[str, str], settings: TunnelSettings, grant: Grant, used: int
) -> TunnelSpec:
    """The tunnel with these options, within the limits in force: `settings`, and the `grant` of its owner. `used` are
    the bytes that count against its quota. Raises `UsageError`, which names the option.
    """
    changes = _parse(words)
    wanted = replace(TunnelOptions(), **changes)
    bound = effective_limits(settings, grant, wanted).bound(wanted)
    options = replace(spec.options, **{key: getattr(bound, key) for key in changes})
    if "quota" in changes and options.quota is not None and options.quota <= used:
        raise UsageError(
            f"option quota={options.quota}: {used} bytes have been relayed already; close the tunnel instead"
        )
    present = spec.settings.model_copy(update={key: getattr(settings, key) for key in changes})
    return replace(spec, options=options, settings=present, changed=spec.changed | set(changes))


def reloaded_spec(spec: TunnelSpec, settings: TunnelSettings) -> TunnelSpec | None:
    """The tunnel after a reload; None: nothing has changed for it."""
    if all(getattr(spec.settings, key) == getattr(settings, key) for key in RELOADED):
        return None
    present = spec.settings.model_copy(update={key: getattr(settings, key) for key in RELOADED})
    return replace(spec, settings=present)


def _parse(words: Mapping[str, str]) -> dict[str, Any]:
    """The new values. Raises `UsageError`."""
    for key in words:
        if key not in CHANGEABLE:
            raise UsageError(f"option {key!r} cannot be changed while a tunnel is open, only {', '.join(CHANGEABLE)}")
    parsed = TunnelOptions.parse({key: text for key, text in words.items() if text != NO_LIMIT})
    defaults = TunnelOptions()
    return {key: getattr(defaults if text == NO_LIMIT else parsed, key) for key, text in words.items()}
