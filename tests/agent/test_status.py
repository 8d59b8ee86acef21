"""Whether exposures are reachable, from the events of the agent."""

from __future__ import annotations

from tests.agent.support import RecordingReporter
from tunneld.agent.events import Activity, Stats
from tunneld.agent.status import AgentStatus

OPENED = {"address": "tcp://192.0.2.1:20000", "uri": "tcp://192.0.2.1:20001", "id": "t1"}


def test_an_agent_is_ready_while_all_of_its_exposures_are() -> None:
    status, changes = AgentStatus(), list[bool]()
    status.on_change.append(lambda: changes.append(status.ready))
    assert (status.ready, status.settled) == (False, False)
    blog, shell = (status.observe(name, RecordingReporter(), Activity) for name in ("blog", "shell"))
    blog.report("opened", **OPENED)
    shell.report("reconnecting", reason="lost", delay=4.0)
    assert (status.ready, status.settled) == (False, True)
    assert str(status) == "1 of 2 exposures reachable, 0 visitors; shell: lost"
    shell.report("resumed", address=OPENED["address"], id="t2")
    assert status.ready
    blog.report("draining", id="t1", visitors=1)
    assert changes == [False, False, True, False]


def test_a_successor_takes_the_place_of_an_exposure_and_a_removed_one_does_not_count() -> None:
    status = AgentStatus()
    former = status.observe("blog", RecordingReporter(), Activity)
    status.observe("blog", RecordingReporter(), lambda: Activity(Stats(now=2))).report("opened", **OPENED)
    former.report("closed", id="t1", reason="configuration changed", served=0, failed=0, up=0, down=0)
    assert str(status) == "1 of 1 exposure reachable, 2 visitors"
    status.observe("old", RecordingReporter(), Activity)
    assert not status.ready
    status.forget("old")
    assert status.ready


def test_events_go_on_to_the_reporter() -> None:
    reporter = RecordingReporter()
    observed = AgentStatus().observe("", reporter, Activity)
    observed.report("unhealthy", reason="no answer in 5 s")
    assert [event for event, _ in reporter.events] == ["unhealthy"]
    assert not observed.healthy
    assert observed.wants_visitors is reporter.wants_visitors
