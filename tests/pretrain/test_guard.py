from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.pretrain import GradientGuard


def test_silent_until_it_has_a_hundred_norms():
    guard = GradientGuard()
    assert all(guard.accept(norm) for norm in [1.0] * 99)
    assert guard.accept(1000.0)  # 99 norms: not full yet
    assert len(guard.norms) == 100


def test_a_single_spike_is_dropped_and_not_pushed_the_second_is_walked():
    guard = GradientGuard()
    for _ in range(100):
        guard.accept(1.0)
    assert guard.accept(1.3)  # 1.2 * 1.0 + 0.1 is not exceeded by 1.3
    threshold = 1.2 * (99 + 1.3) / 100 + 0.1
    assert not guard.accept(threshold + 1e-9)
    assert list(guard.norms) == [1.0] * 99 + [1.3]
    assert guard.accept(50.0)  # second in a row
    assert guard.norms[-1] == 50.0
    assert guard.skips == 0


def test_an_accepted_step_between_spikes_rearms_it():
    guard = GradientGuard(history=2, norms=[1.0, 1.0])
    assert [guard.accept(norm) for norm in (9.0, 1.0, 9.0, 1.0)] == [False, True, False, True]


def reference(norms, history=5, factor=1.2, offset=0.1, max_skips=1):
    """Algorithm 1 of the report, line by line."""
    accepted, taken, skip = [], [], 0
    for norm in norms:
        window = accepted[-history:]
        if len(window) >= history and norm > factor * (sum(window) / len(window)) + offset:
            if skip < max_skips:
                skip += 1
                taken.append(False)
                continue
            skip = 0
        accepted.append(norm)
        skip = 0
        taken.append(True)
    return taken


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0.01, 10), max_size=60), st.integers(0, 59))
def test_equals_the_algorithm_and_resumes(norms, cut):
    guard = GradientGuard(history=5)
    taken = []
    for position, norm in enumerate(norms):
        if position == cut:
            guard = GradientGuard(history=5, **guard.state())
        taken.append(guard.accept(norm))
    assert taken == reference(norms)
