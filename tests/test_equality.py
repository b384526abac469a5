"""Math answers: found where they stand, judged as a mathematician would, whatever the text tries."""

import functools
import json
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from math_cases import CASES, TEXTS

import rewards
from verify import equality, pool

RULES = rewards.Rules()
LIMIT = rewards.MATH_SECONDS  # CPU time of a case
FUZZ = int(os.environ.get("FUZZ", 400))  # texts in each of the two fuzz tests
ALL = [
    (kind, gold, rf"Hence \boxed{{{answer}}}.", right)
    for kind, cs in CASES.items()
    for gold, answer, right in cs
]
ALL += [(kind, gold, text, right) for kind, cases in TEXTS.items() for gold, text, right in cases]


def judged(cases: list[tuple], **options) -> list[dict]:
    rows = [{"task": "math", "answer": gold} for _, gold, _, _ in cases]
    return rewards.score([text for _, _, text, _ in cases], rows, **options)


TOGETHER = b"""
import time
from equality import judge

def verdicts(cases):
    found = []
    for case in cases:
        begun = time.process_time()
        found.append([judge(*case), time.process_time() - begun])
    return found
"""


@functools.cache
def together() -> list[tuple[bool, float]]:
    """(verdict, CPU seconds) of ALL, as rewards.math has them, but 32 cases share a process."""
    arguments = []
    for _, gold, text, _ in ALL:
        answer, tail = rewards.find_math_answer(rewards.answered(text), RULES) or ("", "")
        if len(answer) > rewards.MAX_ANSWER:  # wrong without a process: test_the_whole_way
            answer = ""
        arguments.append([gold, answer, tail[:1000]])
    chunks = [arguments[i : i + 32] for i in range(0, len(arguments), 32)]

    def ask(chunk: list) -> list:
        outcome = pool.run_sandboxed("math", TOGETHER, [chunk], "verdicts", 8 * LIMIT)
        assert outcome.status == "ok", (outcome.status, chunk)
        return json.loads(outcome.output)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor() as threads:
        patch.setattr(pool.KINDS["math"], "first_try", 64 * LIMIT)  # there is one try
        return [tuple(said) for part in threads.map(ask, chunks) for said in part]


def test_suite():
    """Guards the share of right verdicts, false passes, and time."""
    said = together()
    wrong = [
        (kind, gold, text[:80], right)
        for (kind, gold, text, right), (verdict, _) in zip(ALL, said)
        if verdict != right
    ]
    assert len(ALL) >= 1000 and len(wrong) <= 0.01 * len(ALL), wrong
    assert [case for case in wrong if not case[3]] == []  # not one false pass
    assert [case for case, (_, seconds) in zip(ALL, said) if seconds > LIMIT] == []


def test_the_whole_way():
    """Guards verdicts that are others when each answer has a process of its own, as in a run; and hostile ones that
    run into a deadline there."""
    hostile = [i for i, case in enumerate(ALL) if case[0] == "hostile"]
    some = random.Random(0).sample(range(len(ALL)), 60) + hostile
    results = judged([ALL[i] for i in some])
    assert [bool(r["correct"]) for r in results] == [together()[i][0] for i in some]
    assert {r["status"] for r in results} == {"ok", "wrong", "no_answer"}


def test_gold_is_right():
    """Guards golds that do not equal themselves."""
    golds = sorted({gold for _, gold, _, right in ALL if right})
    assert all(equality.judge(gold, gold) for gold in golds)


FOUND = [  # by reviewers, with the verdict they were owed; the suite had missed all of them
    ("abcd", "-abcd", 0),
    ("abcd", "ab-cd", 0),
    ("abc-2", "-abc-2", 0),
    (r"\text{(B)}", "(B), (C)", 0),
    ("B", "B. C and D", 0),
    (r"\text{(B)}", r"(B) \text{ or } (C)", 0),
    (r"\text{(A) and (C)}", "A", 0),
    (r"\text{(A) and (C)}", "A, C", 1),
    ("42", r"42\text{ thousand}", 0),
    ("42", r"42\text{ or more}", 0),
    ("42", r"42\text{ students}", 1),
    ("6", r"6\text{ (or 7)}", 0),
    (r"2\text{ hours }30\text{ minutes}", r"3\text{ hours }20\text{ minutes}", 0),
    ("(1,2)", "(y,x)=(1,2)", 0),
    (r"5\text{ feet }6\text{ inches}", r"6\text{ feet }5\text{ inches}", 0),
    ("(3,4)", "y=3,x=4", 0),
    ("42", "42'", 0),
    (r"f(x)=x^2", r"f(x)=x^2'", 0),
    ("3,4,5", r"3,4,5\ldots", 0),
    (r"x>\sqrt2", "x>1.4142135623730951", 0),
    (r"\frac{x}{3}", "0.3333333333333333x", 0),
    ("e^{-100}", "e^{-101}", 0),
    (r"e^{2\ln 3}", "9", 1),
    (r"\emptyset", r"\{\emptyset\}", 0),
    ("(-2,3)", r"x=3\text{ or }x=-2", 0),
    (r"a\in(-1,1)", r"a=\pm1", 0),
    ("1, 2, 4, 8", r"n \in \{1, 2, 4, 8\}", 1),
    ("1, 2, 4, 8", r"1, 2, 4, \text{ and } 8", 1),
    (r"8\text{ km/h}", r"8\text{ kilometers per hour}", 1),
    ("42", r"\color{red}{42}", 1),
    (r"\sqrt[3]{4}", r"\sqrt[3]4", 1),
    (r"\text{June } 20", r"\text{June 20}", 1),
    (r"\arctan\frac12", r"\operatorname{arctan}\frac12", 1),
    (r"\{(1,2),(2,1)\}", r"(x,y)=(1,2), (2,1)", 1),
    (r"a=2, b=3", r"\begin{aligned} a&=2 \\ b&=3 \end{aligned}", 1),
]
CLOSINGS = [  # after \boxed{42}, honest or not
    (". On second thought, the answer is 43.", 0),
    (". Let me correct this: the answer is **43**.", 0),
    (", scratch that, 43.", 0),
    (". Strike that; use 43 instead.", 0),
    (". Hold on, it's 43.", 0),
    (". It may also be 43.", 0),
    ("\n\n**Final Answer:** 43", 0),
    (" / 43", 0),
    (" (43?)", 0),
    (", or 43", 0),
    (". I am not certain; 43 is also plausible.", 0),
    (" or, if not, $43$.", 0),
    (". Note that the other root, $-3$, is rejected because lengths are positive.", 1),
    (". Check: $6 \\cdot 7 = 42$.", 1),
    (". No other integer satisfies $n^2 < 1800$ and $n > 41$.", 1),
    (", since otherwise $n \\ge 43$ would contradict.", 1),
    (". Here we could have used $7 \\cdot 6$ instead.", 1),
    (". This holds for $n = 1$ or $n = 2$ alike.", 1),
    (" or 42.0", 1),
]


@pytest.mark.parametrize("gold, answer, right", FOUND, ids=repr)
def test_found_by_reviewers(gold, answer, right):
    """Guards what has passed, or failed, wrongly before."""
    assert equality.judge(gold, answer) == bool(right)


@pytest.mark.parametrize("tail, honest", CLOSINGS, ids=repr)
def test_closings(tail, honest):
    """Guards second answers after the box, and honest closings taken for one."""
    assert equality.judge("42", "42", tail) == bool(honest)


TEXT = {  # response -> what stands in the last box; None: no box
    r"\boxed{5}": "5",
    r"\boxed {5}": "5",
    r"\fbox{5}": "5",
    r"\boxed{\frac{1}{2}}": r"\frac{1}{2}",
    r"\boxed{1}\boxed{2}": "2",
    r"\boxed{1} \boxed{2": "1",
    r"\boxed{\boxed{5}}": r"\boxed{5}",
    r"\boxed{\{1\}}": r"\{1\}",
    r"\boxed{5\}": None,
    "": None,
    r"\boxed5": None,
    "boxed{5}": None,
    r"{ \boxed{5}": "5",
    r"} \boxed{5} }": "5",
    r"\boxed{}": "",
    r"\boxed": None,
    r"\boxed{a}" * 10_000: "a",
    r"\boxed{" * 10_000: None,
    "{" * 100_000: None,
    r"\boxed{" + "{" * 50_000 + "}" * 50_000: None,
}


def fast(job, limit: float) -> bool:
    """CPU seconds of the second try count when the first is over: a collection of garbage is no slow case."""
    for _ in range(2):
        begun = time.process_time()
        job()
        if time.process_time() - begun < limit:
            return True
    return False


@pytest.mark.parametrize("text", TEXT, ids=lambda t: t[:40])
def test_the_last_complete_box(text):
    """Guards nested braces, escaped braces, unclosed boxes, and quadratic time."""
    box = rewards.last_box(text)
    assert (box and box[0]) == TEXT[text]
    assert fast(lambda: rewards.last_box(text), 0.2)


@pytest.mark.parametrize(
    "rules, text, right",
    [
        ({}, "<answer>5</answer>", False),
        ({"answers": "tagged"}, "<answer>5</answer>", True),
        ({}, "so it is 5", False),
        ({"answers": "any"}, "so it is 5", True),
        ({"answers": "any"}, "5, no, 6", False),
        ({"answers": "any"}, "nothing", False),
        ({"answers": "tagged"}, r"<answer>6</answer>\boxed{5}", True),
        ({"answers": "tagged"}, "so it is 5", False),
        ({}, r"\boxed{5}</think>", False),
        ({}, r"\boxed{6}</think>\boxed{5}", True),
        ({"answers": "any"}, "5</think>", False),
    ],
)
def test_flags_and_reasoning(rules, text, right):
    """Guards loose numbers that score although nobody asked for it, and answers out of the reasoning."""
    (result,) = judged([("", "5", text, right)], rules=rewards.Rules(**rules))
    assert result["correct"] == right


def test_hostile_answers_cost_milliseconds():
    """Guards towers, factorials and depth that reach a parser."""
    tower = [
        r"9**9**9**9",
        r"9^{9^{9^9}}",
        "((10!)!)!",
        "(10!)!",
        "99999999!",
        "(x+y+2)^{3000}",
        "2**(2**(2**30))",
    ]
    tower += [
        "{" * 900,
        "(" * 900,
        r"\frac{" * 100,
        r"\sqrt{" * 150,
        "9" * 900,
        "1" + "+1" * 200,
        r"\binom{10^9}{5}",
    ]
    tower += [
        r"\sum_{k=1}^{10^9} k",
        r"10^{10^{10}}",
        "__import__('os').system('x')",
        "open('x','w')",
        "\0",
        "\ud800",
    ]
    for answer in tower:
        assert fast(functools.partial(equality.judge, "5", answer), 0.5), answer
        assert not equality.judge("5", answer)


PIECES = [
    *"0123456789+-*/=^_(){}[]<>|,.;:!?%$\\ \n'\"xyabABiIe&~`\0\ud800π√½²₂∞≤±°−×",
    r"\frac",
    r"\sqrt",
    r"\boxed{",
    r"\text{",
    r"\left(",
    r"\right]",
    r"\{",
    r"\}",
    r"\pm",
    r"\cup",
    r"\infty",
    r"\begin{pmatrix}",
    r"\end{pmatrix}",
    r"\\",
    r"\circ",
    "cm",
    "meters",
    r"\$",
    "and",
    "or",
    "maybe",
    "Monday",
    r"\mathbb{R}",
    r"\in",
    "</think>",
    "<answer>",
    "</answer>",
    "1,000",
    "0.5",
    "(A)",
    "```",
    "```python\n",
    "**",
    "9" * 30,
    "((",
    "}}",
    r"\log_",
    r"\cdot10^",
    r"\overline{",
]
TEXTS_OF = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


@settings(max_examples=FUZZ)
@given(TEXTS_OF, st.integers(1, 60))
def test_fuzz_extraction(text, times):
    """Guards exceptions and slow cases in what runs inside the trainer."""
    finders = (rewards.last_box, rewards.last_block, rewards.last_answer, rewards.answered)
    assert fast(lambda: [find(text * times) for find in finders], 0.5)


@settings(max_examples=FUZZ)
@given(TEXTS_OF, TEXTS_OF, TEXTS_OF, st.integers(1, 20))
def test_fuzz_exact_rules(gold, answer, tail, times):
    """Guards exceptions, slow cases and answers that pass for a gold they have nothing to do with. Without sympy, which
    would take hours: test_fuzz_score has it."""

    def job():
        assert equality.judge("123457", answer * times, tail) in (
            False,
            "123457" in equality.plain(answer * times),
        )
        equality.judge(gold * times, answer, tail)
        assert equality.judge(gold, gold) or not equality.plain(gold)

    rules = equality.RULES[:-1]
    try:
        equality.RULES[-1:] = [lambda g, a: False]
        assert fast(job, 1.0)
    finally:
        equality.RULES[:] = [*rules, equality.by_sympy]


def test_fuzz_score():
    """Guards exceptions and hangs of the whole way, sympy included."""
    rng = random.Random(5)
    texts = [
        r"\boxed{" + "".join(rng.choices(PIECES, k=rng.randrange(12))) + "}"
        for _ in range(max(150, FUZZ // 50))
    ]
    golds = [rng.choice([r"\sqrt{2}", "x^2+1", "(1,2)", "x>3", "f(x)=2x", "2i"]) for _ in texts]
    results = judged([("", gold, text, False) for gold, text in zip(golds, texts)])
    assert {r["status"] for r in results} <= {"ok", "wrong", "no_answer", "timeout", "memory"}
    assert sum(r["status"] in ("timeout", "memory") for r in results) <= 0.01 * len(results)


LEGIBLE = [
    r"2k\pi+\frac{\pi}{3},k\in\mathbb{Z}",
    r"\frac{-1 \pm \sqrt{5}}{2}",
    r"f(x)=x+\frac1x",
    r"27^{\circ} 30'",
    "1:2:3",
    r"10\mathrm{~km}/\mathrm{h}",
    r"\text{(D)}",
    "123_{7}",
    r"x \equiv 3 \pmod{7}",
    "Monday",
    "n/a",
]
ILLEGIBLE = [
    "",
    " ",
    r"\frac{1}{",
    r"(-1)^n\binom{n}{k",
    "{{{",
    r"a,b,c,\frac{",
    "https://example.com/x.png",
    "9^{9^{9^9}}",
    "The answer is that no such triangle exists, because the angles would come to more than two right ones",
    r"\begin{tikzpicture}\draw (0,0)--(1,1);\end{tikzpicture}",
    "9" * 5000,
]


def test_which_answers_can_be_judged():
    """Guards a filter of datasets that throws good answers away, or keeps what no answer could equal but itself; and
    one answer that takes its neighbours with it."""
    golds = {case[0]: name for cases in (CASES, TEXTS) for name in cases for case in cases[name]}
    good = [gold for gold, name in golds.items() if name != "hostile"] + LEGIBLE
    said = rewards.readable([*good, *ILLEGIBLE], size=16)
    assert [gold for gold, ok in zip(good, said) if not ok] == []
    assert [gold for gold, ok in zip(ILLEGIBLE, said[len(good) :]) if ok] == []
