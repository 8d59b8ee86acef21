"""The order of things: every topology in turn, and again from the first (A B C A B C), never one alone in a row.

Bench.run
└─ loads that use the same server      the server runs once for them all
   └─ topology ×N                      all are open at once, and idle but for the one whose turn it is
      └─ load ×N                       in rounds over the topologies
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from statistics import median

from benchmarks.loads import Figures, Load
from benchmarks.processes import Address, BenchError, descriptor_limit
from benchmarks.topologies import Reach, Topology

FAILURES = (BenchError, OSError)
BORROW = 1.25  # a load may take so many times its share of the time, since most take less than theirs


@dataclass(frozen=True, slots=True)
class Plan:
    """How long a sample takes, how many there are of each, and when to be content with fewer; in seconds."""

    seconds: int
    rounds: int
    budget: float


@dataclass(slots=True)
class Results:
    """Every sample: load, topology, measure. And what went wrong, in words."""

    samples: dict[str, dict[str, list[Figures]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def values(self, load: str, topology: str, measure: str) -> list[float]:
        """The samples of one cell of the table."""
        return [figures[measure] for figures in self.samples.get(load, {}).get(topology, [])]

    def median(self, load: str, topology: str, measure: str) -> float | None:
        """One cell of the table, unless it is empty."""
        values = self.values(load, topology, measure)
        return median(values) if values else None


class Bench:
    """One run. `say` hears how it goes."""

    def __init__(
        self, topologies: Sequence[Topology], plan: Plan, results: Results, say: Callable[[str], None]
    ) -> None:
        self._topologies = topologies
        self._plan = plan
        self._results = results
        self._say = say
        self._left = 0  # loads that have not begun
        self._end = 0.0

    def run(self, loads: Sequence[Load]) -> None:
        """Run the loads one after the other; each gets its share of the time that is left."""
        self._left = len(loads)
        self._end = time.monotonic() + self._plan.budget
        for server, group in groupby(loads, lambda load: load.server):
            same = list(group)
            with self._surviving(same[0].name), server(descriptor_limit()) as address:
                self._serve(same, address)

    def _serve(self, loads: Sequence[Load], server: Address) -> None:
        """Run the loads that use one server."""
        with ExitStack() as stack:
            kept = {} if loads[0].fresh else self._opened(stack, loads[0], server)
            for load in loads:
                once = partial(self._fresh, load, server) if load.fresh else partial(self._kept, load, dict(kept))
                self._rounds(load, once)

    def _opened(self, stack: ExitStack, load: Load, server: Address) -> dict[Topology, Reach]:
        """All topologies, each used once."""
        reached: dict[Topology, Reach] = {}
        for topology in self._topologies:
            self._say(f"{topology.title} starts")
            with self._surviving(topology.title):
                reach = stack.enter_context(topology.open(server))
                load.sample(reach, load.warm_up)
                reached[topology] = reach
        return reached

    def _rounds(self, load: Load, once: Callable[[], None]) -> None:
        """As many rounds as planned, or as fit into this load's share of the time, but one at least."""
        start = time.monotonic()
        deadline = start + BORROW * (self._end - start) / self._left
        self._left -= 1
        for number in range(1, self._plan.rounds + 1):
            self._say(f"{load.name}: round {number} of {self._plan.rounds}")
            once()
            now = time.monotonic()
            if number < self._plan.rounds and now + (now - start) / number > deadline:
                self._note(f"{load.name}: time was short, {number} of {self._plan.rounds} rounds")
                return

    def _kept(self, load: Load, reached: dict[Topology, Reach]) -> None:
        """A round over topologies that stay open through all rounds."""
        for topology, reach in list(reached.items()):
            with self._surviving(f"{load.name}: {topology.title}"):
                del reached[topology]  # unless it survives this round, the next one goes without it
                self._sample(load, topology, reach)
                reached[topology] = reach

    def _fresh(self, load: Load, server: Address) -> None:
        """A round over topologies that start anew for each sample: memory once used is not given back."""
        for topology in self._topologies:
            if topology.idle:
                with self._surviving(f"{load.name}: {topology.title}"), topology.open(server) as reach:
                    self._sample(load, topology, reach)

    def _sample(self, load: Load, topology: Topology, reach: Reach) -> None:
        figures = load.sample(reach, self._plan.seconds)
        self._results.samples.setdefault(load.name, {}).setdefault(topology.name, []).append(figures)
        if failed := figures.get("failed"):
            self._note(f"{load.name}: {topology.title}: {failed:.0f} requests failed in one sample")

    @contextmanager
    def _surviving(self, who: str) -> Iterator[None]:
        """What fails is left out, and said; the others go on."""
        try:
            yield
        except FAILURES as error:
            self._note(f"{who}: left out: {error}")

    def _note(self, text: str) -> None:
        self._results.notes.append(text)
        self._say(text)
