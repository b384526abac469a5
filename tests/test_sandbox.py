"""Model-written programs: nothing gets out, nothing honest is refused, nothing hangs, nothing stays behind."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import attacks
import pytest
from honest import HONEST, HONEST_CALLS

import rewards
from verify import pool

ROOT = Path(__file__).resolve().parent.parent
ORDINARY = 23456  # the id of no user in particular


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(rewards, "TEST_SECONDS", 0.4)


def fenced(source: str) -> str:
    return f"So:\n```python\n{source}\n```"


def task(tests: list[tuple[str, str]], name: str | None = None) -> dict:
    inputs, outputs = ([test[i] for test in tests] for i in (0, 1))
    return {
        "task": "code",
        "id": "x",
        "answer": {"inputs": inputs, "outputs": outputs, "fn_name": name},
    }


def honest() -> list[tuple[str, str, dict]]:
    found = [(name, fenced(source), task(tests)) for name, (source, tests) in HONEST.items()]
    return found + [
        (name, fenced(source), task(tests, fn))
        for name, (source, fn, tests) in HONEST_CALLS.items()
    ]


def test_too_few_walls_are_refused(monkeypatch, workers):
    """Guards a machine without seccomp on which programs would run all the same."""
    start = pool.Server.__init__
    monkeypatch.setattr(
        pool.Server, "__init__", lambda s, kind, unsafe: start(s, kind, unsafe, ("seccomp",))
    )
    workers(1)
    row, text = task([("1", "1")]), fenced("print(input())")
    with pytest.raises(RuntimeError, match="(?s)seccomp.*--unsafe_code"):
        rewards.score([text], [row])
    with pytest.raises(RuntimeError, match="(?s)seccomp.*--unsafe_code"):
        rewards.start({"code"})
    unsafe = rewards.Rules(unsafe_code=True)
    assert rewards.score([text], [row], rules=unsafe)[0]["status"] == "ok"
    assert "seccomp" not in rewards.start({"code"}, unsafe)["code sandbox"]


STATUS_OF = {
    "print(1)": "ok",
    "print(2)": "wrong",
    "1/0": "crash",
    "import os\nos.kill(os.getpid(), 11)": "crash",
    "while True: pass": "timeout",
    "import time\ntime.sleep(99)": "timeout",
    "x = [0] * 10**10": "memory",
    "while True: print('x' * 999)": "output",
    "print(1)\nraise SystemExit(3)": "crash",
    "(": "crash",
    "": "no_answer",
}


def test_status_says_why(fast):
    """Guards statuses that hide what happened."""
    results = rewards.score(list(map(fenced, STATUS_OF)), [task([("", "1")])] * len(STATUS_OF))
    assert {source: result["status"] for source, result in zip(STATUS_OF, results)} == STATUS_OF
    for result in results:
        right = float(result["status"] == "ok")
        assert result == {"reward": right, "correct": right, "status": result["status"]}


def test_all_tests_count_and_fractions():
    """Guards verdicts from the first ten tests, and partial credit that nobody asked for."""
    row = task([(str(i), str(i * i)) for i in range(20)])
    until = fenced("n = int(input())\nprint(n * n if n < 15 else 0)")
    assert rewards.score([until], [row])[0] == {"reward": 0.0, "correct": 0.0, "status": "wrong"}
    rules = rewards.Rules(code_reward="fraction")
    assert rewards.score([until], [row], rules=rules)[0] == {
        "reward": 0.75,
        "correct": 0.0,
        "status": "wrong",
    }
    calls = task([(f"{i}", f"{i + 1}") for i in range(4)], "f")
    half = fenced("def f(x):\n    return x + 1 if x < 2 else 1 / 0")
    assert rewards.score([half], [calls], rules=rules)[0] == {
        "reward": 0.5,
        "correct": 0.0,
        "status": "crash",
    }
    for bad in (task([]), {"task": "code", "answer": {"inputs": ["1"], "outputs": []}}):
        with pytest.raises(ValueError, match="inputs"):
            rewards.score([until], [bad])


BLOCKS = {
    "```python\nA\n```": "A",
    "```py\nA\n```\nDone.": "A",
    "```\nA\n```": "A",
    "```Python3\nA\n```": "A",
    "~~~python\nA\n~~~": "A",
    "````python\nA\n```\nB\n````": "A\n```\nB",
    "``` python\nA\n```": "A",
    "```python\nA\n```\nthen\n```python\nB\n```": "B",
    "```python\nA": "A",
    "  ```python\n  A\n   B\n  ```": "A\n B",
    "```python\nA\n```\n```text\nB\n```": "A",
    "```python\nA\n```\n```cpp\nB": "A",
    "```python\r\nA\r\n```": "A\r",
    "```{.python}\nA\n```": "A",
    "```python title='x'\nA\n```": "A",
    "```python\nA```": "A",
    "A": None,
    "": None,
    "```": "",
    "`A`": None,
    "```bash\nA\n```": None,
    "<think>```python\nA\n```</think>": None,
    "x ```python\nA\n```": "",
    "```python\nprint('''\n  ''')\n```": "print('''\n  ''')",
}


@pytest.mark.parametrize("text", BLOCKS, ids=repr)
def test_the_last_block_is_the_program(text):
    """Guards other fences, unclosed fences, sample output after the program, and programs out of the reasoning."""
    assert rewards.last_block(rewards.answered(text)) == BLOCKS[text]


@pytest.mark.parametrize(
    "given, wanted, same",
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("1  2 \n\n3", "1 2\n3", True),
        ("1 2 3", "1 2\n3", False),
        ("1", "1\n1", False),
        ("12345678901234567890", "12345678901234567891", False),
        ("1.0", "1", True),
        ("1.0000001", "1", False),
        ("0.33333333", "0.3333333333", True),
        ("0.3333", "0.333333", False),
        ("1e-9", "0.0", True),
        ("nan", "nan", True),
        ("nan", "1.0", False),
        ("inf", "1.0", False),
        ("1_0", "10", False),
        ("١", "1", False),
        ("0x10", "16", False),
        ("yes", "YES", False),
        ("1000000.5", "1000000.0", True),
        ("1000002", "1000000", False),
        ("", "1", False),
        ("1e3", "1000", True),
        ("-0", "0", True),
        ("9007199254740993.0", "9007199254740992", False),
        ("\ufffd", "\ud800", False),
    ],
)
def test_outputs_are_compared_by_tokens(given, wanted, same):
    """Guards tolerance on integers, no tolerance on floats, and Python's looser readings of numbers."""
    assert rewards.same_output(given.encode("utf-8", "replace"), wanted) == same


@pytest.mark.parametrize(
    "given, wanted, same",
    [
        ("1", 1, True),
        ("1.0", 1, True),
        ("true", 1, False),
        ("1", True, False),
        ("null", 0, False),
        ('"1"', 1, False),
        ("NaN", None, False),
        ("NaN", 1.0, False),
        ("Infinity", 1.0, False),
        ("1e400", 1.0, False),
        ("[1, [2]]", [1, [2]], True),
        ("[1, 2]", [2, 1], False),
        ('{"a": 1}', {"a": 1.0}, True),
        ('{"a": 1}', {"a": 1, "b": 2}, False),
        ("0.1", 0.1 + 1e-9, True),
        ("10000000001", 10000000000, False),
        ("[" * 99999, 1, False),
        ("1", "1", False),
        ("", None, False),
        ("1 2", 1, False),
        ("1" + "0" * 5000, 1.0, False),
        ("1180591620717411303424", 2**70, True),
        ("1180591620717411303425", 2**70, False),
    ],
)
def test_results_are_compared_as_json(given, wanted, same):
    """Guards true for 1, NaN for anything, and objects that compare themselves."""
    assert rewards.same_result(given.encode(), wanted) == same


def mixture(count: int, seed: int) -> tuple[list[str], list[dict], list[float]]:
    """Texts, rows and right rewards of two tasks: one whose jobs wait for a process, one that needs none."""
    rng, cases = random.Random(seed), []
    right = fenced("a, b = map(int, input().split())\nprint(a + b)")
    for _ in range(count):
        a, b = rng.randrange(100), rng.randrange(100)
        ok = rng.random() < 0.5
        program = (
            right if ok else fenced("print(3)"),
            task([(f"{a} {b}", str(a + b)), (f"{b} 900", str(b + 900))]),
            ok,
        )
        problem = (
            f"<answer>{a}*{b + (not ok)}</answer>",
            {"task": "countdown", "answer": {"numbers": [a, b], "target": a * b}},
            ok,
        )
        cases.append(rng.choice([program, program, problem]))
    texts, rows, rights = zip(*cases)
    return list(texts), list(rows), [float(r) for r in rights]


def test_any_order_any_workers_any_thread(workers):
    """Guards results that depend on the order, on the number of processes, or on being in the main thread."""
    texts, rows, rights = mixture(60, 1)
    workers(1)
    expected = rewards.score(texts, rows)
    assert [r["correct"] for r in expected] == rights
    order = random.Random(2).sample(range(60), 60)
    workers(3)
    shuffled = rewards.score([texts[i] for i in order], [rows[i] for i in order])
    assert [shuffled[order.index(i)] for i in range(60)] == expected
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(rewards.score(texts, rows))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 3


def ends_in_order(texts: list[str]) -> tuple[list[str], list[int]]:
    """(statuses, the numbers of the texts in the order in which their results came)"""
    ended = []
    futures = rewards.submit(texts, [task([("1", "1")])] * len(texts))
    for i, future in enumerate(futures):
        future.add_done_callback(lambda _, i=i: ended.append(i))
    statuses = [future.result()["status"] for future in futures]
    while len(ended) < len(texts):  # a result is there a moment before it is told
        time.sleep(0.01)
    return statuses, ended


def test_hanging_programs_do_not_hold_up_the_others(monkeypatch, workers):
    """Guards limits that count the queue, and a batch that waits for its slowest sample in every place: what hangs
    ends after all others, also when it comes first."""
    monkeypatch.setattr(rewards, "TEST_SECONDS", 0.1)
    # on a busy machine an honest program may take longer than the usual 0.02 s, and then waits too
    monkeypatch.setattr(pool.KINDS["code"], "first_try", 0.4)
    texts = [fenced("print(input())")] * 40
    hanging = [0, 1, 20, 21]
    for i in hanging:
        texts[i] = fenced("while True: pass" if i % 2 else "import time\ntime.sleep(99)")
    workers(2)
    for left in (1, 0):  # tries
        statuses, ended = ends_in_order(texts)
        assert statuses == ["timeout" if i in hanging else "ok" for i in range(40)]
        if set(ended[-4:]) == set(hanging):
            break
        assert left, ended


def servers() -> list[int]:
    """The processes of sandboxes that this process has started, those that start just now too. Not the programs in
    them: one that is killed from outside was out of memory, as far as we know."""
    found = []
    for pid in attacks.descendants(os.getpid()):
        try:
            stat, command = (
                Path(f"/proc/{pid}/{name}").read_bytes() for name in ("stat", "cmdline")
            )
        except OSError:
            continue
        parent = int(stat.rpartition(b")")[2].split()[1])
        if b"sandbox.py" in command and parent == os.getpid():
            found.append(pid)
    return found


def test_killed_processes_change_no_result(workers):
    """Guards a job that is lost, or scored 0, when its process is killed from outside: one after every fifth result,
    so that each has a fair chance on a slow machine."""
    texts, rows, rights = mixture(100, 3)
    workers(2)
    futures, rng = rewards.submit(texts, rows), random.Random(4)
    kills, ended = 0, 0
    while ended < 100:
        ended = sum(future.done() for future in futures)
        alive = servers()
        if alive and ended >= 5 * kills:
            os.kill(rng.choice(alive), signal.SIGKILL)
            kills += 1
        time.sleep(0.01)
    results = [future.result() for future in futures]
    assert kills >= 10
    assert [r["correct"] for r in results if r["status"] != "infra"] == [
        right for right, r in zip(rights, results) if r["status"] != "infra"
    ]
    assert sum(r["status"] == "infra" for r in results) <= 3


TRAINER = """
import sys
sys.path.insert(0, sys.argv[1])
import rewards
from verify import pool

pool.default_workers = lambda: 2
row = {"task": "code", "answer": {"inputs": ["1", "1"], "outputs": ["1", "1"]}}
futures = rewards.submit(["```python\\n" + sys.argv[2]] * 3, [row] * 3)
if sys.argv[3] == "wait":
    assert [future.result()["status"] for future in futures] == ["ok"] * 3
print("started", flush=True)
input()
"""


@pytest.mark.parametrize(
    "source, ending",
    [("print(1)", "wait"), ("while True: pass", "leave"), ("while True: pass", "kill")],
)
def test_nothing_stays_behind(source, ending):
    """Guards processes that outlive the trainer: at its end, and when it is killed in the middle of a program. A new
    interpreter, since it is the end of one, with all its hooks and threads, that is looked at."""
    command = [sys.executable, "-c", TRAINER, str(ROOT), source, ending]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as trainer:
        try:
            assert trainer.stdout.readline() == b"started\n"
            walls = rewards.start({"code"})["code sandbox"].partition(";")[0]
            processes = 2 if "namespaces" in walls else 1  # of a sandbox, and one for its program
            busy = 2 * (processes + (ending != "wait"))
            assert within(60, lambda: len(attacks.descendants(trainer.pid)) >= busy)
            below = attacks.descendants(trainer.pid)
            if ending == "kill":
                trainer.kill()
            else:
                trainer.stdin.write(b"\n")
                trainer.stdin.flush()
            # the end of the program must not wait for the sandbox
            assert trainer.wait(timeout=60) == (-9 if ending == "kill" else 0)
            assert within(60, lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))
        finally:
            trainer.kill()


def within(seconds: float, happens: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not happens() and time.monotonic() < deadline:
        time.sleep(0.02)
    return happens()


DISTURBING = ("state", "patched", "forged", "flood", "signal", "memory in a", "stop", "close")


def test_honest_programs_among_attacks(fast):
    """Guards programs refused for their style, attacks that score, and attacks that disturb the sample after them: of
    the attacks those that could, and some that are ended in each way. All of them: test_no_attack_works."""
    assert len(honest()) >= 190
    with attacks.Field() as field:
        hostile = [
            (name, fenced(source), task([(field.given, "escaped")]))
            for name, source in attacks.sources().items()
            if name.startswith(DISTURBING)
        ]
        calls = [("[1, 2]", "12345"), ("[1, 2]", "12345")]
        hostile += [
            (name, fenced(source), task(calls, "solve")) for name, source in attacks.CALLS.items()
        ]
        assert len(hostile) >= 50
        cases = [(*case, True) for case in honest()] + [(*case, False) for case in hostile]
        random.Random(0).shuffle(cases)
        rewards.start({"code"})
        idle = len(attacks.descendants(os.getpid()))
        results = rewards.score([case[1] for case in cases], [case[2] for case in cases])
        assert [(c[0], r) for c, r in zip(cases, results) if r["correct"] != c[3]] == []
        assert {r["status"] for r in results} == {
            "ok",
            "wrong",
            "timeout",
            "memory",
            "crash",
            "output",
        }
        assert field.leftovers() == []
        assert len(attacks.descendants(os.getpid())) <= idle + pool.default_workers() * 2


def as_user(user: int | None, off: list[str], tmp_path: Path) -> dict:
    """tests/attacks.py with these layers off, in a new interpreter, since a process cannot change its user and come
    back."""
    folder, pythons = tmp_path, [sys.executable, "/usr/bin/python3"]
    if user is not None:
        if os.geteuid() != 0:
            pytest.skip("only root can become another user")
        folder = Path("/tmp") / f"attacks-{os.getpid()}"  # pytest's folders are private
        pythons = [p for p in pythons if runs(p, user)]
        if not pythons:
            pytest.skip(
                "no Python 3.11 that an ordinary user may run: this one is in a private folder"
            )
    shutil.copytree(ROOT / "tests", folder / "tests", dirs_exist_ok=True)
    shutil.copytree(ROOT / "verify", folder / "verify", dirs_exist_ok=True)
    try:
        command = [pythons[0], str(folder / "tests/attacks.py"), *off]
        identity = {} if user is None else {"user": user, "group": user, "extra_groups": []}
        done = subprocess.run(
            command, cwd="/", capture_output=True, text=True, timeout=300, **identity
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)
    finally:
        if user is not None:
            shutil.rmtree(folder)


def runs(python: str, user: int) -> bool:
    command = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    try:
        return (
            subprocess.run(command, cwd="/", user=user, group=user, extra_groups=[]).returncode == 0
        )
    except OSError:
        return False


def check_attacks(result: dict, off: list[str] = ()) -> None:
    assert {"seccomp", "rlimits"} <= set(result["layers"]) and not set(off) & set(result["layers"])
    assert result["escaped"] == result["slow"] == result["leftovers"] == []
    assert result["tried"] >= 220


def test_no_attack_works():
    """Guards the machine and the user that these tests have, and what CI sees of every wall."""
    check_attacks(attacks.run(seconds=0.1))


@pytest.mark.full
@pytest.mark.parametrize(
    "user, off", [(None, []), (None, ["namespaces"]), (ORDINARY, []), (ORDINARY, ["namespaces"])]
)
def test_no_attack_works_in_any_setting(user, off, tmp_path):
    """Guards each setting: as it is started here, an ordinary user, and both as in a container without namespaces."""
    result = as_user(user, off, tmp_path)
    check_attacks(result, off)
    assert user is None or result["user"] == user


READ = {
    "users",
    "name of the machine",
    "list the root",
    "list processes",
    "command of the trainer",
    "own maps",
}
LAYERS = {  # switched off -> what works then, among others; the other layers still stand
    ("seccomp",): {
        "fork",
        "clone by machine code",
        "signal to the parent",
        "netlink",
        "key ring",
        "dumpable",
    },
    # "open": seccomp refuses to open any file where Landlock is missing
    ("landlock", "open"): READ,
    ("rlimits",): {"above the memory limit"},
    ("seccomp", "landlock"): {"spawn", "exec", "system", "temporary file", "listen"} | READ,
}
HARMLESS = ["loopback", "abstract socket", "signal to the trainer", "read a password"]


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user has other layers to switch off")
@pytest.mark.parametrize("off", LAYERS, ids=" ".join)
def test_each_layer_stops_something(off):
    """Guards a layer that does nothing, and attacks that could not work anywhere."""
    works = LAYERS[off]
    assert attacks.run(names=sorted(works))["escaped"] == []
    result = attacks.run(off, sorted(works))
    if set(off) & {"landlock", "seccomp", "rlimits"} != set(off) - {"open"} or len(
        result["layers"]
    ) < 4 - len(off):
        pytest.skip(f"this kernel has only {result['layers']}")
    assert set(result["escaped"]) == works


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can drop to another uid")
def test_namespaces_and_uid_stand_behind_the_others():
    """Guards the second line: with seccomp and Landlock gone, namespaces keep the network and the trainer's processes
    away; without them, the uid still keeps programs from signals to the trainer."""
    off = ("seccomp", "landlock")
    network, everything = (
        {"loopback", "abstract socket"},
        {"loopback", "abstract socket", "read a password"},
    )
    if "namespaces" not in attacks.run(off, ["fork"])["layers"]:
        pytest.skip("this kernel or container gives no namespaces")
    assert set(attacks.run(off, HARMLESS)["escaped"]) & network == set()
    without = set(attacks.run((*off, "namespaces"), HARMLESS)["escaped"])
    assert network <= without <= everything
    assert (
        "signal to the trainer"
        in attacks.run((*off, "namespaces", "uid"), ["signal to the trainer"])["escaped"]
    )
