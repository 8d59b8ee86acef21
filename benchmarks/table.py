"""The table of results, for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from benchmarks.loads import Load, Measure
from benchmarks.run import Results
from benchmarks.topologies import Topology

OURS = "tunneld"
LEGEND = (
    "Each value is the median of its samples, ± the distance of the farthest one. Below it: tunneld ÷ this column, and "
    "the target in parentheses; ! marks a missed target."
)

Row = list[str]


class Table:
    """One column for each topology and two rows for each measure: the values, and the value of tunneld ÷ each."""

    def __init__(self, results: Results, loads: Sequence[Load], topologies: Sequence[Topology]) -> None:
        self._results = results
        self._topologies = topologies
        self._measures = [(load, measure) for load in loads for measure in load.measures]

    def text(self) -> str:
        """Format the table for a terminal."""
        rows = [self._head(), *self._rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = []
        for row in rows:
            cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])

    def markdown(self) -> str:
        """Format the table as Markdown, with a value and its ratio in one cell."""
        rows = list(self._rows())
        lines = [self._head(), ["---", *["--:"] * len(self._topologies)]]
        for figures, ratios in zip(rows[::2], rows[1::2], strict=True):
            pairs = zip(figures[1:], ratios[1:], strict=True)
            cells = [f"{figure}<br>{ratio}" if ratio else figure for figure, ratio in pairs]
            lines.append([figures[0].strip(), *cells])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def missed(self) -> int:
        """Return the number of missed targets."""
        return sum(cell.endswith("!") for row in self._rows() for cell in row)

    def _head(self) -> Row:
        return ["", *(topology.title for topology in self._topologies)]

    def _rows(self) -> Iterator[Row]:
        for load, measure in self._measures:
            title = f"{measure.title}, {measure.unit}" if measure.unit else measure.title
            values = [self._results.values(load.name, topology.name, measure.name) for topology in self._topologies]
            yield [title, *(_figure(each) for each in values)]
            yield ["", *(self._ratio(load, measure, topology) for topology in self._topologies)]

    def _ratio(self, load: Load, measure: Measure, topology: Topology) -> str:
        ours = self._results.median(load.name, OURS, measure.name)
        theirs = self._results.median(load.name, topology.name, measure.name)
        if ours is None or not theirs:
            return ""
        if topology.name == OURS:
            return _beside("", ours, measure, measure.limit)
        return _beside(f"{ours / theirs:.2f}×", ours / theirs, measure, measure.aims.get(topology.name))


def _beside(text: str, value: float, measure: Measure, bound: float | None) -> str:
    """Format a value with its target, if there is one."""
    if bound is None:
        return text
    mark = "" if measure.meets(value, bound) else " !"
    return f"{text} ({measure.bound(bound)}){mark}".strip()


def _figure(values: Sequence[float]) -> str:
    if not values:
        return "-"
    middle = median(values)
    spread = max(abs(value - middle) for value in values) / middle if middle else 0.0
    return f"{_number(middle)} ±{spread:.0%}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
