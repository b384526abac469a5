"""Token-budget micro-batches: data.plan_microbatches against lower bounds on what any plan could do."""

import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

import data

LIMIT = 16_384  # tokens of the longest sequence
BATCHES = 2_100


def uniform(rng: random.Random, n: int) -> list[int]:
    return [rng.randint(1, LIMIT) for _ in range(n)]


def long_tail(rng: random.Random, n: int) -> list[int]:
    """As reasoning models answer: log-normal, cut at the limit."""
    median, sigma = rng.choice([(800, 1.0), (1500, 1.0), (3000, 1.0), (6000, 0.7)])
    return [
        max(1, min(LIMIT, round(rng.lognormvariate(math.log(median), sigma)))) for _ in range(n)
    ]


def bimodal(rng: random.Random, n: int) -> list[int]:
    share = rng.uniform(0.1, 0.9)
    return [
        rng.randint(10_000, LIMIT) if rng.random() < share else rng.randint(100, 2000)
        for _ in range(n)
    ]


def near_limit(rng: random.Random, n: int) -> list[int]:
    return [rng.randint(15_000, LIMIT) for _ in range(n)]


def cut(rng: random.Random, n: int) -> list[int]:
    """A policy that no longer stops: most answers run into the limit."""
    return [LIMIT if rng.random() < 0.8 else rng.randint(1, LIMIT) for _ in range(n)]


def short(rng: random.Random, n: int) -> list[int]:
    return [rng.randint(1, 600) for _ in range(n)]


def giant(rng: random.Random, n: int) -> list[int]:
    return [LIMIT] + [rng.randint(1, 1000) for _ in range(n - 1)]


LENGTHS = [uniform, long_tail, bimodal, near_limit, cut, short, giant]


def bin_bounds(lengths: list[int], budget: int) -> Iterator[int]:
    """Lower bounds on the bins of any packing, the cheap ones first. Each is the sum of weights that no bin can hold
    more than 1 of; the first weight is the share of the budget."""
    yield -(-sum(lengths) // budget)
    yield sum(2 * length > budget for length in lengths)  # no two of these share a bin
    for k in range(
        2, 9
    ):  # Fekete and Schepers' u(k): at most k sequences of more than budget / (k + 1)
        parts = ((length, *divmod((k + 1) * length, budget)) for length in lengths)
        yield -(
            -sum(whole * budget if rest else k * length for length, whole, rest in parts)
            // (k * budget)
        )
    lengths = sorted(lengths)
    before = [0, *accumulate(lengths)]
    start, end = 0, len(lengths)
    for least in sorted(
        {length for length in lengths if 2 * length <= budget}
    ):  # Martello and Toth's L2
        while lengths[start] < least:  # these weigh nothing,
            start += 1
        while (
            end > start and lengths[end - 1] > budget - least
        ):  # and these 1, as none of the others fits beside them
            end -= 1
        yield len(lengths) - end - (before[start] - before[end]) // budget
    large = [
        length for length in lengths if 4 * length > budget
    ]  # at most three fit: by Jensen's inequality any
    for slope in range(
        1, 40
    ):  # concave weight will do that is 1/3 for a third of the budget and never above 1/2
        weights = (min(0.5, 1 / 3 + slope / 10 * (length / budget - 1 / 3)) for length in large)
        yield math.ceil(sum(weight for weight in weights if weight > 0) - 1e-6)


def waiting_bound(lengths: list[int], budget: int, ranks: int) -> float:
    """Lower bound on the time of a pass, in units of data.cost, when all ranks meet after every micro-batch."""
    longest = sorted(lengths, reverse=True)
    costs = [data.cost(length) for length in longest]
    full = (
        budget * data.cost(longest[1]) / longest[1] if len(longest) > 1 else 0.0
    )  # no bin without the longest: more
    meanwhile = costs[0] + (ranks - 1) * min(
        costs[0], full
    )  # what all ranks do while one has the longest sequence
    alone = sum(
        2 * length > budget for length in longest
    )  # each of these is in another micro-batch
    return max(
        sum(costs) / ranks,
        costs[0] + max(0.0, sum(costs) - meanwhile) / ranks,
        sum(costs[:alone:ranks]),
    )


class Planned(NamedTuple):
    lengths: list[int]
    budget: int
    ranks: int
    plan: list[list[list[int]]]
    total: float  # of the busiest rank, over the mean of all ranks
    waiting: float  # sum over micro-batches of the slowest rank's cost, over the same mean
    inevitable: float  # a lower bound on `waiting`


@pytest.fixture(scope="module")
def planned() -> dict[str, list[Planned]]:
    out: dict[str, list[Planned]] = {lengths.__name__: [] for lengths in LENGTHS}
    for seed in range(BATCHES):
        rng, draw = random.Random(seed), LENGTHS[seed % len(LENGTHS)]
        low, high = rng.choices([(1, 63), (64, 256), (257, 1024)], [15, 80, 5])[0]
        lengths, budget, ranks = (
            draw(rng, rng.randint(low, high)),
            rng.choice([18_000, 32_768]),
            rng.randint(1, 8),
        )
        plan = data.plan_microbatches(lengths, budget, ranks)
        load = [
            [sum(data.cost(lengths[i]) for i in microbatch) for microbatch in rank] for rank in plan
        ]
        mean = sum(map(data.cost, lengths)) / ranks
        times = (
            max(map(sum, load)),
            sum(map(max, zip(*load))),
            waiting_bound(lengths, budget, ranks),
        )
        out[draw.__name__].append(
            Planned(lengths, budget, ranks, plan, *(t / mean - 1 for t in times))
        )
    return out


def test_every_sequence_once_within_budget_and_equal_counts(planned):
    """Guards sequences lost or doubled, a bin over by one token, and ranks with unequal counts (FSDP would hang)."""
    for p in sum(planned.values(), []):
        assert len(p.plan) == p.ranks and len({len(rank) for rank in p.plan}) == 1 and p.plan[0]
        bins = [microbatch for rank in p.plan for microbatch in rank]
        assert sorted(i for indices in bins for i in indices) == list(range(len(p.lengths)))
        assert max(sum(p.lengths[i] for i in indices) for indices in bins) <= p.budget


def test_no_more_microbatches_than_needed(planned):
    """Guards passes that are not needed. No plan has more micro-batches than it takes to share out a packing of 6 %
    more bins than the lower bound, or of one more: below 17 bins nobody can promise 6 %. With every kind of lengths
    their sum is under 1 % over the bound's; 19 plans of 20 attain it, and 49 of 50 are 6 % over it at most."""
    excess = []
    for name, plans in planned.items():
        counts = []
        for p in plans:
            rounds, bins = len(p.plan[0]), 1
            for bound in bin_bounds(p.lengths, p.budget):
                bins = max(bins, bound)
                if -(-bins // p.ranks) == rounds:
                    break  # as few as can be
            assert (
                -(-bins // p.ranks) <= rounds <= -(-max(bins + 1, int(1.06 * bins)) // p.ranks)
            ), (name, bins, rounds)
            counts.append((rounds, -(-bins // p.ranks)))
        found, least = map(sum, zip(*counts))
        excess += [rounds / needed - 1 for rounds, needed in counts]
        share = statistics.mean(rounds == needed for rounds, needed in counts)
        print(
            f"{name:10}: {found / least - 1:.2%} over the bound in all, {share:.1%} of the plans attain it"
        )
        assert found / least - 1 < 0.01, name
    attained, within = (statistics.mean(x <= limit for x in excess) for limit in (0, 0.06))
    print(f"all: {attained:.2%} attain it, {within:.2%} are within 6 %")
    assert attained > 19 / 20 and within > 49 / 50


def test_ranks_do_not_wait_for_each_other(planned):
    """Guards an uneven share of the work: with 8 sequences a rank or more, the busiest rank has under 5 % more than the
    mean, and ranks that meet in every micro-batch (FSDP gathers there) lose under 5 %, at the median of all batches and
    of every kind of lengths but one: the rank with a single giant works while the others run out of tokens. Of what a
    plan can avoid (at most: what is over a lower bound) they lose under 5 % in 15 batches of 16, a giant or not."""
    large = {
        name: [p for p in ps if p.ranks > 1 and len(p.lengths) >= 8 * p.ranks]
        for name, ps in planned.items()
    }
    for name, plans in (large | {"all": sum(large.values(), [])}).items():
        total, waiting = (
            statistics.median(getattr(p, field) for p in plans) for field in ("total", "waiting")
        )
        beyond = [(1 + p.waiting) / (1 + p.inevitable) - 1 for p in plans]
        avoided = statistics.mean(excess < 0.05 for excess in beyond)
        under = statistics.mean(p.waiting < 0.05 for p in plans)
        print(
            f"{name:10}: medians {total:.2%} total, {waiting:.2%} waiting, {statistics.median(beyond):.2%} over the"
            f" bound; under 5 %: {under:.1%}, over the bound {avoided:.1%}"
        )
        assert min(beyond) > -1e-9, "the bound is none"
        assert statistics.median(beyond) < 0.05
        assert name == "giant" or total <= waiting < 0.05
    assert avoided > 15 / 16


def test_ranks_end_together(planned):
    """Guards rank 0 that gets the dearest micro-batch every time: its excess would add up."""
    several = [p for p in sum(planned.values(), []) if p.ranks > 1 and len(p.plan[0]) > 4]
    assert (
        statistics.median(p.total for p in several)
        < statistics.median(p.waiting for p in several) / 2
    )


def test_summary_tells_what_a_plan_costs(planned):
    """Guards perf/*: the numbers by which a budget is chosen, against the plan itself."""
    for p in sum(planned.values(), [])[::50]:
        summary = data.plan_summary(p.lengths, p.budget, p.ranks)
        assert summary["perf/rank_imbalance"] == pytest.approx(p.waiting, abs=1e-9)
        assert summary["perf/microbatches"] == len(p.plan[0])
        used = statistics.mean(
            sum(p.lengths[i] for i in indices) / p.budget for rank in p.plan for indices in rank
        )
        assert summary["perf/pack_fill"] == pytest.approx(used)


@pytest.mark.parametrize("draw", LENGTHS)
def test_planning_is_quick(draw):
    """Guards a search in the plan: every rank makes one a few times a step. 1,024 sequences take 10 to 60 ms."""
    lengths, times = draw(random.Random(0), 1024), []
    for _ in range(3):
        begun = time.process_time()
        data.plan_microbatches(lengths, 18_000, 8)
        times.append(time.process_time() - begun)
    print(f"{min(times) * 1000:.0f} ms")
    assert min(times) < 0.2


@given(
    st.lists(st.integers(0, 12), max_size=40), st.integers(12, 36), st.integers(1, 6)
)  # so that bins get full
def test_plan_keeps_its_promises(lengths, budget, ranks):
    """Guards the same promises in the corners: no sequences, empty ones, fewer than ranks; and chance in a plan, which
    every rank must find alike."""
    plan = data.plan_microbatches(lengths, budget, ranks)
    assert len(plan) == ranks and len({len(rank) for rank in plan}) == 1 and plan[0]
    chosen = [i for rank in plan for microbatch in rank for i in microbatch]
    assert Counter(chosen) == Counter(range(len(lengths)))
    assert all(
        sum(lengths[i] for i in microbatch) <= budget for rank in plan for microbatch in rank
    )
    assert plan == data.plan_microbatches(list(lengths), budget, ranks)


def test_plan_refuses_what_does_not_fit():
    """Guards a sequence over the budget that is dropped in silence, or run and out of memory."""
    assert data.plan_microbatches([300, 10], 300) == [[[0], [1]]]
    with pytest.raises(ValueError, match="301 tokens.*300.*max_tokens_per_microbatch"):
        data.plan_microbatches([10, 301], 300)
