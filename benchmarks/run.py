"""The order of samples: topologies take turns (A B C A B C) in each round.

Bench.run
└─ loads with the same server          the server runs once for all of them
   └─ topology ×N                      all are open at once; all but one are idle
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
BORROW = 1.25  # a load may use this many times its share of the time, since most use less than theirs


@dataclass(frozen=True, slots=True)
class Plan:
    """The length of a sample in seconds, the number of samples, and the time in seconds after which there are fewer."""

    seconds: int
    rounds: int
    budget: float


@dataclass(slots=True)
class Results:
    """All samples by load, topology and measure, and notes about failures."""

    samples: dict[str, dict[str, list[Figures]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def values(self, load: str, topology: str, measure: str) -> list[float]:
        """Return the samples of one cell of the table."""
        return [figures[measure] for figures in self.samples.get(load, {}).get(topology, []) if measure in figures]

    def median(self, load: str, topology: str, measure: str) -> float | None:
        """Return the median of one cell of the table; None if it is empty."""
        values = self.values(load, topology, measure)
        return median(values) if values else None


class Bench:
    """One run. `say` is called with progress messages."""

    def __init__(
        self, topologies: Sequence[Topology], plan: Plan, results: Results, say: Callable[[str], None]
    ) -> None:
        self._topologies = topologies
        self._plan = plan
        self._results = results
        self._say = say
        self._left = 0  # loads that have not started
        self._end = 0.0

    def run(self, loads: Sequence[Load]) -> None:
        """Run the loads one after the other. Each gets an equal share of the remaining time."""
        self._left = len(loads)
        self._end = time.monotonic() + self._plan.budget
        for server, group in groupby(loads, lambda load: load.server):
            same = list(group)
            with self._surviving(same[0].name), server(descriptor_limit()) as address:
                self._serve(same, address)

    def _serve(self, loads: Sequence[Load], server: Address) -> None:
        """Run the loads of one server."""
        with ExitStack() as stack:
            kept = {} if loads[0].fresh else self._opened(stack, loads[0], server)
            for load in loads:
                once = partial(self._fresh, load, server) if load.fresh else partial(self._kept, load, dict(kept))
                self._rounds(load, once)

    def _opened(self, stack: ExitStack, load: Load, server: Address) -> dict[Topology, Reach]:
        """Open all topologies, and warm each up."""
        reached: dict[Topology, Reach] = {}
        for topology in self._topologies:
            self._say(f"{topology.title} starts")
            with self._surviving(topology.title):
                reach = stack.enter_context(topology.open(server))
                load.sample(reach, load.warm_up)
                reached[topology] = reach
        return reached

    def _rounds(self, load: Load, once: Callable[[], None]) -> None:
        """Run the planned number of rounds, or as many as fit into the load's share of the time, but at least one."""
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
        """Run a round over topologies that stay open for all rounds."""
        for topology, reach in list(reached.items()):
            with self._surviving(f"{load.name}: {topology.title}"):
                del reached[topology]  # if it fails in this round, the next one runs without it
                self._sample(load, topology, reach)
                reached[topology] = reach

    def _fresh(self, load: Load, server: Address) -> None:
        """Run a round over topologies that are restarted for each sample, since used memory is not returned."""
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
    def _surviving(self, what: str) -> Iterator[None]:
        """Note a failure in the block and continue without it."""
        try:
            yield
        except FAILURES as error:
            self._note(f"{what}: left out: {error}")

    def _note(self, text: str) -> None:
        self._results.notes.append(text)
        self._say(text)
