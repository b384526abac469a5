"""How good is this text for this row? One function per task, and `score` over a batch.

Owns: finding the answer in a response, judging it, and saying why (`status`): countdown, math, code.
Refuses to know: tokens, models, torch, where the row came from.
Left out on purpose: `eval` and every other way to run model text in this process. Rewards are the part of RL that gets
attacked. What a few lines can decide exactly is decided here; sympy and programs run in sandbox.py, in a process that
never saw the expected output of a program, that returns bytes, and that is killed when its time is up.

The contract with data.py is the row: {"task", "prompt", "answer", "id", ...}. A response is hostile text, a row is
ours: bad text never raises, and a bad row always does (KeyError, ValueError) instead of scoring 0 for ever.
A new reward is one function (text, row) -> {"reward", "correct", "status", ...} and one entry in REWARDS.
"""
import ast
import atexit
import itertools
import json
import os
import queue
import re
import select
import signal
import struct
import subprocess
import sys
import sysconfig
import textwrap
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import comb, isfinite
from operator import add, mul, sub, truediv
from pathlib import Path
from statistics import fmean
from typing import Literal

STATUSES = ("ok", "wrong", "timeout", "memory", "crash", "output", "no_answer", "infra")


@dataclass
class Rules:
    """what counts as an answer, and what a program may cost"""
    code_reward: Literal["all", "fraction"] = "all"  # all: 1 when every test passes; fraction: the part that passes
    answers: Literal["strict", "tagged", "any"] = "strict"  # math: <answer> too, then any last number; code: no fence
    unsafe_code: bool = False  # run model-written programs although the kernel offers too few walls (sandbox.py)


class Infra(Exception):
    """Our machine failed, not the model: the sample is left out of the loss and counted."""


def verdict(status: str, reward: float | None = None) -> dict:
    correct = float(status == "ok")
    return {"reward": correct if reward is None else reward, "correct": correct, "status": status}


def answered(text: str) -> str:
    """The part after the reasoning."""
    return text.rpartition("</think>")[2]


# ---------------------------------------------------------------------------------------------------------- countdown

MAX_EXPRESSION = 200  # characters; six numbers and a lot of parentheses fit in 60. Bounds the parser's time and depth.
OPERATORS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv}  # of Fractions: exact


def last_answer(text: str) -> str | None:
    """What is between the last </answer> and the <answer> before it, newlines allowed; None without. Linear time."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return None if start < 0 else text[start + len("<answer>") : end]


def evaluate(expression: str) -> tuple[Fraction | None, list[int]] | None:
    """(value, integers used) of an expression over + - * / and parentheses, exactly; None when it is anything else.
    The value is None when it divides by zero. Only binary operators and plain integers pass, so `**`, `//`, `1.5`,
    a leading minus, names, calls and attributes are all "anything else". The length allows about 100 digits in all."""
    if len(expression) > MAX_EXPRESSION or set(expression) - set("0123456789+-*/() \t\r\n"):
        return None
    try:
        tree = ast.parse(" ".join(expression.split()), mode="eval").body  # newlines allowed, "1 5" is not 15
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: how the parser says "too deep"
        return None
    used: list[int] = []

    def value(node: ast.expr) -> Fraction | None:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            left, right = value(node.left), value(node.right)
            if left is None or right is None or (isinstance(node.op, ast.Div) and right == 0):
                return None
            return OPERATORS[type(node.op)](left, right)
        raise SyntaxError("not arithmetic over integers")

    try:
        return value(tree), used
    except SyntaxError:
        return None


def countdown(text: str, row: dict) -> dict:
    """1.0 when the last answer uses every given number exactly once and reaches the target; 0.1 when it is at least
    an arithmetic expression; else 0. The 0.1 teaches the format, and is small because it can be had for nothing."""
    numbers, target = sorted(row["answer"]["numbers"]), row["answer"]["target"]
    answer = last_answer(text)
    if answer is None or (result := evaluate(answer)) is None:
        return verdict("no_answer" if answer is None else "wrong") | {"format": 0.0}
    right = sorted(result[1]) == numbers and result[0] == target
    return verdict("ok" if right else "wrong", 1.0 if right else 0.1) | {"format": 1.0, "answer": answer.strip()}


# --------------------------------------------------------------------------------------------------------------- math

MATH_SECONDS = 2.0  # CPU time of one comparison
MAX_ANSWER = 4000  # characters that anything but == may see
NUMBER = r"-?\d[\d,]*(?:\.\d+|/\d+)?"


def last_box(text: str) -> tuple[str, str] | None:
    """What stands in the last complete \\boxed{} or \\fbox{}, and what follows it. Linear, whatever the braces do."""
    stack, found = [], None
    for token in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", text):
        if token[0] == "}":
            start = stack.pop() if stack else None
            found = found if start is None else (start, token.start())
        elif token[0] == "{" or len(token[0]) > 2:
            stack.append(None if token[0] == "{" else token.end())
    return found and (text[found[0] : found[1]], text[found[1] + 1 :])


def math(text: str, row: dict) -> dict:
    """1 when the last \\boxed{} after the reasoning means the same as the row's LaTeX answer (equality.py)."""
    gold, text, rules = str(row["answer"]), answered(text), CURRENT.rules
    box = last_box(text)
    if box is None and rules.answers != "strict" and (tagged := last_answer(text)) is not None:
        box = tagged, text.rpartition("</answer>")[2]
    if box is None and rules.answers == "any" and (numbers := re.findall(NUMBER, text[-MAX_ANSWER:])):
        box = numbers[-1], ""
    if box is None or not box[0].strip():
        return verdict("no_answer")
    said = {"answer": box[0].strip()}
    if len(box[0]) > MAX_ANSWER:
        return verdict("ok" if box[0].strip() == gold.strip() else "wrong") | said
    arguments = [gold, box[0], box[1][:1000]]
    result, output = run_sandboxed("math", b"from equality import judge", arguments, "judge", MATH_SECONDS)
    status = result["status"] if result["status"] in ("timeout", "memory") else "wrong"
    return verdict("ok" if output == b"true" else status) | said


def readable(answers: list[str], progress: bool = False, size: int = 64) -> list[bool]:
    """Which LaTeX answers of a dataset could `math` judge by their meaning? `size` of them share a process; where it
    dies, each half gets one of its own."""
    chunks = [answers[i : i + size] for i in range(0, len(answers), size)]

    def ask(chunk: list[str]) -> list[bool]:
        seconds, half = MATH_SECONDS + 0.02 * len(chunk), len(chunk) // 2
        result, output = run_sandboxed("math", b"from equality import readables", [chunk], "readables", seconds)
        if result["status"] == "ok":
            return json.loads(output)
        return ask(chunk[:half]) + ask(chunk[half:]) if half else [False]

    from tqdm import tqdm  # comes with datasets; programs are judged without
    with ThreadPoolExecutor(2 * default_workers()) as threads:
        found = tqdm(threads.map(ask, chunks), "checking answers", len(chunks), disable=not progress)
        return [verdict for chunk in found for verdict in chunk]


# --------------------------------------------------------------------------------------------------------------- code

PYTHON = {"", "python", "python3", "py", "py3", "python2", "cpython", "pypy", "pypy3", "ipython", "sage", "code"}
TEST_SECONDS = 4.0  # CPU time of a program on one test; by the clock twice that and one second more
MAX_TESTS_TIME = 10  # times TEST_SECONDS: what all tests of a program may take together
FLOAT_TOLERANCE = 1e-6  # relative, absolute below 1; only where the expected output is written as a decimal


def last_block(text: str) -> str | None:
    """The last fenced block that can be Python (by its name, or without one), also when the fence is not closed."""
    block: list[str] | None = None
    fence, found = "", None
    for line in text.split("\n"):
        mark = line.strip()
        if block is None:
            opening = re.match(r"(`{3,}|~{3,})[ \t]*\{?\.?([\w+#-]*)", mark)
            if opening and "`" not in mark[opening.end() :]:
                fence, name, block = opening[1], opening[2].lower(), []
        elif mark.endswith(fence):
            block += filter(str.strip, [line[: line.rindex(fence)]])
            found, block = block if name in PYTHON else found, None
        else:
            block.append(line)
    found = block if block is not None and name in PYTHON else found
    return None if found is None else textwrap.dedent("\n".join(found))


def same_token(given: str, wanted: str) -> bool:
    if given == wanted:
        return True
    try:
        g, w = float(given), float(wanted)
    except ValueError:
        return False
    if not (given + wanted).isascii() or "_" in given or not (isfinite(g) and isfinite(w)):
        return False
    if re.search("[.eE]", wanted):
        return abs(g - w) <= FLOAT_TOLERANCE * max(1.0, abs(w))
    return g == w and max(len(given), len(wanted)) < 17  # integers: exactly, and floats are exact so far


def same_output(given: bytes, wanted: str) -> bool:
    """Line by line, token by token; empty lines and spaces do not matter."""
    lines = [[line.split() for line in text.split("\n")] for text in (given.decode("utf-8", "replace"), wanted)]
    g, w = ([line for line in side if line] for side in lines)
    return len(g) == len(w) and all(len(x) == len(y) and all(map(same_token, x, y)) for x, y in zip(g, w))


def same_value(given: object, wanted: object) -> bool:
    """Of JSON: 1 is 1.0 but not true, floats within the tolerance, no NaN."""
    if isinstance(given, bool) or isinstance(wanted, bool):
        return given is wanted
    if float in (kinds := {type(given), type(wanted)}):
        try:
            finite = kinds <= {int, float} and isfinite(given) and isfinite(wanted)
            return finite and abs(given - wanted) <= FLOAT_TOLERANCE * max(1.0, abs(wanted))
        except OverflowError:  # an integer that no float can hold
            return False
    if isinstance(given, list) and isinstance(wanted, list):
        return len(given) == len(wanted) and all(map(same_value, given, wanted))
    if isinstance(given, dict) and isinstance(wanted, dict):
        return given.keys() == wanted.keys() and all(same_value(given[key], wanted[key]) for key in wanted)
    return type(given) is type(wanted) and given == wanted


def from_json(text: str) -> object:
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 4000 else digits)


def same_result(given: bytes, wanted: object) -> bool:
    try:
        return same_value(from_json(given.decode()), wanted)
    except (ValueError, RecursionError):  # what is no JSON, or no text, or too deep
        return False


def unit_tests(row: dict) -> list[tuple[object, object]]:
    """(input, expected output) of each test: texts, or for a function its list of arguments and its result."""
    answer = row["answer"]
    inputs, outputs = answer["inputs"], answer["outputs"]
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(f"row {row.get('id')!r}: {len(inputs)} inputs, {len(outputs)} outputs: give as many, and some")
    if not answer.get("fn_name"):
        return [["\n".join(x) if isinstance(x, list) else str(x) for x in test] for test in zip(inputs, outputs)]
    arguments = [[from_json(x) for x in i.split("\n") if x.strip()] if isinstance(i, str) else i for i in inputs]
    return list(zip(arguments, [from_json(o) if isinstance(o, str) else o for o in outputs]))


def code(text: str, row: dict) -> dict:
    """1 when the last fenced block passes all tests of the row, or with --code_reward fraction the part that passes."""
    tests, name, text, rules = unit_tests(row), row["answer"].get("fn_name"), answered(text), CURRENT.rules
    block = last_block(text)
    program = text if block is None and rules.answers == "any" else block or ""
    if not program.strip():
        return verdict("no_answer")
    passed, status, spent, source = 0, "ok", 0.0, program.encode("utf-8", "surrogatepass")
    for given, wanted in tests:
        size = 2 * len(wanted if isinstance(wanted, str) else json.dumps(wanted)) + (1 << 16)
        result, output = run_sandboxed("code", source, given, name, TEST_SECONDS, size)
        outcome = result["status"]
        spent += max(result["cpu"], TEST_SECONDS * (outcome == "timeout"))
        late = spent > MAX_TESTS_TIME * TEST_SECONDS
        if outcome == "ok":
            right = (same_result if name else same_output)(output, wanted)
            outcome = "wrong" if not right else "timeout" if late else "ok"
        passed += outcome == "ok"
        status = outcome if status == "ok" else status
        if status != "ok" and (rules.code_reward == "all" or late):
            break
    return verdict(status, passed / len(tests) if rules.code_reward == "fraction" else None)


# ------------------------------------------------------------------------------------------------------ reasoning-gym

GYM_SECONDS = 4.0  # CPU time of scoring one answer
GYM = b"""import base64, pickle, reasoning_gym
def judge(name, entry, answer):
    problem = pickle.loads(base64.b64decode(entry))
    return float(reasoning_gym.create_dataset(name, seed=0, size=1).score_answer(answer, problem))"""


def gym(text: str, row: dict) -> dict:
    """The score, 0 to 1, that the task's own scorer gives to the last <answer>. row["answer"]: {"name", "entry"}, the
    problem as reasoning-gym made it, pickled, since what scorers need of it cannot always be written as JSON."""
    if (answer := last_answer(answered(text))) is None:
        return verdict("no_answer")
    arguments = [row["answer"]["name"], row["answer"]["entry"], answer.strip()[:MAX_ANSWER]]
    result, output = run_sandboxed("rg", GYM, arguments, "judge", GYM_SECONDS)
    score = min(1.0, max(0.0, float(output))) if result["status"] == "ok" else 0.0
    status = "wrong" if result["status"] == "ok" and score < 1 else result["status"]
    return verdict(status, score) | {"answer": answer.strip()}


# ----------------------------------------------------------------------------------------- processes that may be killed

WARM_UP = {"math": ("equality", "import equality; equality.warm_up()"), "rg": ("reasoning_gym", "")}  # module, program
SLICE = {"code": 0.02, "math": 0.3, "rg": 0.3}  # seconds; what takes longer starts again, with all its time, last
MEMORY = 1 << 30  # bytes of address space
FAILURES = (OSError, EOFError, TimeoutError, ValueError, struct.error)  # of a server that was killed or has gone mad
THREADS = 128  # responses under way at the same time; most of them wait for a process


class Server:
    """One sandbox.py: jobs in, bytes out, killed with everything it started when it does not answer."""

    def __init__(self, kind: str, unsafe: bool = False, off: tuple[str, ...] = ()) -> None:
        here = Path(__file__).resolve()
        command = [sys.executable, "-I", "-S", str(here.with_name("sandbox.py"))]
        config = {"path": [], "preload": [], "warm_up": "", "off": list(off)}
        if kind in WARM_UP:
            paths = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(here.parent)])
            config |= {"path": list(paths), "preload": [WARM_UP[kind][0]], "warm_up": WARM_UP[kind][1]}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "bufsize": 0}
        self.process = subprocess.Popen(command, env={}, cwd="/", start_new_session=True, **pipes)
        try:
            os.set_blocking(self.process.stdin.fileno(), False)
            self.send(time.monotonic() + 60, config)
            self.walls = self.receive(time.monotonic() + 60)[0]
            layers, missing = set(self.walls["layers"]), self.walls["missing"]
            if absent := [why for name, why in missing.items() if name in config["preload"]]:
                raise RuntimeError(f"{kind} rewards: {absent[0]}: pip install it, or -r requirements.txt")
            if kind == "code" and not unsafe and not ("seccomp" in layers and layers & {"landlock", "namespaces"}):
                what = f"code rewards: this kernel gives only {sorted(layers)} ({missing}), and model-written programs"
                fix = "use another machine, or --unsafe_code"
                raise RuntimeError(f"{what} need seccomp and one of landlock, namespaces: {fix}")
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def wait(self, pipe: int, event: int, deadline: float) -> None:
        poll = select.poll()  # select() knows no descriptor above 1023
        poll.register(pipe, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError("the sandbox does not answer")

    def send(self, deadline: float, header: dict, *bodies: bytes) -> None:
        text, pipe = json.dumps(header).encode(), self.process.stdin.fileno()
        data = memoryview(struct.pack(">I", len(text)) + text + b"".join(bodies))
        while data:
            self.wait(pipe, select.POLLOUT, deadline)
            data = data[os.write(pipe, data) :]

    def read(self, count: int, deadline: float) -> bytes:
        data, pipe = bytearray(), self.process.stdout.fileno()
        while len(data) < count:
            self.wait(pipe, select.POLLIN, deadline)
            if not (more := os.read(pipe, count - len(data))):
                raise EOFError("the sandbox is gone")
            data += more
        return bytes(data)

    def receive(self, deadline: float) -> tuple[dict, bytes]:
        (size,) = struct.unpack(">I", self.read(4, deadline))
        header = json.loads(self.read(size, deadline))
        return header, self.read(header.get("output", 0), deadline)

    def run(self, job: dict, program: bytes, given: bytes) -> tuple[dict, bytes]:
        deadline = time.monotonic() + job["wall"] + 10
        self.send(deadline, job | {"program": len(program), "input": len(given)}, program, given)
        return self.receive(deadline)


class Pool:
    """`workers` threads, each with its own servers, take jobs in order of (tried before, arrival); one thread for each
    response under way waits for its jobs."""

    def __init__(self, workers: int) -> None:
        self.closed, self.process, self.arrivals = False, os.getpid(), itertools.count()
        self.jobs: queue.PriorityQueue = queue.PriorityQueue()
        self.responses: queue.SimpleQueue = queue.SimpleQueue()
        self.servers: dict[tuple, Server] = {}
        for number in range(workers):
            threading.Thread(target=self.work, args=(number,), daemon=True).start()
        for _ in range(THREADS):
            threading.Thread(target=self.respond, daemon=True).start()
        atexit.register(self.close)

    def work(self, number: int) -> None:
        while True:
            _, _, kind, unsafe, job, program, given, future = self.jobs.get()
            name = (number, kind, unsafe)
            for attempt in range(5):
                try:
                    if name not in self.servers:
                        self.servers[name] = Server(kind, unsafe)
                    future.set_result((*self.servers[name].run(job, program, given), self.servers[name].walls))
                    break
                except FAILURES as error:
                    if name in self.servers:
                        self.servers.pop(name).kill()
                    if attempt == 4 or self.closed:
                        future.set_exception(Infra(f"{kind}: {error!r}"))
                        break
                except RuntimeError as error:  # too few walls, or a package is missing: for people to mend
                    future.set_exception(error)
                    break

    def respond(self) -> None:
        CURRENT.pool = self
        while True:
            future, text, row, CURRENT.rules = self.responses.get()
            try:
                future.set_result(REWARDS[row["task"].partition(":")[0]](text, row))
            except Infra as error:
                future.set_result(verdict("infra") | {"why": str(error)})
            except BaseException as error:  # a bad row; it is raised where the result is asked for
                future.set_exception(error)

    def close(self) -> None:
        self.closed = True
        for server in list(self.servers.values()) if self.process == os.getpid() else ():  # not in a fork of it
            server.kill()


class Current(threading.local):
    """What the response that this thread judges is judged by."""
    pool: Pool | None = None
    rules = Rules()


CURRENT = Current()
pool_of = cache(Pool)
os.register_at_fork(after_in_child=pool_of.cache_clear)  # threads do not survive a fork


def default_workers() -> int:
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def run_sandboxed(kind: str, program: bytes, given, name: str | None, cpu: float, size=1 << 16) -> tuple[dict, bytes]:
    """Runs a program on a text, or its function `name` on a list of arguments. The result's "status" is of sandbox.py:
    ok, timeout, memory, crash, output; the bytes are what it printed, or the JSON of what the function returned."""
    pool, unsafe = CURRENT.pool or pool_of(default_workers()), CURRENT.rules.unsafe_code
    data = json.dumps(given).encode() if name else str(given).encode("utf-8", "surrogatepass")
    job = {"kind": "call" if name else "stdin", "fn_name": name, "cpu": cpu, "memory": MEMORY, "output": size}
    for again, wall in enumerate((SLICE[kind], 2 * cpu + 1)):
        future: Future = Future()
        pool.jobs.put((again, next(pool.arrivals), kind, unsafe, job | {"wall": wall}, program, data, future))
        result, output, walls = future.result()
        if result["status"] != "timeout":
            break
    return result | {"walls": walls}, output


# -------------------------------------------------------------------------------------------------------------- batches


def submit(texts: list[str], rows: list[dict], finished: list | None = None, workers=0, rules=Rules()) -> list[Future]:
    """One future for each text: of {"reward": float, "correct": 0.0 or 1.0, "status": str, ...parts that are logged}.

    `finished[i]` is False when response i was cut at its length limit. Such a response scores 0: it did not choose
    to stop, and rewarding it teaches rambling (Open-Reasoner-Zero, arXiv:2503.24290, section 2).
    Raises on our own mistakes only: an unknown task here; a bad row, or a machine without enough walls, as the result.
    """
    if unknown := {row["task"].partition(":")[0] for row in rows} - set(REWARDS):
        raise ValueError(f"no reward for task {sorted(unknown)}: REWARDS in rewards.py knows {sorted(REWARDS)}")
    if len(texts) != len(rows):
        raise ValueError(f"{len(texts)} texts for {len(rows)} rows: give one row for each text")
    pool, futures = pool_of(workers or default_workers()), []
    for text, row, done in zip(texts, rows, finished or [True] * len(rows)):
        futures.append(Future())
        if done:
            pool.responses.put((futures[-1], text, row, rules))
        else:
            futures[-1].set_result(verdict("no_answer"))
    return futures


def score(texts: list[str], rows: list[dict], finished: list | None = None, workers=0, rules=Rules()) -> list[dict]:
    """The results of submit(), in the order of the texts; the same for any number of workers."""
    return [future.result() for future in submit(texts, rows, finished, workers, rules)]


def start(tasks: set[str], rules: Rules = Rules()) -> dict[str, str]:
    """Starts what the tasks need, so that what is missing shows before the first step. {what: which walls it has}"""
    made, CURRENT.rules = {}, rules
    for kind in sorted({task.partition(":")[0] for task in tasks} & SLICE.keys()):
        walls = run_sandboxed(kind, b"def f(): pass", [], "f", 1.0)[0]["walls"]
        lacking = "".join(f"; no {name}: {why}" for name, why in walls["missing"].items())
        made[f"{kind} sandbox"] = ", ".join(walls["layers"]) + lacking
    return made


def summary(scored: list[dict], tasks: list[str] = ()) -> dict[str, float]:
    """Means of "reward" and of every other number in the results, our own failures ("infra") left out; the part of the
    results with each status. Where there are several, reward and share right of each of the `tasks` of the results."""
    sound = [r for r in scored if r["status"] != "infra"]
    statuses = [r["status"] for r in scored]
    row = {f"reward/{status}_frac": statuses.count(status) / len(scored) for status in STATUSES}
    for part in sorted({part for r in sound for part in r if isinstance(r[part], (int, float))}):
        values = [r[part] for r in sound if part in r]
        row["reward/mean" if part == "reward" else f"reward/{part}"] = sum(values) / len(values)
    for task in sorted(set(tasks)) if len(set(tasks)) > 1 else ():
        own = summary([r for r, t in zip(scored, tasks) if t == task])
        row |= {f"reward/{task}/{key[7:]}": own[key] for key in ("reward/mean", "reward/correct") if key in own}
    return row


def evaluation(scored: list[dict], k: int, tasks: list[str] = ()) -> dict[str, float]:
    """Of k results for each held-out row, neighbours together: the share right (mean@k); pass@n for n = 1, 2, 4 ... k
    without bias, arXiv:2107.03374 equation 1; maj@k, where answers can be compared: is the most frequent one right?
    Right ones are the same one; a tie counts for its share. "infra" is left out. `tasks` as in summary()."""
    sound = ([r for r in scored[i : i + k] if r["status"] != "infra"] for i in range(0, len(scored), k))
    rows = [row for row in sound if row]
    right = [int(sum(r["correct"] == 1 for r in row)) for row in rows]
    correct = fmean([c / len(row) for row, c in zip(rows, right)] or [0.0])
    out = {"eval/correct": correct} | ({f"eval/mean_at_{k}": correct} if k > 1 else {})
    for n in sorted({k, *(2**i for i in range(k.bit_length()))}) if k > 1 else ():
        sizes = [(len(row), c, min(n, len(row))) for row, c in zip(rows, right)]
        out[f"eval/pass_at_{n}"] = fmean([1 - comb(size - c, m) / comb(size, m) for size, c, m in sizes] or [0.0])
    if k > 1 and any("answer" in r for row in rows for r in row):
        wrong = [Counter(r["answer"] for r in row if "answer" in r and r["correct"] != 1).values() for row in rows]
        won = [(c >= max(w, default=0) and c > 0) / (1 + list(w).count(c)) for c, w in zip(right, wrong)]
        out[f"eval/maj_at_{k}"] = fmean(won)
    for task in sorted(set(tasks)) if len(set(tasks)) > 1 else ():
        own = evaluation([r for r, t in zip(scored, tasks) if t == task], k)
        out |= {key.replace("eval/", f"eval/{task}/"): value for key, value in own.items()}
    return out


REWARDS = {"countdown": countdown, "math": math, "code": code, "rg": gym}  # task, up to a colon -> its reward

if __name__ == "__main__" and sys.argv[1:2] == ["readable"]:  # for data.py: answers in, verdicts out, both as JSON
    json.dump(readable(json.load(sys.stdin), "--progress" in sys.argv), sys.stdout)
elif __name__ == "__main__":
    import tyro

    sums, squares = {"numbers": [3, 5, 7], "target": 22}, {"inputs": ["2\n", "5\n"], "outputs": ["4\n", "25\n"]}
    typical = [  # task, answer of the row, what is around a response, {status and reward: responses}
        ("countdown", sums, "<answer>{}</answer>", {
            "ok 1": ["3*5+7"], "wrong 0.1": ["3*7-5", "3/(5-5)"], "wrong 0": ["3*5+7=22", "9**9**9", "().real"]}),
        ("countdown", sums, "{}", {"no_answer 0": ["So 3*5+7 = 22."]}),
        ("math", r"\frac{1}{2}", r"\boxed{{{}}}", {"ok 1": ["0.5", r"\frac24", r"\sin 30^\circ"],
            "wrong 0": ["0.50001", "1 or 1/2", "9^{9^{9^9}}", "open('x','w')"]}),
        ("math", r"\frac{1}{2}", r"\boxed{{0.5}} {}", {"no_answer 0": ["</think> 0.5"], "wrong 0": [r"or \boxed{2}"]}),
        ("code", squares, "```python\n{}\n```", {
            "ok 1": ["print(int(input())**2)"], "wrong 0": ["print(4)"], "timeout 0": ["while True: pass"],
            "crash 0": ["open('/etc/passwd')"], "memory 0": ["x = [0] * 10**10"]}),
        ("code", squares, "{}", {"no_answer 0": ["print(int(input())**2)"]}),
    ]  # fmt: skip

    def look(file: tyro.conf.Positional[str] = "", task: str = "", out: str = "", rules: Rules = Rules()) -> None:
        """Judges typical and hostile responses to TASK, by default to each; or the lines of FILE, a JSONL file: "task"
        (else TASK), "answer", "response" or "text", perhaps "id", "finished". OUT gets them with their verdicts."""
        rows = [{"task": t, "answer": gold, "text": around.format(said), "id": said, "expected": wanted}
                for t, gold, around, cases in typical if not file and task in ("", t)
                for wanted, some in cases.items() for said in some]  # fmt: skip
        for n, line in enumerate(open(file, encoding="utf-8") if file else (), 1):
            try:
                row = {"task": task or None, "id": f"line {n}"} | json.loads(line)
            except (ValueError, TypeError):
                sys.exit(f"{file}, line {n}: no JSON object")
            gold = None if "status" in row else row.get("answer")  # in a run's samples.jsonl it is what was found
            needed = {"task": row["task"], "answer": gold, "response": row.get("response", row.get("text"))}
            if absent := [name for name, value in needed.items() if value is None]:
                sys.exit(f'{file}, line {n}: there is no "' + '", no "'.join(absent) + '"')
            rows.append(row)
        if not rows:
            sys.exit(f"{file} has no lines" if file else f"task={task!r}: use countdown, math or code")
        print(start({row["task"] for row in rows}, rules))
        print(f"{'task':12s} {'status':10s} reward  {'answer found':24s} {'line' if file else 'response'}")
        texts, results, wrong = [row.get("response", row.get("text")) for row in rows], [], 0
        for row, future in zip(rows, submit(texts, rows, [row.get("finished", True) for row in rows], rules=rules)):
            if error := future.exception():
                sys.exit(f"{file}, {row['id']}: its answer cannot be used: {error!r}")
            results.append(future.result())
            status, reward, found = (results[-1].get(name, "") for name in ("status", "reward", "answer"))
            wanted = f"{status} {reward:g}" if file else row["expected"]
            note = f"  <- expected {wanted}" * (wanted != f"{status} {reward:g}")
            print(f"{row['task']:12s} {status:10s} {reward:<7.3g} {found and repr(found):24.24s} {row['id']}{note}")
            wrong += bool(note)
        means = [f"{k[7:]} {v:.3g}" for k, v in summary(results).items() if v or k == "reward/correct"]
        print(f"{len(rows)} responses: {', '.join(means)}")
        if out:
            Path(out).write_text("".join(json.dumps(r | {"verdict": x}) + "\n" for r, x in zip(rows, results)))
        if wrong and rules in (Rules(), Rules(unsafe_code=True)):
            sys.exit(f"{wrong} of {len(rows)} verdicts differ from what was expected")

    tyro.cli(look, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True)
