"""How good is this text for this row? One function per task, and `score` over a batch.

Owns: finding the answer in a response, judging it, and saying why (`status`): countdown, math,
code, reasoning-gym.
Refuses to know: tokens, models, torch, where the row came from, processes, and what becomes of a
verdict (`add_scores` in ppo.py: a sample that our side failed to judge, "infra", leaves the loss).
Left out on purpose: `eval` and every other way to run model text in this process. Rewards are the
part of RL that gets attacked. What a few lines can decide exactly is decided here; sympy and
programs run in verify/sandbox.py, in a process that never saw the expected output of a program,
that returns bytes, and that is killed when its time is up (verify/pool.py).

The contract with data.py is the row: {"task", "prompt", "answer", "id", ...}. A response is hostile
text, a row is ours: bad text never raises, and a bad row always does (KeyError, ValueError) instead
of scoring 0 for ever.

A new reward is one function (text, row, rules) -> {"reward", "correct", "status", ...} and one
entry in REWARDS, which stands below the four that are here. Its rows are made in data.py.
"""

import ast
import json
import re
import sys
import textwrap
from collections import Counter, defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from math import comb, isfinite
from operator import add, mul, sub, truediv
from statistics import fmean
from typing import Literal

from verify import pool

STATUSES = ("ok", "wrong", "timeout", "memory", "crash", "output", "no_answer", "infra")


@dataclass
class Rules:
    """which answers are right"""

    # of a program. all: 1 when it passes every test, else 0; fraction: the part it passes, 0 to 1
    code_reward: Literal["all", "fraction"] = "all"
    # where an answer is looked for. strict: \boxed{} for math, a fenced block for code; tagged:
    # math in <answer>, too; any: also the last number for math, text without a fence for code
    answers: Literal["strict", "tagged", "any"] = "strict"
    # run programs that a model wrote although this machine cannot lock them in safely, for reasons
    # that verify/sandbox.py gives
    unsafe_code: bool = False


def verdict(status: str, **parts: float | str) -> dict:
    """A result; the reward is 1 for "ok" and 0 for all else, unless it is among the parts."""
    correct = float(status == "ok")
    return {"reward": correct, "correct": correct, "status": status} | parts


def answered(text: str) -> str:
    """The part after the reasoning."""
    return text.rpartition("</think>")[2]


# --------------------------------------------------------------------------------------- countdown

# Characters; six numbers and a lot of parentheses fit in 60. Bounds the parser's time and depth.
MAX_EXPRESSION = 200
OPERATORS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv}  # of Fractions: exact


def last_answer(text: str) -> str | None:
    """What is between the last </answer> and the <answer> before it, newlines allowed; None
    without. Linear time."""
    before = text.rpartition("</answer>")[0]
    _, tag, answer = before.rpartition("<answer>")
    return answer if tag else None


def value_of(tree: ast.expr) -> Fraction:
    if isinstance(tree, ast.Constant):
        return Fraction(tree.value)
    return OPERATORS[type(tree.op)](value_of(tree.left), value_of(tree.right))


def evaluate(expression: str) -> tuple | None:
    """(value, integers used) of an expression over + - * / and parentheses, exactly; None when it
    is anything else. The value is None when it divides by zero. Only binary operators and plain
    integers pass, so `**`, `//`, `1.5`, a leading minus, names, calls and attributes are all
    "anything else". The length allows about 100 digits in all."""
    if len(expression) > MAX_EXPRESSION or set(expression) - set("0123456789+-*/() \t\r\n"):
        return None
    try:  # newlines are allowed, and "1 5" is not 15
        tree = ast.parse(" ".join(expression.split()), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None  # the last two are how the parser says "too deep"
    nodes = list(ast.walk(tree))
    used = [node.value for node in nodes if isinstance(node, ast.Constant)]
    if set(map(type, nodes + used)) - {int, ast.BinOp, ast.Constant, *OPERATORS}:
        return None
    try:
        return value_of(tree), used
    except ZeroDivisionError:
        return None, used


def countdown(text: str, row: dict, rules: Rules) -> dict:
    """1.0 when the last answer uses every given number exactly once and reaches the target; 0.1
    when it is at least an arithmetic expression; else 0. The 0.1 teaches the format, and is small
    because it can be had for nothing."""
    numbers = sorted(row["answer"]["numbers"])
    target = row["answer"]["target"]
    answer = last_answer(text)
    if answer is None:
        return verdict("no_answer", format=0.0)
    result = evaluate(answer)
    if result is None:
        return verdict("wrong", format=0.0)
    value, used = result
    said = {"format": 1.0, "answer": answer.strip()}
    if sorted(used) == numbers and value == target:
        return verdict("ok", **said)
    return verdict("wrong", reward=0.1, **said)


# -------------------------------------------------------------------------------------------- math

MATH_SECONDS = 2.0  # CPU time of one comparison
MAX_ANSWER = 4000  # characters that anything but == may see
EQUALITY = b"from equality import judge, readables"
NUMBER = r"-?\d[\d,]*(?:\.\d+|/\d+)?"


def last_box(text: str) -> tuple | None:
    """What stands in the last complete \\boxed{} or \\fbox{}, and what follows it. Linear, whatever
    the braces do."""
    opened = []  # where the content of a box begins; None: another brace
    begin = end = None
    for token in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", text):
        if token[0] == "{":
            opened.append(None)
        elif token[0] == "}" and opened:
            start = opened.pop()
            if start is not None:
                begin = start
                end = token.start()
        elif len(token[0]) > 2:  # a box, not an escaped brace
            opened.append(token.end())
    if begin is None:
        return None
    return text[begin:end], text[end + 1 :]


def find_math_answer(text: str, rules: Rules) -> tuple | None:
    """The answer, and what follows it, that the rules allow to be found in a response without its
    reasoning: the last box, else the last <answer>, else the last number."""
    box = last_box(text)
    if box is not None or rules.answers == "strict":
        return box
    tagged = last_answer(text)
    if tagged is not None:
        return tagged, text.rpartition("</answer>")[2]
    if rules.answers == "any":
        numbers = re.findall(NUMBER, text[-MAX_ANSWER:])
        if numbers:
            return numbers[-1], ""
    return None


def math(text: str, row: dict, rules: Rules) -> dict:
    """1 when the last \\boxed{} after the reasoning means the same as the row's LaTeX answer
    (verify/equality.py)."""
    gold = str(row["answer"])
    answer, tail = find_math_answer(answered(text), rules) or ("", "")
    stripped = answer.strip()
    if not stripped:
        return verdict("no_answer")
    status = "wrong"
    if len(answer) > MAX_ANSWER:
        same = stripped == gold.strip()
    else:
        arguments = [gold, answer, tail[:1000]]
        outcome = pool.run_sandboxed("math", EQUALITY, arguments, "judge", MATH_SECONDS)
        same = outcome.output == b"true"
        if outcome.status in ("timeout", "memory"):
            status = outcome.status
    return verdict("ok" if same else status, answer=stripped)


def readable(answers: list[str], progress: bool = False, size: int = 64) -> list[bool]:
    """Which LaTeX answers of a dataset could `math` judge by their meaning? `size` of them share a
    process; where it dies, each half gets one of its own."""

    def ask(chunk):
        seconds = MATH_SECONDS + 0.02 * len(chunk)
        outcome = pool.run_sandboxed("math", EQUALITY, [chunk], "readables", seconds)
        if outcome.status == "ok":
            return json.loads(outcome.output)
        if len(chunk) == 1:
            return [False]
        half = len(chunk) // 2
        return ask(chunk[:half]) + ask(chunk[half:])

    from tqdm import tqdm  # comes with datasets; programs are judged without

    chunks = [answers[i : i + size] for i in range(0, len(answers), size)]
    with ThreadPoolExecutor(2 * pool.default_workers()) as threads:
        asked = threads.map(ask, chunks)
        parts = tqdm(asked, "checking answers", len(chunks), disable=not progress)
        return list(chain.from_iterable(parts))


# -------------------------------------------------------------------------------------------- code

# The names of a fenced block that can be Python
PYTHON = {"", *"python python3 py py3 python2 cpython pypy pypy3 ipython sage code".split()}
TEST_SECONDS = 4.0  # CPU time of a program on one test; by the clock twice that and a second more
MAX_TESTS_TIME = 10  # times TEST_SECONDS: what all tests of a program may take together
FLOAT_TOLERANCE = 1e-6  # relative, absolute below 1; only where a decimal is expected


def last_block(text: str) -> str | None:
    """The last fenced block that can be Python (by its name, or without one), also when the fence
    is not closed."""
    found = None
    block = None  # the lines of the block that is open
    for line in text.split("\n"):
        mark = line.strip()
        if block is None:
            opening = re.match(r"(`{3,}|~{3,})[ \t]*\{?\.?([\w+#-]*)", mark)
            if opening and "`" not in mark[opening.end() :]:
                fence = opening[1]
                block = []
                if opening[2].lower() in PYTHON:
                    found = block
        elif mark.endswith(fence):
            rest = line[: line.rindex(fence)]
            if rest.strip():
                block.append(rest)
            block = None
        else:
            block.append(line)
    if found is None:
        return None
    return textwrap.dedent("\n".join(found))


def close(given: float, wanted: float) -> bool:
    # nothing is close to infinity, nor to nan
    return isfinite(wanted) and abs(given - wanted) <= FLOAT_TOLERANCE * max(1.0, abs(wanted))


def same_token(given: str, wanted: str) -> bool:
    if given == wanted:
        return True
    if not (given + wanted).isascii() or "_" in given:
        return False
    try:
        g = float(given)
        w = float(wanted)
    except ValueError:
        return False
    if re.search("[.eE]", wanted):
        return close(g, w)
    # integers: exactly, and floats are exact so far
    return g == w and isfinite(w) and max(len(given), len(wanted)) < 17


def token_lines(text: str) -> list:
    """The words of each line that has some."""
    return [line.split() for line in text.split("\n") if line.strip()]


def same_output(given: bytes, wanted: str) -> bool:
    """Line by line, token by token; empty lines and spaces do not matter."""
    given_lines = token_lines(given.decode("utf-8", "replace"))
    wanted_lines = token_lines(wanted)
    if list(map(len, given_lines)) != list(map(len, wanted_lines)):
        return False
    return all(map(same_token, chain(*given_lines), chain(*wanted_lines)))


def same_value(given, wanted) -> bool:
    """Of JSON: 1 is 1.0 but not true, floats within the tolerance, no NaN."""
    match given, wanted:
        case (bool(), _) | (_, bool()):
            return given is wanted
        case (float(), _) | (_, float()):
            try:
                return close(given, wanted)
            except (TypeError, OverflowError):  # no number; an integer that no float can hold
                return False
        case list(), list():
            return len(given) == len(wanted) and all(map(same_value, given, wanted))
        case dict(), dict():
            same_keys = given.keys() == wanted.keys()
            return same_keys and all(same_value(given[key], wanted[key]) for key in wanted)
    return type(given) is type(wanted) and given == wanted


def from_json(text: str):
    """Integers of 4000 digits and more stay text: to read them takes quadratic time."""
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 4000 else digits)


def same_result(given: bytes, wanted) -> bool:
    try:
        return same_value(from_json(given.decode()), wanted)
    except (ValueError, RecursionError):  # what is no JSON, or no text, or too deep
        return False


def as_text(lines) -> str:
    """Input or output of a program, which some datasets keep as a list of lines."""
    if isinstance(lines, list):
        return "\n".join(lines)
    return str(lines)


def as_arguments(given):
    """The arguments of a call, which some datasets keep as JSON, one a line."""
    if isinstance(given, str):
        return [from_json(line) for line in given.split("\n") if line.strip()]
    return given


def as_value(wanted):
    if isinstance(wanted, str):
        return from_json(wanted)
    return wanted


def unit_tests(row: dict) -> list[tuple]:
    """(input, expected output) of each test: texts, or for a function its list of arguments and its
    result."""
    answer = row["answer"]
    inputs = answer["inputs"]
    outputs = answer["outputs"]
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(
            f"row {row.get('id')!r}: {len(inputs)} inputs, {len(outputs)} outputs: "
            "give as many, and some"
        )
    if answer.get("fn_name"):
        return list(zip(map(as_arguments, inputs), map(as_value, outputs)))
    return list(zip(map(as_text, inputs), map(as_text, outputs)))


def run_test(program: bytes, name: str | None, given, wanted, unsafe: bool) -> tuple:
    """(status, CPU seconds) of a program, or of its function `name`, on one test."""
    expected = wanted if isinstance(wanted, str) else json.dumps(wanted)
    size = 2 * len(expected) + (1 << 16)
    outcome = pool.run_sandboxed("code", program, given, name, TEST_SECONDS, size, unsafe)
    status = outcome.status
    if status == "timeout":  # of the clock, perhaps: a program that sleeps pays too
        return status, max(outcome.cpu, TEST_SECONDS)
    same = same_result if name else same_output
    if status == "ok" and not same(outcome.output, wanted):
        status = "wrong"
    return status, outcome.cpu


def code(text: str, row: dict, rules: Rules) -> dict:
    """1 when the last fenced block passes all tests of the row, or with --code_reward fraction the
    part that passes. The status is that of the first test that fails."""
    tests = unit_tests(row)
    name = row["answer"].get("fn_name")
    text = answered(text)
    program = last_block(text)
    if program is None and rules.answers == "any":
        program = text
    if not program or not program.strip():
        return verdict("no_answer")
    source = program.encode("utf-8", "surrogatepass")
    status = "ok"
    passed = 0
    spent = 0.0
    for given, wanted in tests:
        outcome, seconds = run_test(source, name, given, wanted, rules.unsafe_code)
        spent += seconds
        late = spent > MAX_TESTS_TIME * TEST_SECONDS
        if outcome == "ok" and late:
            outcome = "timeout"
        if outcome == "ok":
            passed += 1
        elif status == "ok":
            status = outcome
        if late or (status != "ok" and rules.code_reward == "all"):
            break
    if rules.code_reward == "fraction":
        return verdict(status, reward=passed / len(tests))
    return verdict(status)


# ----------------------------------------------------------------------------------- reasoning-gym

GYM_SECONDS = 4.0  # CPU time of scoring one answer
GYM = b"""import base64, pickle, reasoning_gym
def judge(name, entry, answer):
    problem = pickle.loads(base64.b64decode(entry))
    task = reasoning_gym.create_dataset(name, seed=0, size=1)
    return float(task.score_answer(answer, problem))"""


def gym(text: str, row: dict, rules: Rules) -> dict:
    """The score, 0 to 1, that the task's own scorer gives to the last <answer>. row["answer"]:
    {"name", "entry"}, the problem as reasoning-gym made it, pickled, since what scorers need of it
    cannot always be written as JSON."""
    answer = last_answer(answered(text))
    if answer is None:
        return verdict("no_answer")
    answer = answer.strip()
    arguments = [row["answer"]["name"], row["answer"]["entry"], answer[:MAX_ANSWER]]
    outcome = pool.run_sandboxed("rg", GYM, arguments, "judge", GYM_SECONDS)
    if outcome.status != "ok":
        return verdict(outcome.status, answer=answer)
    points = min(1.0, max(0.0, float(outcome.output)))
    return verdict("wrong" if points < 1 else "ok", reward=points, answer=answer)


# ------------------------------------------------------------------------------------- the rewards

REWARDS = {  # of each task, up to a colon
    "countdown": countdown,
    "math": math,
    "code": code,
    "rg": gym,
}


# ----------------------------------------------------------------------------------------- batches

DEFAULT = Rules()
Results = list[dict]  # of submit()


def reward_names(tasks: set[str]) -> set[str]:
    """Their keys in REWARDS: that of rg:chain_sum is rg. Raises where there is none."""
    names = {task.partition(":")[0] for task in tasks}
    unknown = sorted(names - REWARDS.keys())
    if unknown:
        raise ValueError(
            f"no reward for task {', '.join(map(repr, unknown))}: add it to REWARDS in rewards.py, "
            f"which has {', '.join(REWARDS)}"
        )
    return names


def judge(text: str, row: dict, rules: Rules) -> dict:
    try:
        return REWARDS[row["task"].partition(":")[0]](text, row, rules)
    except pool.Infra as error:
        return verdict("infra", why=str(error))


def submit(
    texts: list[str],
    rows: list[dict],
    finished: list[bool] | None = None,
    rules: Rules = DEFAULT,
) -> list[Future]:
    """One future for each text: of {"reward": float, "correct": 0.0 or 1.0, "status": str, ...parts
    that are logged}. `rules` is anything with the attributes of Rules.

    `finished[i]` is False when response i was cut at its length limit. Such a response scores 0: it
    did not choose to stop, and rewarding it teaches rambling (Open-Reasoner-Zero, arXiv:2503.24290,
    section 2).
    Raises on our own mistakes only: an unknown task here; a bad row, or a machine without enough
    walls, as the result.
    """
    reward_names({row["task"] for row in rows})
    if len(texts) != len(rows):
        raise ValueError(f"{len(texts)} texts for {len(rows)} rows: give one row for each text")
    futures = []
    for i, (text, row) in enumerate(zip(texts, rows)):
        if finished and not finished[i]:
            future = Future()
            future.set_result(verdict("no_answer"))
        else:
            future = pool.submit(judge, text, row, rules)
        futures.append(future)
    return futures


def score(
    texts: list[str], rows: list[dict], finished: list[bool] | None = None, rules: Rules = DEFAULT
) -> Results:
    """The results of submit(), in the order of the texts; the same for any number of processes."""
    return [future.result() for future in submit(texts, rows, finished, rules)]


def start(tasks: set[str], rules: Rules = DEFAULT) -> dict:
    """Starts what the tasks need, so that what is missing shows before the first step: packages,
    walls of the sandbox, a reward. Returns {sandbox: which walls it has}."""
    made = {}
    for kind in sorted(reward_names(tasks) & pool.KINDS.keys()):
        unsafe = kind == "code" and rules.unsafe_code
        outcome = pool.run_sandboxed(kind, b"def f(): pass", [], "f", cpu=1.0, unsafe=unsafe)
        walls = ", ".join(outcome.walls["layers"])
        for name, why in outcome.walls["missing"].items():
            walls += f"; no {name}: {why}"
        made[f"{kind} sandbox"] = walls
    return made


def summary(scored: Results, tasks: list[str] = ()) -> dict:
    """Means of "reward" and of every other number in the results, our own failures ("infra") left
    out; the part of the results with each status. Where there are several, reward and share right
    of each of the `tasks` of the results."""
    statuses = [result["status"] for result in scored]
    row = {f"reward/{name}_frac": statuses.count(name) / len(scored) for name in STATUSES}
    values = defaultdict(list)
    for result in scored:
        if result["status"] != "infra":
            for part, value in result.items():
                if isinstance(value, int | float):
                    values[part].append(value)
    for part in sorted(values):
        key = "reward/mean" if part == "reward" else f"reward/{part}"
        row[key] = sum(values[part]) / len(values[part])
    for task, results in by_task(scored, tasks).items():
        own = summary(results)
        for key in ("reward/mean", "reward/correct"):
            if key in own:
                row[key.replace("reward/", f"reward/{task}/")] = own[key]
    return row


def by_task(scored: Results, tasks: list[str]) -> dict[str, Results]:
    """The results of each task, where there are several."""
    groups = defaultdict(list)
    for result, task in zip(scored, tasks):
        groups[task].append(result)
    return dict(sorted(groups.items())) if len(groups) > 1 else {}


def count_right(row: Results) -> int:
    return [result["correct"] for result in row].count(1)


def mean(values: list[float]) -> float:
    return fmean(values or [0.0])


def pass_at(n: int, rows: list[Results]) -> float:
    """The chance that at least one of n answers to a question is right, without bias, over rows of
    at least n answers to the same question (of all, where there are fewer); arXiv:2107.03374,
    equation 1."""
    chances = []
    for row in rows:
        drawn = min(n, len(row))
        chances.append(1 - comb(len(row) - count_right(row), drawn) / comb(len(row), drawn))
    return mean(chances)


def majority(row: Results) -> float:
    """Is the most frequent of the answers to one question right? Right ones are the same one; a tie
    counts for its share."""
    right = count_right(row)
    wrong = Counter(r["answer"] for r in row if "answer" in r and r["correct"] != 1)
    counts = list(wrong.values())
    if right == 0 or right < max(counts, default=0):
        return 0.0
    return 1 / (1 + counts.count(right))


def evaluation(scored: Results, k: int, tasks: list[str] = ()) -> dict:
    """Of k results for each held-out row, neighbours together: the share right (mean@k), pass@n for
    n = 1, 2, 4 ... k, and maj@k where answers can be compared. "infra" is left out. `tasks` as in
    summary()."""
    groups = defaultdict(list)
    for i, result in enumerate(scored):
        if result["status"] != "infra":
            groups[i // k].append(result)
    rows = list(groups.values())
    out = {"eval/correct": mean([count_right(row) / len(row) for row in rows])}
    if k > 1:
        out[f"eval/mean_at_{k}"] = out["eval/correct"]
        n = 1
        while n < k:
            out[f"eval/pass_at_{n}"] = pass_at(n, rows)
            n *= 2
        out[f"eval/pass_at_{k}"] = pass_at(k, rows)
        if any("answer" in result for result in scored):
            out[f"eval/maj_at_{k}"] = mean([majority(row) for row in rows])
    for task, results in by_task(scored, tasks).items():
        for key, value in evaluation(results, k).items():
            out[key.replace("eval/", f"eval/{task}/")] = value
    return out


# -------------------------------------------------------------------------------- python rewards.py

SUM = "Make 22 out of 3, 5, 7."
NUMBERS = {"numbers": [3, 5, 7], "target": 22}
HALVES = "What is 1/2 + 1/4?"
DOUBLE = "Read a number, print its double."
PROGRAM = "```python\n{}\n```"
TESTS = {"inputs": ["2", "21"], "outputs": ["4", "42"]}
SHOWN = [  # task, question, the answer in its row, a response
    ("countdown", SUM, NUMBERS, "<answer>3*5+7</answer>"),
    ("countdown", SUM, NUMBERS, "<answer>5*7-3</answer>"),
    ("countdown", SUM, NUMBERS, "<answer>22</answer>"),
    ("countdown", SUM, NUMBERS, "It is 3*5+7."),
    ("math", HALVES, r"\frac{3}{4}", r"It is \boxed{0.75}."),
    ("math", HALVES, r"\frac{3}{4}", r"It is \boxed{2/6}."),
    ("math", HALVES, r"\frac{3}{4}", r"It is \boxed{0.75 or 0.5}."),
    ("code", DOUBLE, TESTS, PROGRAM.format("print(2 * int(input()))")),
    ("code", DOUBLE, TESTS, PROGRAM.format("print(4)")),
    ("code", DOUBLE, TESTS, PROGRAM.format("while True: pass")),
]


def demo():
    """Some responses and the verdicts on them; a program that never ends takes TEST_SECONDS."""
    rows = [{"task": task, "answer": answer} for task, _, answer, _ in SHOWN]
    print(f"{'task':10} {'question':33} {'response':45} {'status':10} reward")
    for (task, question, _, response), result in zip(SHOWN, score([r[3] for r in SHOWN], rows)):
        said = f"{task:10} {question:33} {response!r:45}"
        print(f"{said} {result['status']:10} {result['reward']:g}")
    print("\nYour own responses: python tools/score.py FILE.jsonl")


if __name__ == "__main__":
    if sys.argv[1:2] == ["readable"]:  # for data.py: answers in, verdicts out, both as JSON
        json.dump(readable(json.load(sys.stdin), "--progress" in sys.argv), sys.stdout)
    else:
        demo()
