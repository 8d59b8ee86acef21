"""Targets for webmux and ssh, each a ratio of two columns of the table in one run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.run import Results


@dataclass(frozen=True, slots=True)
class Aim:
    """A target: the value of tunneld ÷ that of the peer is at least `bound`, or at most if less is better."""

    load: str
    measure: str
    ours: str
    peer: str
    bound: float
    more_is_better: bool = True

    def told(self, results: Results) -> str | None:
        """Format the target and the measured ratio, with a `!` if missed; None if one of the columns did not run."""
        ours = results.median(self.load, self.ours, self.measure)
        theirs = results.median(self.load, self.peer, self.measure)
        if ours is None or not theirs:
            return None
        ratio, sign = ours / theirs, "≥" if self.more_is_better else "≤"
        met = round(ratio, 2) >= self.bound if self.more_is_better else round(ratio, 2) <= self.bound
        what = f"{self.load} {self.measure}: {self.ours} ÷ {self.peer}"
        return f"{what:<50} {ratio:5.2f}× ({sign} {self.bound:g}){'' if met else ' !'}"


ENCRYPTED_PEERS = ("rathole-tls", "rathole-noise", "frp-tls", "chisel")

WEBMUX = ("webmuxs", "webmuxs-compiled")

EGTP = (("egtp", "webmuxs"), ("egtp-compiled", "webmuxs-compiled"))

AIMS = (
    *(Aim("http64", "rate", ours, "haproxy", 1.0) for ours in WEBMUX),
    *(Aim("http400", "rate", ours, "haproxy", 1.0) for ours in WEBMUX),
    *(Aim("http64", "rate", ours, "ssh", 3.0) for ours in WEBMUX),
    *(
        Aim(load, "rate", ours, peer, 1.0)
        for ours in WEBMUX
        for load in ("http64", "http400")
        for peer in ENCRYPTED_PEERS
    ),
    *(Aim("visitors", "rate", ours, "haproxy", 0.9) for ours in WEBMUX),
    *(Aim("visitors", "rate", ours, "ssh", 2.0) for ours in WEBMUX),
    *(Aim("bulk", "bulk", ours, "haproxy", 1.2) for ours in ("webmux", "webmux-compiled")),
    *(Aim("bulk", "bulk", ours, "ssh", 0.8) for ours in WEBMUX),
    Aim("bulk", "bulk", "tunneld-ssh", "ssh", 0.6),
    Aim("http64", "rate", "tunneld-ssh", "ssh", 0.6),
    Aim("http400", "rate", "tunneld-ssh", "ssh", 0.4),
    *(Aim("bulk", "bulk", *pair, 0.5) for pair in EGTP),
    *(Aim("http64", "rate", *pair, 0.6) for pair in EGTP),
    *(Aim("http1", "p50", ours, "ssh", 1.5, more_is_better=False) for ours in WEBMUX),
)


def told(results: Results) -> Iterator[str]:
    """Format a line for each target with both columns measured."""
    for aim in AIMS:
        if (line := aim.told(results)) is not None:
            yield line
