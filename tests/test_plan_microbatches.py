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
BATCHES = 10_000


def uniform(rng: random.Random, n: int) -> list[int]:
    return [rng.randint(1, LIMIT) for _ in range(n)]


def long_tail(rng: random.Random, n: int) -> list[int]:
    """As reasoning models answer: log-normal, cut at the limit."""
    median, sigma = rng.choice([(800, 1.0), (1500, 1.0), (3000, 1.0), (6000, 0.7)])
    return [max(1, min(LIMIT, round(rng.lognormvariate(math.log(median), sigma)))) for _ in range(n)]


def bimodal(rng: random.Random, n: int) -> list[int]:
    share = rng.uniform(0.1, 0.9)
    return [rng.randint(10_000, LIMIT) if rng.random() < share else rng.randint(100, 2000) for _ in range(n)]


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
    """Lower bounds on the bins of any packing, the cheap ones first. All but the second are sums of weights of which no
    `budget` tokens hold more than 1; the tokens themselves, divided by the budget, are the first."""
    yield -(-sum(lengths) // budget)
    yield sum(2 * length > budget for length in lengths)  # no two of these share a bin
    for k in range(2, 9):  # Fekete and Schepers' u(k): at most k sequences of more than budget / (k + 1)
        parts = [divmod((k + 1) * length, budget) for length in lengths]
        yield -(-sum(whole * budget if rest else whole * budget * k // (k + 1) for whole, rest in parts) // (k * budget))
    lengths = sorted(lengths)
    before = [0, *accumulate(lengths)]
    start, end = 0, len(lengths)
    for least in sorted({length for length in lengths if 2 * length <= budget}):  # Martello and Toth's L2
        while lengths[start] < least:  # these weigh nothing,
            start += 1
        while end > start and lengths[end - 1] > budget - least:  # and these 1, as none of the others fits beside them
            end -= 1
        yield len(lengths) - end - (before[start] - before[end]) // budget
    large = [length for length in lengths if 4 * length > budget]  # at most three fit: by Jensen any concave weight will
    for slope in range(1, 40):  # do that is at most 1/2, and 1/3 for a third of the budget
        weights = (min(0.5, 1 / 3 + slope / 10 * (length / budget - 1 / 3)) for length in large)
        yield math.ceil(sum(weight for weight in weights if weight > 0) - 1e-6)


def waiting_bound(lengths: list[int], budget: int, ranks: int) -> float:
    """Lower bound on the time of a pass, in units of data.cost, when all ranks meet after every micro-batch."""
    longest = sorted(lengths, reverse=True)
    costs = [data.cost(length) for length in longest]
    full = budget * data.cost(longest[1]) / longest[1] if len(longest) > 1 else 0.0  # no bin without the longest: more
    meanwhile = costs[0] + (ranks - 1) * min(costs[0], full)  # what all ranks do while one has the longest sequence
    alone = sum(2 * length > budget for length in longest)  # each of these is in another micro-batch
    return max(sum(costs) / ranks, costs[0] + max(0.0, sum(costs) - meanwhile) / ranks, sum(costs[:alone:ranks]))


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
        lengths, budget, ranks = draw(rng, rng.randint(low, high)), rng.choice([18_000, 32_768]), rng.randint(1, 8)
        plan = data.plan_microbatches(lengths, budget, ranks)
        load = [[sum(data.cost(lengths[i]) for i in microbatch) for microbatch in rank] for rank in plan]
        mean = sum(map(data.cost, lengths)) / ranks
        times = max(map(sum, load)), sum(map(max, zip(*load))), waiting_bound(lengths, budget, ranks)
        out[draw.__name__].append(Planned(lengths, budget, ranks, plan, *(t / mean - 1 for t in times)))
    return out


def test_every_sequence_once_within_budget_and_equal_counts(planned):
    """Guards sequences lost or doubled, a bin over by one token, and ranks with unequal counts (FSDP would hang)."""
    for p in sum(planned.values(), []):
        assert len(p.plan) == p.ranks and len({len(rank) for rank in p.plan}) == 1 and p.plan[0]
        bins = [microbatch for rank in p.plan for microbatch in rank]
        assert sorted(i for bin in bins for i in bin) == list(range(len(p.lengths)))
        assert max(sum(p.lengths[i] for i in bin) for bin in bins) <= p.budget


def test_no_more_microbatches_than_needed(planned):
    """Guards passes that are not needed. In every batch the micro-batches are those that a packing into at most 6 % (or
    1, if that is more) bins over the lower bound needs; no plan can be held to 6 % of 5. In all, they are within 1 % of
    the bound for every kind of lengths (2 % when bimodal, where the bound itself is loose); 19 plans of 20 attain it."""
    attained = []
    for name, plans in planned.items():
        counts = []
        for p in plans:
            rounds, bins = len(p.plan[0]), 1
            for bound in bin_bounds(p.lengths, p.budget):
                bins = max(bins, bound)
                if -(-bins // p.ranks) == rounds:
                    break  # as few as can be
            assert -(-bins // p.ranks) <= rounds <= -(-max(bins + 1, int(1.06 * bins)) // p.ranks), (name, bins, rounds)
            counts.append((rounds, -(-bins // p.ranks)))
        found, least = map(sum, zip(*counts))
        attained += [rounds == needed for rounds, needed in counts]
        share = statistics.mean(rounds == needed for rounds, needed in counts)
        print(f"{name:10}: {found / least - 1:.2%} over the bound in all, {share:.1%} of the plans attain it")
        assert found / least - 1 < (0.02 if name == "bimodal" else 0.01), name
    print(f"all: {statistics.mean(attained):.2%} attain it")
    assert statistics.mean(attained) > 0.95


def test_ranks_do_not_wait_for_each_other(planned):
    """Guards an uneven share of the work: where there are 8 sequences a rank or more, the busiest rank has under 5 % more
    than the mean, and ranks that meet in every micro-batch (FSDP gathers there) lose under 5 %, at the median of all
    batches and of every kind of lengths but one: a single giant keeps a rank busy while the others run out of tokens.
    Against what no plan avoids, 19 batches of 20 lose under 5 %, those with a giant, too."""
    large = {name: [p for p in ps if p.ranks > 1 and len(p.lengths) >= 8 * p.ranks] for name, ps in planned.items()}
    beyond = []
    for name, plans in (large | {"all": sum(large.values(), [])}).items():
        total, waiting = (statistics.median(getattr(p, field) for p in plans) for field in ("total", "waiting"))
        beyond = [(1 + p.waiting) / (1 + p.inevitable) - 1 for p in plans]
        tail = statistics.quantiles(beyond, n=20)[-1]
        print(f"{name:10}: medians {total:.2%} total, {waiting:.2%} waiting, {statistics.median(beyond):.2%} of it avoidable"
              f", 95th percentile {tail:.2%}; {statistics.mean(p.waiting > 0.05 for p in plans):.1%} wait over 5 %")
        assert min(beyond) > -1e-9, "the bound is none"
        assert statistics.median(beyond) < 0.05
        assert total <= waiting < 0.05 or name == "giant"
