"""Workers: results in order, one torch thread each, and what happens when one fails."""

import threading

import pytest
import torch

from galenic.merge.workers import AHEAD, GROUP, in_order
from galenic.runtime import UserError


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_results_come_in_the_order_of_the_items(workers, count):
    found = list(in_order(lambda i: (i * i, torch.get_num_threads()), range(count), workers))
    assert found == [(i * i, 1) for i in range(count)]


@pytest.mark.parametrize(
    "error", [UserError("no"), OSError(28, "No space left on device"), ValueError("odd")]
)
def test_the_first_failure_in_order_is_raised(error):
    def one(i):
        if i >= 3:
            raise error if i == 3 else KeyError(i)
        return i

    taken = []
    with pytest.raises(type(error), match=str(error.args[-1])):
        for result in in_order(one, range(9), 2):
            taken.append(result)
    assert taken == [0, 1, 2]


def test_results_that_wait_are_bounded():
    started = []
    found = in_order(lambda i: started.append(i), range(1000), 2)
    next(found)
    assert len(started) <= (AHEAD * 2 + 2) * GROUP
    found.close()


def test_a_consumer_that_stops_leaves_no_thread():
    before = threading.active_count()
    found = in_order(lambda i: i, range(100), 2)
    assert next(found) == 0 and threading.active_count() > before
    found.close()
    assert threading.active_count() == before


def test_subnormal_numbers_are_not_flushed_though_training_does():
    tiny = torch.tensor([2.0**-140, 1.0])  # more elements than one, so that vectors are used
    torch.set_flush_denormal(True)
    try:
        [kept] = in_order(lambda _: (tiny * 1.0).double().tolist(), [0], 1)
    finally:
        torch.set_flush_denormal(False)
    assert kept == [2.0**-140, 1.0]
