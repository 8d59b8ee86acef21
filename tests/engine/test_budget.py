"""The budget of a turn: each owner gets its share, whatever the number of its handlers, and none is forgotten."""

from __future__ import annotations

from tunneld.engine.budget import MIN_SHARE, CostShare, TurnBudget

SIZE = 100


class Work:
    """A handler that has more to do than fits into many turns."""

    def __init__(self, budget: TurnBudget, share: CostShare, unit: int = 10) -> None:
        self.done = 0
        self.failures: list[Exception] = []
        self._budget, self._share, self._unit = budget, share, unit
        budget.defer(share, self)

    def on_turn(self) -> None:
        while self._share.left > 0:
            self._share.use(self._unit)
            self.done += self._unit
        self._budget.defer(self._share, self)

    def on_failure(self, error: Exception) -> None:
        self.failures.append(error)


def take_turns(budget: TurnBudget, count: int) -> None:
    for _ in range(count):
        budget.begin_turn()
        budget.continue_deferred()


def test_one_owner_alone_gets_the_whole_turn() -> None:
    budget = TurnBudget(SIZE)
    work = Work(budget, CostShare(budget))
    take_turns(budget, 10)
    assert work.done == 10 * SIZE


def test_two_owners_get_the_same_however_many_handlers_one_has() -> None:
    budget = TurnBudget(SIZE)
    many, one = CostShare(budget), CostShare(budget)
    crowd = [Work(budget, many) for _ in range(20)]
    alone = Work(budget, one)
    take_turns(budget, 101)
    assert sum(work.done for work in crowd) == alone.done
    assert alone.done <= 100 * SIZE // 2 + SIZE


def test_the_handlers_of_one_owner_take_turns() -> None:
    budget = TurnBudget(SIZE)
    share = CostShare(budget)
    crowd = [Work(budget, share) for _ in range(5)]
    take_turns(budget, 50)
    assert [work.done for work in crowd] == [10 * SIZE] * 5


def test_what_exceeds_the_share_is_repaid() -> None:
    budget = TurnBudget(SIZE)
    work = Work(budget, CostShare(budget), unit=3 * SIZE)
    take_turns(budget, 30)
    assert work.done == 30 * SIZE
    assert budget.deferred


def test_many_owners_do_not_make_a_turn_longer_until_the_smallest_share() -> None:
    budget = TurnBudget(SIZE)
    for _ in range(50):
        Work(budget, CostShare(budget), unit=1)
    take_turns(budget, 2)
    assert budget.share == MIN_SHARE


def test_a_handler_that_raises_costs_no_other_its_turn() -> None:
    class Faulty(Work):
        def on_turn(self) -> None:
            raise ZeroDivisionError

    budget = TurnBudget(SIZE)
    faulty = Faulty(budget, CostShare(budget))
    work = Work(budget, CostShare(budget))
    take_turns(budget, 1)
    assert [type(failure) for failure in faulty.failures] == [ZeroDivisionError]
    assert work.done


def test_a_turn_is_requested_for_what_is_deferred_between_turns() -> None:
    requests: list[int] = []
    budget = TurnBudget(SIZE, lambda: requests.append(budget.turn))
    share = CostShare(budget)
    budget.begin_turn()
    Work(budget, share)
    assert not requests
    budget.in_turn = False
    Work(budget, share)
    assert requests == [1]
