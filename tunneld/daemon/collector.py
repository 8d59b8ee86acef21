"""Garbage collection without long pauses: objects that survive a full collection are left out of the next ones.

A tunnel is some hundred objects that the collector tracks, and a full collection looks at every one of them. With
10 000 tunnels open it took 250 ms of processor time, in which no visitor's byte moved; Python starts one whenever a
quarter more objects have survived younger generations, also if they are gone since.

So the survivors of a full collection are frozen (`gc.freeze`), and the next one looks only at what has come since: some
ten thousand objects, a few milliseconds. Frozen objects are freed as soon as nothing refers to them, like all others.
But a cycle of them is found only by a collection of everything, and a closed tunnel is such a cycle. That happens once
as many objects were frozen as there were at the last such collection: so garbage takes no more memory than what is in
use, and while their number grows, the long pauses come at each doubling.

Python 3.14 collects in small steps by itself, and never calls this.
"""

from __future__ import annotations

import gc

OLDEST = 2
"""The generation of a full collection."""
MIN_FROZEN = 100_000
"""Objects that may always be frozen before everything is collected: 16 MiB of closed tunnels, if all are garbage, and
some 20 ms to look at.
"""


class Collector:
    """Decides at each full collection what it looks at."""

    def __init__(self) -> None:
        self._live = 0  # objects that survived the last collection of everything
        self._frozen = 0  # objects frozen since then
        self._everything = False  # the present collection is one

    def install(self) -> None:
        """Freeze what exists, which is modules for the most part, and follow the collections from now on."""
        gc.freeze()
        gc.callbacks.append(self.on_collection)

    def on_collection(self, phase: str, info: dict[str, int]) -> None:
        """For `gc.callbacks`."""
        if info["generation"] < OLDEST:
            return
        if phase == "start":
            if self._frozen > max(self._live, MIN_FROZEN):
                self._everything = True
                gc.unfreeze()
            return
        survivors = len(gc.get_objects(OLDEST))
        gc.freeze()
        if self._everything:
            self._everything = False
            self._live, self._frozen = survivors, 0
        else:
            self._frozen += survivors
