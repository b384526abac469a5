"""Rewards are what RL attacks: golds score 1, nothing else does, and no text raises or takes long."""

import base64
import itertools
import pickle
import statistics
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_data import solve

import data
import rewards
from verify import pool

ROOT = Path(__file__).resolve().parent.parent
ROW = {"task": "countdown", "answer": {"numbers": [3, 5, 7], "target": 22}}
RULES = rewards.Rules()


@pytest.fixture(autouse=True)
def rewards_of_the_file(monkeypatch):
    """A reader may have entered another reward (the first edit of the README); these are tested all
    the same."""
    monkeypatch.setitem(rewards.REWARDS, "countdown", rewards.countdown)
    monkeypatch.setitem(rewards.REWARDS, "math", rewards.math)
    monkeypatch.setitem(rewards.REWARDS, "code", rewards.code)
    monkeypatch.setitem(rewards.REWARDS, "rg", rewards.gym)


def wrap(answer: str) -> str:
    return f"let me see</think><answer>{answer}</answer>"


@pytest.mark.parametrize("task", ["countdown", "countdown3"])
def test_golds_score_one(task):
    """Guards a parser that refuses right answers: every sampled problem's own solution must score 1."""
    for row in data.TASKS[task]("test", 0, "base")[:60]:
        gold = solve(**row["answer"])
        said = {"reward": 1.0, "correct": 1.0, "status": "ok", "format": 1.0, "answer": gold}
        assert rewards.countdown(wrap(gold), row, RULES) == said
        assert (
            rewards.countdown(wrap(f" {gold[1:-1]}\n"), row, RULES)["reward"] == 1.0
        )  # no outer parentheses, spaces


ANSWERS = {  # reward -> what stands between the tags
    1.0: ["3*5+7", "(7) + ((3 * 5))", "5*3\n+7", "\r\n\t3*5 + 7 "],
    0.1: [  # arithmetic over integers, so well-formed, but not the answer
        "3*5-7",
        "22",
        "11+11",
        "3*5+7+0",
        "3*5+7+7-7",
        "3*5",
        "3+5+7",
        "7/(3-3)",
        "3/(5-5)*0",
        "1/0",
        "(" * 90 + "1" + ")" * 90,
        "9*" * 99 + "9",
        "1/" * 99 + "1",
        "9" * 200,
    ],
    0.0: [
        "",
        " ",
        "\n",
        "()",
        "3*5+7=22",
        "3*5+7,",
        "3*5 7",
        "3*5++7",
        "(3,5)",
        "[3*5+7]",
        "3*5+7#",
        "3*5+7;1",
        "3*5+7\\\n",
        "-3*-5+7",
        "+3*5+7",
        "7--3*5",
        "3*5+7.0",
        "3.*5+7",
        "3e0*5+7",
        "0x3*5+7",
        "3_0/2+7",
        "1_5+7",
        "03*5+7",
        "3*5+0 7",
        "٣*٥+٧",
        "３*５+７",
        "³*5+7",
        "3×5+7",
        "3*5\uff0b7",
        "3*5\u22127",
        "3\u00a0*5+7",
        "3*5+7\x00",
        "3*5+7\ud800",
        "9**9**9",
        "3**2",
        "7//3",
        "3%5",
        "3@5",
        "3<<5",
        "3^5",
        "~3",
        "3if 5else 7",
        "x:=22",
        "lambda:22",
        "True*22",
        "3(5)+7",
        "(3)(5)",
        "exit()",
        "__import__('os')",
        "().__class__",
        "(3).real*5+7",
        "'22'",
        "f'{22}'",
        "3*5+7</answer",
        "(" * 90 + "3*5+7",
        "3*5+7" + ")" * 90,
        "(" * 50_000 + "1" + ")" * 50_000,
        "9*" * 50_000 + "9",
        "9" * 201,
        *(c * 100_000 for c in "9 \n-(<"),
    ],
}
TEXTS = {  # reward -> the whole response
    1.0: [
        "<answer>1</answer> no, <answer>3*5+7</answer>",
        "<answer>1 <answer>3*5+7</answer>",
        "<answer>3*5+7</answer> and <answer>",
        "</think></think></answer><answer>3*5+7</answer>!",
        "x" * 100_000 + "<answer>3*5+7</answer>",
        "<answer>" * 12_500 + "3*5+7</answer>",
    ],
    0.1: ["<answer>3*5+7</answer> no, <answer>1</answer>", "<answer>1</answer>" * 5_000],
    0.0: [
        "",
        "3*5+7",
        "<answer>3*5+7",
        "3*5+7</answer>",
        "</answer>3*5+7<answer>",
        "<answer 3*5+7</answer>",
        "\ud800\x00",
        "<ANSWER>3*5+7</ANSWER>",
        "<answer><answer>3*5+7</answer></answer>",
        "<answer><b>3*5+7</b></answer>",
        "<answer>3*5+7</answer><answer></answer>",
        "<answer>" * 12_500,
        "</answer>" * 11_111,
        "<answer>" + "</answer" * 12_500,
    ],
}
CASES = [(reward, wrap(answer)) for reward, answers in ANSWERS.items() for answer in answers]
CASES += [(reward, text) for reward, texts in TEXTS.items() for text in texts]


def seconds(text: str) -> float:
    """Of CPU time, at the best of five tries."""
    tries = []
    for _ in range(5):
        start = time.thread_time()
        rewards.countdown(text, ROW, RULES)
        tries.append(time.thread_time() - start)
    return min(tries)


@pytest.mark.parametrize("reward, text", CASES, ids=lambda x: repr(x)[:50])
def test_attacks_score_what_they_deserve_and_fast(reward, text):
    """Guards eval of model text: hangs, exceptions, and answers that score without being one."""
    result = rewards.countdown(text, ROW, RULES)
    assert result["reward"] == reward
    assert result["correct"] == (reward == 1.0) and result["format"] == (reward > 0)
    assert (result["status"] == "ok") == (reward == 1.0)
    assert seconds(text) < 1e-3


@pytest.mark.parametrize(
    "numbers, target, answer, reward",
    [
        ([1, 3, 3], 1, "(1/3)*3", 1.0),  # in floats too
        ([1, 49, 49], 1, "(1/49)*49", 1.0),  # in floats 0.9999999999999999
        ([1, 3, 3, 3], 1, "1/3+1/3+1/3", 0.1),  # 1 used three times
        ([8, 3, 3, 8], 24, "8/(3-8/3)", 1.0),
        ([5, 5, 1], 25, "5*5", 0.1),
        ([5, 5, 1], 25, "5*5*1", 1.0),
        ([5, 1], 25, "5*5*1", 0.1),  # missing, all, twice
        ([25], 25, "25", 1.0),
        ([2, 5], 25, "25", 0.1),
        ([2, 5], 25, "2 5", 0.0),
    ],
)
def test_arithmetic_is_exact_and_numbers_are_counted(numbers, target, answer, reward):
    """Guards floats, numbers used twice or left out, and digits joined into another number."""
    row = {"answer": {"numbers": numbers, "target": target}}
    assert rewards.countdown(wrap(answer), row, RULES)["reward"] == reward


NASTY = [
    "<answer>",
    "</answer>",
    "<answer",
    *"()+-*/<>357[{'#\\=._ej \n\t\r\x00\ud800٣",
    "((",
    "22",
    "007",
    "9" * 60,
]
NASTY += ["**", "//", "0x", "lambda:", "if"]


@given(st.lists(st.sampled_from(NASTY), max_size=40).map("".join), st.booleans())
def test_no_text_raises(text, tags):
    """Guards an exception that would end a run of hours, and rewards outside {0, 0.1, 1}."""
    result = rewards.countdown(wrap(text) if tags else text, ROW, RULES)
    assert result["reward"] in (0.0, 0.1, 1.0) and result["correct"] == (result["reward"] == 1.0)


def test_unfinished_responses_score_zero():
    """Guards a reward for a response that was cut at its length limit."""
    results = rewards.score([wrap("3*5+7")] * 2 + [wrap("1")], [ROW] * 3, [True, False, False])
    assert [r["reward"] for r in results] == [1.0, 0.0, 0.0] and [
        r["correct"] for r in results
    ] == [1.0, 0.0, 0.0]
    assert [r["reward"] for r in rewards.score([wrap("3*5+7")], [ROW])] == [1.0]


def test_status_says_why():
    """Guards a response without an answer that is counted as a wrong answer."""
    texts = [wrap("3*5+7"), wrap("1"), wrap("2**3"), "3*5+7", "<answer>3*5+7"]
    statuses = [r["status"] for r in rewards.score(texts, [ROW] * 5)]
    assert statuses == ["ok", "wrong", "wrong", "no_answer", "no_answer"]


def test_our_own_mistakes_raise():
    """Guards rows without a reward, or without what the reward needs, that would score 0 for ever."""
    missing = "^no reward for task 'chess': add it to REWARDS in rewards.py.*countdown"
    with pytest.raises(ValueError, match=missing):
        rewards.score(["", ""], [ROW, ROW | {"task": "chess"}])
    with pytest.raises(ValueError, match=missing):  # before the first step
        rewards.start({"countdown", "chess:blitz"})
    with pytest.raises(ValueError, match="1 texts.*2 rows"):
        rewards.score([""], [ROW, ROW])
    for bad in ({"numbers": [1]}, {"target": 1}):
        with pytest.raises(KeyError):
            rewards.score([""], [{"task": "countdown", "answer": bad}])
    for row in ({"task": "countdown"}, {"answer": ROW["answer"]}):
        with pytest.raises(KeyError):
            rewards.score([""], [row])


def test_summary_leaves_our_failures_out():
    """Guards infra failures that count as reward 0, and parts averaged over rows that do not have them."""
    scored = [
        {"reward": 1.0, "correct": 1.0, "status": "ok", "format": 1.0},
        {"reward": 0.0, "correct": 0.0, "status": "timeout"},
        {"reward": 0.0, "correct": 0.0, "status": "infra", "format": 0.0},
        {"reward": 0.2, "correct": 0.0, "status": "wrong", "format": 0.5},
    ]
    assert rewards.summary(scored) == pytest.approx(
        {
            "reward/mean": 0.4,
            "reward/correct": 1 / 3,
            "reward/format": 0.75,
            "reward/ok_frac": 0.25,
            "reward/wrong_frac": 0.25,
            "reward/timeout_frac": 0.25,
            "reward/infra_frac": 0.25,
            "reward/memory_frac": 0,
            "reward/crash_frac": 0,
            "reward/output_frac": 0,
            "reward/no_answer_frac": 0,
        }
    )


def results(row: str) -> list[dict]:
    """ "a" to "z": wrong answers, "+": right, "-": no answer, "!": our machine failed."""
    said = {
        "+": {"correct": 1.0, "status": "ok", "answer": "4"},
        "-": {"correct": 0.0, "status": "no_answer"},
    }
    said["!"] = {"correct": 0.0, "status": "infra"}
    return [said.get(c, {"correct": 0.0, "status": "wrong", "answer": c}) for c in row]


EVALUATED = ["++++", "aabb", "+abb", "++ab", "+ab-", "+aab", "----", "!++a", "!!!!", "aaa+", "+!!!"]


def test_evaluation_by_counting():
    """Guards a biased pass@k (against every subset of the answers), a majority that counts silence or forgets ties,
    and failures of our own that count as wrong."""
    sound = [[c for c in row if c != "!"] for row in EVALUATED if set(row) != {"!"}]
    expected = {"eval/correct": statistics.mean(row.count("+") / len(row) for row in sound)}
    expected["eval/mean_at_4"] = expected["eval/correct"]
    for n in (1, 2, 4):
        subsets = [list(itertools.combinations(row, min(n, len(row)))) for row in sound]
        expected[f"eval/pass_at_{n}"] = statistics.mean(
            sum("+" in s for s in some) / len(some) for some in subsets
        )
    modes = [statistics.multimode(c for c in row if c != "-") for row in sound]
    expected["eval/maj_at_4"] = statistics.mean("+" in mode and 1 / len(mode) for mode in modes)
    assert rewards.evaluation([r for row in EVALUATED for r in results(row)], 4) == pytest.approx(
        expected
    )


def test_evaluation_of_tasks():
    """Guards tasks that are mixed up, a majority vote over programs, and k = 1."""
    scored = (
        results("+a") + [{"correct": 1.0, "status": "ok"}, {"correct": 0.0, "status": "wrong"}] * 2
    )
    said = rewards.evaluation(scored, 2, ["math"] * 2 + ["code"] * 4)
    assert (
        said["eval/correct"] == 0.5
        and said["eval/math/maj_at_2"] == 0.5
        and "eval/code/maj_at_2" not in said
    )
    assert said["eval/code/pass_at_2"] == said["eval/math/pass_at_2"] == 1.0
    assert rewards.evaluation(results("+ab"), 1) == {"eval/correct": pytest.approx(1 / 3)}
    assert rewards.evaluation(results("!!"), 2)["eval/correct"] == 0.0


def test_summary_of_tasks():
    """Guards per-task rewards that are those of another task; with one task there are none."""
    scored = [{"reward": float(i), "correct": 0.0, "status": "wrong"} for i in range(4)]
    said = rewards.summary(scored, ["math", "code", "math", "code"])
    assert (
        said["reward/math/mean"] == 1.0
        and said["reward/code/mean"] == 2.0
        and said["reward/mean"] == 1.5
    )
    assert rewards.summary(scored, ["math"] * 4) == rewards.summary(scored)


def test_a_reward_is_a_function_and_an_entry(monkeypatch):
    """Guards what a reader adds: it gets text, row and the rules of the run, for all tasks of its name."""

    def length(text: str, row: dict, rules: rewards.Rules) -> dict:
        right = len(text) == row["answer"] and rules.answers == "any"
        return {
            "reward": float(right),
            "correct": float(right),
            "status": "ok" if right else "wrong",
        }

    monkeypatch.setitem(rewards.REWARDS, "length", length)
    rows = [{"task": "length", "answer": 2}, {"task": "length:short", "answer": 1}]
    rules = rewards.Rules(answers="any")
    assert [r["reward"] for r in rewards.score(["ab", "ab"], rows, rules=rules)] == [1.0, 0.0]
    assert [r["reward"] for r in rewards.score(["ab", "ab"], rows)] == [0.0, 0.0]
    assert rewards.start({"length:short"}) == {}


SUMS = {"numbers": [3, 5, 7], "target": 22}
SQUARES = {"inputs": ["2\n", "5\n"], "outputs": ["4\n", "25\n"]}
HALF = r"\frac{1}{2}"
TYPICAL = [  # task, answer of the row, what is around a response, {status and reward: responses}
    (
        "countdown",
        SUMS,
        "<answer>{}</answer>",
        {
            "ok 1": ["3*5+7"],
            "wrong 0.1": ["3*7-5", "3/(5-5)"],
            "wrong 0": ["3*5+7=22", "9**9**9", "().real"],
        },
    ),
    ("countdown", SUMS, "{}", {"no_answer 0": ["So 3*5+7 = 22."]}),
    (
        "math",
        HALF,
        r"\boxed{{{}}}",
        {
            "ok 1": ["0.5", r"\frac24", r"\sin 30^\circ"],
            "wrong 0": ["0.50001", "1 or 1/2", "9^{9^{9^9}}", "open('x','w')"],
        },
    ),
    (
        "math",
        HALF,
        r"\boxed{{0.5}} {}",
        {"no_answer 0": ["</think> 0.5"], "wrong 0": [r"or \boxed{2}"]},
    ),
    (
        "code",
        SQUARES,
        "```python\n{}\n```",
        {
            "ok 1": ["print(int(input())**2)"],
            "wrong 0": ["print(4)"],
            "timeout 0": ["while True: pass"],
            "crash 0": ["open('/etc/passwd')"],
            "memory 0": ["x = [0] * 10**10"],
        },
    ),
    ("code", SQUARES, "{}", {"no_answer 0": ["print(int(input())**2)"]}),
]


@pytest.mark.parametrize("task, answer, around, cases", TYPICAL)
def test_typical_and_hostile_responses(task, answer, around, cases, monkeypatch):
    """Guards the verdicts that a reader would look at first."""
    monkeypatch.setattr(rewards, "TEST_SECONDS", 0.4)
    expected = [(said, wanted) for wanted, some in cases.items() for said in some]
    texts = [around.format(said) for said, _ in expected]
    results = rewards.score(texts, [{"task": task, "answer": answer}] * len(texts))
    found = [f"{result['status']} {result['reward']:g}" for result in results]
    assert list(zip([said for said, _ in expected], found)) == expected


NO_ANSWER_GIVEN = {
    "boxnet",
    "graph_color",
    "propositional_logic",
    "rubiks_cube",
    "rush_hour",
}  # have many, name none


def gym_rows(name: str, problems: list) -> list[dict]:
    entries = [base64.b64encode(pickle.dumps(problem)).decode() for problem in problems]
    return [{"task": f"rg:{name}", "answer": {"name": name, "entry": entry}} for entry in entries]


def check_gym(name: str) -> None:
    """The task's own answers score 1, and nonsense does not."""
    from reasoning_gym import create_dataset

    problems = list(create_dataset(name, seed=1, size=2))
    rows = gym_rows(name, problems)
    texts = [f"so</think> <answer> {problem['answer']}\n</answer>" for problem in problems]
    said = rewards.score([*texts, "<answer>?!</answer>", "none"], [*rows, rows[0], rows[0]])
    assert [r["reward"] for r in said[:2]] == [1.0, 1.0] and said[0]["status"] == "ok", said
    assert said[2]["status"] in ("wrong", "crash") or name == "game_of_life_halting", said
    assert said[3] == {"reward": 0.0, "correct": 0.0, "status": "no_answer"}


@pytest.mark.parametrize(
    "name",
    [
        "arc_agi",  # a scorer that compares lines
        "codeio",  # problems in a file of the package
        "figlet_font",  # fonts, which are read behind the walls
        "family_relationships",  # a problem that JSON would change
        "polynomial_equations",  # sympy
        "power_function",  # 0.01 for nonsense
        "prime_factorization",  # a scorer that nonsense crashes
        "word_ladder",  # a list of words of the package
    ],
)
def test_tasks_of_reasoning_gym_in_the_sandbox(name):
    """Guards a scorer that fails behind the walls, or that judges another problem than the one that was asked."""
    check_gym(name)


@pytest.mark.full
def test_every_task_of_reasoning_gym_in_the_sandbox():
    """Guards the same for every task of the package."""
    from reasoning_gym.factory import DATASETS

    for name in sorted(DATASETS.keys() - {"composite", *NO_ANSWER_GIVEN}):
        check_gym(name)


class Hangs:
    def __reduce__(self):
        return eval, ("[None for _ in iter(int, 1)]",)


def test_a_scorer_that_hangs_is_killed(monkeypatch):
    """Guards the trainer against a package that takes for ever, or does not know its own problem."""
    monkeypatch.setattr(rewards, "GYM_SECONDS", 0.5)
    rows = gym_rows("chain_sum", [Hangs(), {"metadata": {}}])
    said = rewards.score(["<answer>1</answer>"] * 2, rows)
    assert [r["status"] for r in said] == ["timeout", "crash"] and [r["reward"] for r in said] == [
        0.0,
        0.0,
    ]


OURS = """
def f(path):
    try:
        import rewards
        return "imported"
    except ImportError:
        pass
    try:
        return open(path).read()
    except OSError:
        return "refused"
"""


@pytest.mark.parametrize("kind", sorted(pool.KINDS))
def test_no_kind_of_process_sees_the_trainer(kind):
    """Guards a path for imports that has more on it than the one module that is needed: what lies there can be read."""
    path = pool.import_path(pool.KINDS[kind])
    assert (str(ROOT / "verify") in path) == (kind == "math") and str(ROOT) not in path
    outcome = pool.run_sandboxed(kind, OURS.encode(), [str(ROOT / "rewards.py")], "f", 1.0)
    assert (outcome.status, outcome.output) == ("ok", b'"refused"')
