"""Drafts are verified as far as that pays, by the times of steps and by what is accepted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import pytest
from clocked import HOST, VOCAB, Foreseeing, clocked_session
from fake_device import expected_tokens
from ingot.runtime.serving.adaptive import Adaptive, StepTimes
from ingot.runtime.serving.sampling import Sampling
from ingot.runtime.serving.sequence import Request, Sequence

TOKENS = 400
FLAT = {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}
STEEP = {1: 1.0, 2: 1.1, 4: 4.0, 8: 9.0}
LINEAR = {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}


def cost_of(costs: dict[int, float]) -> Callable[[int], float]:
    return lambda tokens: costs.get(tokens, float(tokens))


def served(
    drafter: Foreseeing | None, cost: Callable[[int], float], **options: object
) -> tuple[float, list[int], Sequence, Adaptive | None]:
    """How long one sequence takes, the entries of its steps, and what decided on them."""
    session, device = clocked_session(drafter, cost, **options)
    (sequence,) = session.generate([[3, 1]], max_new_tokens=TOKENS)
    expected, _ = expected_tokens((3, 1), TOKENS, Sampling(seed=0), VOCAB)
    assert list(sequence.tokens) == expected
    return device.clock.now, device.sizes, sequence, session.adaptive


@pytest.mark.parametrize(
    ("costs", "right", "entry", "samples"),
    [
        (*case, samples)
        for samples in (False, True)
        for case in (
            (FLAT, 4, 8),  # all that is drafted
            (STEEP, 4, 2),  # one drafted token pays, more do not
            (FLAT, 1, 8),  # those that are wrong cost nothing
            ({**FLAT, 4: 1.4, 8: 1.5}, 1, 2),  # these do
            ({**FLAT, 2: 1.1, 4: 1.2, 8: 1.3}, 0, 1),  # nothing is ever right
        )
    ]
    # What a step that is fed does without the host outweighs what as long a step brings.
    + [(LINEAR, 4, 1, True)],
)
def test_as_many_tokens_are_verified_as_pay(
    costs: dict[int, float], right: int, entry: int, samples: bool
) -> None:
    candidates = 3 if samples else None
    seconds, sizes, sequence, adaptive = served(
        Foreseeing(4, right), cost_of(costs), candidates=candidates
    )
    plain, *_ = served(None, cost_of(costs), candidates=candidates)
    late = Counter(sizes[len(sizes) // 2 :])
    assert late[entry] >= 0.9 * sum(late.values())
    assert seconds <= 1.05 * plain
    assert adaptive is not None and adaptive.last is not None
    if entry > 1:
        assert adaptive.last.gain > 1 and sequence.stats.speedup == pytest.approx(
            plain / seconds, rel=0.05
        )
        assert "on: " in str(adaptive.last)
    else:
        assert adaptive.last.gain <= 1
        assert adaptive.declined > 0 and 0 < adaptive.probes < 10
        assert "off: " in str(adaptive.last)


def test_it_is_tried_again() -> None:
    """What lost pays after all, once a step of drafts has become cheap."""
    taken: list[int] = []

    def cost(tokens: int) -> float:
        taken.append(tokens)
        return {1: 1.0}.get(tokens, 8.0 if len(taken) < 120 else 1.0)

    _, sizes, _, adaptive = served(Foreseeing(4, 4), cost)
    assert adaptive is not None and adaptive.last is not None
    assert 0 < 100 - sizes[20:120].count(1) < 10  # but for a few, to measure
    assert adaptive.last.gain > 1
    assert max(sizes[-20:-10]) > 1 and sizes[120:].count(1) < 140


def test_acceptance_is_known_while_nothing_is_verified() -> None:
    """Drafts that were wrong and become right are compared with what comes, at no cost."""
    drafter = Foreseeing(4, 0)
    session, device = clocked_session(drafter, cost_of({**FLAT, 8: 1.5, 4: 1.5, 2: 1.5}))
    sequence = session.submit([3, 1], max_new_tokens=TOKENS)
    while sequence.generated < 100:
        session.step()
    assert session.adaptive is not None
    before = session.adaptive.verified
    drafter.right = 4
    while sequence.generated < 200:
        session.step()
    assert session.adaptive.verified > before + 5
    assert device.sizes[-3:] == [8, 8, 8]


def test_a_clock_too_coarse_for_steps_decides_all_the_same() -> None:
    """Where every step seems to take no time, drafted tokens cost nothing."""
    adaptive = Adaptive(StepTimes(), lambda tokens, rows: tokens)
    for tokens in (1, 4):
        for _ in range(3):
            adaptive.times.add(tokens, 0.0)
    sequence = Sequence(1, (3, 1), Request(TOKENS), seed=0)
    assert adaptive.choose({sequence: [5, 6, 7]}, tokens=1, room=8) == {sequence: 3}
    assert adaptive.last is not None and adaptive.last.gain > 1


def test_decisions_repeat() -> None:
    runs = [served(Foreseeing(4, 3), cost_of(STEEP), candidates=3)[:2] for _ in range(2)]
    assert runs[0] == runs[1]


def test_each_sequence_has_its_own_acceptance() -> None:
    """Two sequences, one whose drafts are right: its drafts are verified, the other's are not."""

    class Both:
        def __init__(self) -> None:
            self.right, self.wrong = Foreseeing(3, 3), Foreseeing(3, 0)

        def draft(self, sequence: Sequence, most: int) -> Iterable[int]:
            of = self.right if sequence.prompt == (3, 1) else self.wrong
            return of.draft(sequence, most)

    costs = {1: 1.0, 2: 1.1, 4: 1.2, 8: 1.9, 16: 4.0}
    session, _ = clocked_session(Both(), cost_of(costs))
    good = session.submit([3, 1], max_new_tokens=TOKENS)
    bad = session.submit([3, 2], max_new_tokens=TOKENS)
    while not session.idle:
        session.step()
    assert good.stats.steps < 0.6 * bad.stats.steps
    assert bad.stats.verified_steps < 0.2 * good.stats.verified_steps


def test_a_drafter_without_drafts_costs_nothing() -> None:
    """Steps are fed by the ones before, as if there were none."""
    plain, sizes, *_ = served(None, cost_of(FLAT), candidates=3)
    session, device = clocked_session(Foreseeing(4, None), cost_of(FLAT), candidates=3)
    session.generate([[3, 1]], max_new_tokens=TOKENS)
    assert device.clock.now == plain and device.sizes == sizes
    fed = [kind for kind, _ in device.device.calls].count("feed")
    assert fed > 0.95 * TOKENS


def test_figures() -> None:
    session, device = clocked_session(Foreseeing(4, 2), lambda tokens: 1.0, adapt=False)
    one, two = session.generate([[3, 1], [3, 2]], max_new_tokens=31)
    for stats in (one.stats, two.stats):
        # The last token of the prompt, and then: two of four are right.
        assert stats.acceptance_length == pytest.approx(3, abs=0.2)
        assert stats.acceptance_rates[:2] == pytest.approx((1, 1), abs=0.1)
        assert not any(stats.acceptance_rates[2:])
        assert stats.verified_tokens >= 30
    total = session.stats
    assert total.verified_tokens == one.stats.verified_tokens + two.stats.verified_tokens
    assert total.drafted == [
        a + b for a, b in zip(one.stats.drafted, two.stats.drafted, strict=True)
    ]
    # A step lasts from its launch on.
    assert total.prefill_seconds + total.decode_seconds == len(device.sizes) * (1 + HOST)
    assert 0 < total.verify_seconds <= total.decode_seconds + 1 + HOST


def test_times_of_entries() -> None:
    times = StepTimes()
    assert times.of(4) is None and times.plain(1) is None
    for seconds in (9.0, 1.0, 1.0):  # the first one warms up
        times.add(1, seconds)
    assert times.of(1) == 1
    assert times.of(8) == 1  # not tried: as little as it may take
    for _ in range(3):
        times.add(9, 5.0)
    assert times.of(5) == 3
    assert times.of(100) == 5
    for _ in range(3):
        times.add(1, 0.5, fed=True)
    assert times.plain(1) == 0.5 and times.of(1) == 1


def test_nothing_is_decided_before_plain_steps_are_known() -> None:
    adaptive = Adaptive(StepTimes(), lambda tokens, rows: tokens)
    sequence = Sequence(1, (1, 2), Request(9), seed=0)
    assert adaptive.choose({sequence: [5, 6]}, 1, 8) == {}
    for _ in range(3):
        adaptive.times.add(1, 1.0)
    assert adaptive.choose({sequence: [5, 6]}, 1, 8) == {sequence: 2}
    assert adaptive.choose({sequence: [5, 6]}, 1, 1) == {sequence: 1}
    assert adaptive.choose({sequence: []}, 1, 8) == {}


def test_plain_steps_are_measured_again() -> None:
    """Plain steps that were slow at first, as when a machine warms up, do not keep drafts on."""
    taken: list[int] = []

    def cost(tokens: int) -> float:
        taken.append(tokens)
        return (9.0 if len(taken) < 10 else 0.5) if tokens == 1 else 4.0

    session, device = clocked_session(Foreseeing(1, 1), cost)
    session.generate([[3, 1]], max_new_tokens=1000)
    assert device.sizes[50:250] == [2] * 200
    assert device.sizes[-200:].count(1) > 150
