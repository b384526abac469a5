"""Which prompts, in which order, as which token ids; and which sequences share a micro-batch.

Owns: loading or generating rows, leaving out those that cannot teach, prompt wording, the order of
rows and tasks, token-budget planning. Every function gives the same answer on every rank, so no
rank ever has to ask another one.
Refuses to know: models, torch, rewards (which answers can be judged, it asks the program
rewards.py).
Left out on purpose: a DataLoader (batch `step` is a function of rows, step, size, seed; resuming is
passing the step) and preprocessing (`load` reads the published files, and keeps what it worked out
in the cache of datasets).

A row is the only contract with rewards.py: {"task": str, "prompt": str | list[dict], "answer": ...,
"id": str}. "prompt" is text for a base model, or chat messages, to which the tokenizer's template
is applied at run time.

A new task whose rows are made by rule is a loader in TASKS. A new task whose rows are read from
files is a function in ANSWERS, and a sentence in INSTRUCTIONS. Either way its reward is an entry of
REWARDS in rewards.py.
"""

import glob
import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache, partial
from importlib.metadata import version
from operator import add, mul, sub, truediv
from pathlib import Path
from typing import Literal, NamedTuple

HERE = Path(__file__).resolve().parent
Each = tuple[str, ...]  # one for all sources, or one for each


@dataclass
class Source:
    """which prompts, and how they are worded"""

    # NAME[:WEIGHT],...: countdown, countdown3, math, code, rg:NAME (of reasoning-gym)
    task: str = "countdown"
    # file, folder or hub id: one for all tasks, or one for each that reads files; so the next five
    data: Each = ()
    prompt_column: Each = ()  # with the question; without it, or as "", the usual names
    answer_column: Each = ()  # with the answer, or a solution that ends with it
    train_split: Each = ()  # the split to train on, by default train
    test_split: Each = ()  # the split to evaluate on, or a file with its rows
    data_config: Each = ()  # of a dataset of the hub that has several
    template: Literal["base", "chat"] = "base"  # text for base models, messages for instruct models
    system_prompt: str = "drop"  # of a dataset: drop, keep, or the text to use instead
    # with the template; longer ones in files are left out, longer ones made by rule are an error
    max_prompt_tokens: int = 1000


class Data(NamedTuple):
    """What `load` found; a task is named as in --task."""

    train: dict[str, Sequence[dict]]
    test: dict[str, list[dict]]  # held-out rows
    weights: dict[str, Fraction]  # of each task in a batch
    report: str  # what was kept and what was left out, by source and reason


# ----------------------------------------------------------------------------------- prompt wording

BASE_COUNTDOWN = (
    "Use the numbers {numbers} exactly once each with + - * / and parentheses to make {target}. "
    "Think inside <think> </think>, then write the expression inside <answer> </answer>.\n<think>"
)
CHAT_COUNTDOWN = (
    "Make {target} out of the numbers {numbers}. Use each of them exactly once, "
    "with + - * / and parentheses. Think first, inside <think> </think>. "
    "Then write nothing but the expression inside <answer> </answer>, "
    "for example <answer>(1+2)/3</answer>."
)
BASE_ENDING = "\n\nThink inside <think> </think>, then answer.\n<think>"
# task -> (what its reward looks for, what is said where the question does not mention that)
INSTRUCTIONS = {
    "math": ("\\boxed", "\n\nPut the final answer inside \\boxed{}."),
    "code": (
        "```",
        "\n\nWrite the whole program in Python, in one block between ```python and ```.",
    ),
    "rg": ("<answer>", "\n\nWrite nothing but the final answer inside <answer> </answer>."),
}


def ask_countdown(numbers: list[int], target: int, template: str) -> str | list[dict]:
    listed = ", ".join(map(str, numbers))
    if template == "chat":
        text = CHAT_COUNTDOWN.format(numbers=listed, target=target)
        return [{"role": "user", "content": text}]
    return BASE_COUNTDOWN.format(numbers=listed, target=target)


def instruction(task: str) -> tuple[str, str]:
    """The entry of a task in INSTRUCTIONS; ValueError: there is none."""
    name = task.partition(":")[0]
    if name not in INSTRUCTIONS:
        raise ValueError(
            f"task {name!r} has rows, and INSTRUCTIONS in data.py has only {[*INSTRUCTIONS]}: add "
            f"{name!r}: (mark, sentence), what its reward looks for in a response and the sentence "
            'that asks for it, or ("", "") when nothing is to be added to the questions'
        )
    return INSTRUCTIONS[name]


def ask(messages: list[dict], task: str, template: str) -> str | list[dict]:
    """Messages with the instruction that the reward of the task needs; for a base model one plain
    text that it can go on with."""
    mark, sentence = instruction(task)
    *before, last = messages
    if mark not in last["content"]:
        last = last | {"content": last["content"] + sentence}
    messages = [*before, last]
    if template == "chat":
        return messages
    return "\n\n".join(message["content"] for message in messages) + BASE_ENDING


def encode(prompts: list[str | list[dict]], tokenizer) -> list[list[int]]:
    """Token ids of the prompts, as engine and trainer get them; the chat template is applied here,
    never in files. ValueError: the template refuses a prompt."""
    if not prompts:
        return []
    begin = ""
    if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        begin = tokenizer.bos_token
    # Llama's template would say today's date, and tomorrow's rows would differ
    options = {"add_generation_prompt": True, "tokenize": False, "date_string": "26 Jul 2024"}
    texts = []
    for prompt in prompts:
        if isinstance(prompt, str):
            texts.append(begin + prompt)
            continue
        try:
            texts.append(tokenizer.apply_chat_template(prompt, **options))
        except Exception as error:  # jinja's, and those that templates raise
            raise ValueError(
                f"{tokenizer.name_or_path!r}: its chat template refuses a prompt: {error}: "
                "try --system_prompt drop, or --template base"
            ) from error
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


# --------------------------------------------------------------------- worked out once on a machine


def cache_folder() -> Path:
    """Where `datasets` keeps its files; to import it takes 0.7 s, which generated rows can save."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("HF_DATASETS_CACHE", Path(HF_HOME, "datasets")))


def remembered(what: str, make: Callable, *key: str):
    """make(), something that JSON can hold, from a file that is named by a hash of the key. Of
    several ranks that start at once the first makes it, and the others wait and read."""
    from filelock import FileLock

    name = hashlib.sha256("\n".join(key).encode()).hexdigest()[:32]
    file = cache_folder() / f"ppo-{what}-{name}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError:  # nothing can be kept here
        return make()
    with FileLock(f"{file}.lock"):
        try:
            return json.loads(file.read_text())
        except (OSError, ValueError):  # the first time, or the machine stopped while it was written
            made = make()
        new = file.with_suffix(".new")
        new.write_text(json.dumps(made))
        new.replace(file)
    return made


def this_code() -> str:
    """A part of most keys: whatever is edited in this file, nothing old is taken for new."""
    return Path(__file__).read_text()


def identity(tokenizer) -> str:
    """All that token ids depend on."""
    settings = f"{tokenizer.chat_template} {tokenizer.special_tokens_map}"
    return f"{tokenizer.backend_tokenizer.to_str()}\n{settings}"


# -------------------------------------------------------------------------------- rows made by rule


def random_value(rng: random.Random, numbers: list[int]) -> Fraction:
    """The value of a random expression that uses each number once."""
    values = [Fraction(n) for n in numbers]
    while len(values) > 1:  # combine two of them until one value is left
        a = values.pop(rng.randrange(len(values)))
        b = values.pop(rng.randrange(len(values)))
        operations = [add, sub, mul]
        if b:
            operations.append(truediv)
        values.append(rng.choice(operations)(a, b))
    return values[0]


def countdown_problems(split: str, seed: int, sizes, max_number: int, count: int) -> list:
    """[[numbers, target], ...], distinct, with a whole target in 1..100. 20,000 take 2 to 3 s."""
    rng = random.Random(f"countdown {split} {seed}")
    problems, seen = [], set()
    while len(problems) < count:
        numbers = [rng.randint(1, max_number) for _ in range(rng.choice(sizes))]
        digest = hashlib.sha256(repr(sorted(numbers)).encode()).digest()
        held_out = digest[0] % 10 == 0  # whatever the seed
        if held_out != (split == "test"):
            continue
        target = random_value(rng, numbers)
        if target.denominator != 1 or not 1 <= target <= 100:
            continue
        problem = (*sorted(numbers), -target)
        if problem not in seen:
            seen.add(problem)
            problems.append([numbers, int(target)])
    return problems


def countdown(
    split: str, seed: int, template: str, sizes=(3, 4), max_number=99, train=20_000
) -> list[dict]:
    """`train` distinct problems, or 1,024 for the test split, with numbers in 1..max_number and a
    whole target in 1..100. Solvable by construction: the target is the value of a random
    expression over the numbers."""
    count = 1_024
    if split == "train":
        count = train
    rule = (split, seed, sizes, max_number, count)
    make = partial(countdown_problems, *rule)
    rows = []
    for numbers, target in remembered("countdown", make, repr(rule), this_code()):
        prompt = ask_countdown(numbers, target, template)
        answer = {"numbers": numbers, "target": target}
        name = f"countdown-{split}-{len(rows)}"
        rows.append({"task": "countdown", "prompt": prompt, "answer": answer, "id": name})
    return rows


def in_words(task: str, name: str, answers: dict, template: str) -> list[dict]:
    """Rows out of {question: answer}, asked as the reward of the task needs it."""
    rows = []
    for question, answer in answers.items():
        prompt = ask([{"role": "user", "content": question}], task, template)
        rows.append({"task": task, "prompt": prompt, "answer": answer, "id": f"{name}-{len(rows)}"})
    return rows


# in its own process: some tasks use the global random state
GYM = """import base64, json, pickle, random, sys, numpy
random.seed(0), numpy.random.seed(0)
import reasoning_gym
problems = reasoning_gym.create_dataset(sys.argv[1], seed=int(sys.argv[2]), size=int(sys.argv[3]))
found = {p["question"]: base64.b64encode(pickle.dumps(p)).decode() for p in problems}
print("\\n" + json.dumps(found))"""


def gym_problems(name: str, seed: int, size: int) -> dict[str, str]:
    """{question: problem}, equal on all ranks, whatever the order of sets."""
    done = subprocess.run(
        [sys.executable, "-c", GYM, name, str(seed), str(size)],
        env=os.environ | {"PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        advice = "pip install reasoning-gym and use one of its tasks"
        raise ValueError(f"task=rg:{name}: {done.stderr[-300:]}{advice}")
    return json.loads(done.stdout.splitlines()[-1])


def gym(name: str, split: str, seed: int, template: str) -> list[dict]:
    """Rows of a reasoning-gym task; the answer is the problem, for its own scorer. Test rows do not
    know the seed."""
    problems = test = gym_problems(name, 0, 256)
    if split == "train":
        made = gym_problems(name, seed + 1, 2_000)
        problems = {question: made[question] for question in made if question not in test}
    answers = {question: {"name": name, "entry": problems[question]} for question in problems}
    return in_words(f"rg:{name}", f"{name}-{split}", answers, template)


# task -> loader(split, seed, template) of rows that need no file; split is "train" or "test"
TASKS = {
    "countdown": countdown,  # 3 or 4 numbers up to 99, as in TinyZero
    # for models of 1M parameters
    "countdown3": partial(countdown, sizes=(3,), max_number=20, train=10_000),
}

# ---------------------------------------------------------------- answers, as the rewards need them


class BadRow(ValueError):
    """Why a row is left out, in words that many rows share."""


def need(ok, reason: str) -> None:
    if not ok:
        raise BadRow(reason)


def parse_json(text: str, reason: str):
    """What a text holds as strict JSON; BadRow: it is none."""

    def refuse(constant: str):  # NaN, Infinity
        raise BadRow(reason)

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise BadRow(reason) from None


BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}")


def math_answer(given) -> str:
    """LaTeX from an answer, or from a solution that ends with it: "#### 72" (GSM8K) or \\boxed{72}
    (MATH)."""
    need(given not in (None, ""), "no answer")
    mistyped = "answer of the wrong type"
    need(isinstance(given, str | int | float) and not isinstance(given, bool), mistyped)
    if isinstance(given, float):
        need(math.isfinite(given), mistyped)
    text = str(given).rpartition("####")[2]
    if "\\boxed{" in text:
        boxes = BOXED.findall(text)
        need(boxes, "no answer")
        text = boxes[-1]
    need(text.strip(), "no answer")
    return text.strip()


def code_answer(given) -> dict:
    """{"inputs", "outputs", "fn_name"} from the same, perhaps as JSON text; the tests are what
    rewards.code can run."""
    tests = given
    if isinstance(given, str):
        tests = parse_json(given, "tests are no JSON")
    mistyped = "tests of the wrong type"
    need(given, "no tests")
    need(isinstance(tests, dict), mistyped)
    inputs = tests.get("inputs")
    outputs = tests.get("outputs")
    name = tests.get("fn_name") or None
    need(inputs and outputs, "no tests")
    need(isinstance(inputs, list) and isinstance(outputs, list), mistyped)
    need(isinstance(name, str | None), mistyped)
    need(len(inputs) == len(outputs), "unequal numbers of inputs and outputs")
    if name is None:
        check_streams(inputs + outputs, mistyped)
    else:
        check_calls(inputs, outputs, mistyped)
    return {"inputs": inputs, "outputs": outputs, "fn_name": name}


def check_streams(streams: list, mistyped: str) -> None:
    """Text on stdin and stdout, or a list of its lines."""
    for stream in streams:
        lines = stream if isinstance(stream, list) else [stream]
        need(all(isinstance(line, str) for line in lines), mistyped)


def check_calls(inputs: list, outputs: list, mistyped: str) -> None:
    """Arguments as JSON, one a line, or in a list; a result as JSON."""
    need(all(isinstance(arguments, str | list) for arguments in inputs), mistyped)
    for arguments in inputs:
        if isinstance(arguments, str):
            for line in arguments.split("\n"):
                if line.strip():
                    parse_json(line, "tests are no JSON")
    for result in outputs:
        if isinstance(result, str):
            parse_json(result, "tests are no JSON")


def countdown_answer(given) -> dict:
    """{"numbers": [int, ...], "target": int} from the same."""
    absent = "no numbers or no target"
    need(isinstance(given, dict), absent)
    numbers = given.get("numbers")
    target = given.get("target")
    need(numbers is not None and target is not None, absent)
    mistyped = "numbers or target of the wrong type"
    need(isinstance(numbers, list) and numbers, mistyped)
    need(all(type(n) is int for n in [*numbers, target]), mistyped)
    return {"numbers": numbers, "target": target}


# task -> answer of a row from what a file gives, or BadRow: the tasks that are read from files
ANSWERS = {"math": math_answer, "code": code_answer, "countdown": countdown_answer}
# task -> hub id that is read without --data; the others need one, or are made by rule (TASKS)
DEFAULTS = {"math": "PRIME-RL/Eurus-2-RL-Data", "code": "PRIME-RL/Eurus-2-RL-Data"}

# -------------------------------------------------------------------- one reader a published schema

PROMPT_COLUMNS = ("prompt", "question", "problem", "instruction")  # the first that there is
ANSWER_COLUMNS = ("answer", "solution", "final_answer", "ground_truth", "expected_answer")


@dataclass
class Found:
    """What a row of a file says, whatever its schema."""

    task: str | None  # None: it does not say
    prompt: object  # text or messages, as they are there
    answer: object  # as it is there, for the function in ANSWERS


def first(raw: dict, columns: Sequence[str]):
    for name in columns:
        if raw.get(name) is not None:
            return raw[name]
    return None


def named_task(raw: dict) -> str | None:
    for name in ("task", "ability"):
        if name in raw:
            return str(raw[name]).lower()
    return None


def ground_truth(raw: dict):
    rule = raw.get("reward_model")
    return rule.get("ground_truth") if isinstance(rule, dict) else None


def read_tinyzero(raw: dict) -> Found | None:
    """Countdown-Tasks-3to4, {"target": 98, "nums": [44, 19, 35]}, and the files that TinyZero makes
    of it: those have the two as ground truth, and say "ability": "math". The wording is ours."""
    truth = ground_truth(raw)
    if isinstance(truth, dict) and "target" in truth:
        raw = raw | truth
    elif named_task(raw) not in (None, "countdown"):
        return None
    if "target" not in raw or not ("numbers" in raw or "nums" in raw):
        return None
    numbers = raw.get("numbers", raw.get("nums"))
    return Found("countdown", None, {"numbers": numbers, "target": raw["target"]})


def read_eurus(raw: dict) -> Found | None:
    """Eurus-2-RL-Data of PRIME, and whatever has veRL's schema: messages, "ability" and
    {"reward_model": {"ground_truth": answer, or tests as JSON}}."""
    truth = ground_truth(raw)
    if truth is None:
        return None
    return Found(named_task(raw), first(raw, PROMPT_COLUMNS), truth)


def read_programs(raw: dict) -> Found | None:
    """A question with its tests in columns: "inputs", "outputs", "fn_name"."""
    if "inputs" not in raw:
        return None
    return Found(named_task(raw), first(raw, PROMPT_COLUMNS), raw)


def read_plain(raw: dict) -> Found:
    """A question and an answer, by the usual names of columns: GSM8K ("question", "answer"), MATH
    ("problem", "solution"), and files of your own."""
    return Found(named_task(raw), first(raw, PROMPT_COLUMNS), first(raw, ANSWER_COLUMNS))


# the first that sees a row of a wanted task
SCHEMAS = (read_tinyzero, read_eurus, read_programs, read_plain)


def parse_line(raw: dict) -> dict:
    """A row of a file; that of a JSONL file comes as {"text": line}."""
    if list(raw) != ["text"]:
        return raw
    need(isinstance(raw["text"], str), "no JSON object")
    text = raw["text"].removeprefix("\ufeff")
    need(text.strip(), "empty line")
    need("\ufffd" not in text, "not UTF-8")  # what came into the place of such bytes
    parsed = parse_json(text, "no JSON")
    need(isinstance(parsed, dict), "no JSON object")
    return parsed


def conversation(prompt) -> list[dict]:
    """Messages, the last of them a question, from messages or a text."""
    need(prompt is not None, "no prompt")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    mistyped = "prompt neither text nor messages"
    need(isinstance(prompt, list), mistyped)
    for message in prompt:
        need(isinstance(message, dict), mistyped)
        need(isinstance(message.get("role"), str), mistyped)
        need(isinstance(message.get("content"), str), mistyped)
    asks = prompt and prompt[-1]["role"] == "user" and prompt[-1]["content"].strip()
    need(asks, "no question in the prompt")
    return prompt


def read(
    raw: dict, number: int, split: str, wanted: list[str], columns: dict[str, str], source: Source
) -> dict:
    """A row of ours from row `number` of a file, in any of the published schemas; BadRow when there
    is none in it. `columns`: {"prompt": name, "answer": name} of those that a flag names."""
    raw = parse_line(raw)
    for name, column in columns.items():
        need(column in raw, f"no column {column!r}")
        raw = raw | {name: raw[column]}
    schemas = SCHEMAS
    if "answer" in columns:  # a column that is named is read, whatever else there is
        schemas = (read_plain,)
    for schema in schemas:
        found = schema(raw)
        if found is not None and found.task in (None, *wanted):
            break
    task = found.task
    if task is None:
        task = wanted[0]
    if task not in wanted:
        raise BadRow(f"task {task} not asked for" if task.isidentifier() else "task not asked for")
    row = {
        "task": task,
        "source": str(raw.get("data_source") or task),
        "id": f"{task}-{split}-{number}",
    }
    if task == "countdown":
        answer = countdown_answer(found.answer)
        prompt = ask_countdown(answer["numbers"], answer["target"], source.template)
        return row | {"prompt": prompt, "answer": answer, "asked": str(answer)}
    messages = conversation(found.prompt)
    answer = ANSWERS[task](found.answer)
    spoken = [message for message in messages if message["role"] != "system"]
    asked = "\n".join(message["content"] for message in spoken)
    if source.system_prompt != "keep":
        messages = spoken
    if source.system_prompt not in ("keep", "drop"):
        messages = [{"role": "system", "content": source.system_prompt}, *messages]
    # UnicodeError: half of a surrogate pair, from a JSON escape
    json.dumps([messages, answer], ensure_ascii=False).encode()
    prompt = ask(messages, task, source.template)
    return row | {"prompt": prompt, "answer": answer, "asked": asked}


# --------------------------------------------------------------------------------- files and splits

TINYZERO = 327_680, 1_024  # rows of Countdown-Tasks-3to4 for training, and the next for testing
# name of a file -> builder of datasets; lines are parsed here, with names
FILES = {".parquet": "parquet", ".jsonl": "text"}
HELD_OUT = ("validation", "test", "val", "dev")  # the split to evaluate on, the first that there is


@dataclass(frozen=True)
class Place:
    """A source, and what the flags say of it; "": nothing."""

    path: str
    prompt_column: str
    answer_column: str
    train_split: str
    test_split: str
    config: str


def one_each(flag: str, source: Source, readers: list[str]) -> list[str]:
    """What a flag says of the source of each task in `readers`: nothing, the same of all, or of
    each its own."""
    given = getattr(source, flag)
    if len(given) not in (0, 1, len(readers)) or (given and not readers):
        raise ValueError(
            f"{flag}={list(given)} for task={source.task}: give one, or one for each of the "
            f"{len(readers)} tasks that read files (--data): {', '.join(readers)}"
        )
    if len(given) == len(readers):
        return list(given)
    return list(given or [""]) * len(readers)


def places(names: list[str], source: Source) -> dict[Place, list[str]]:
    """{place: tasks whose rows are read there}; tasks that are made by rule are in none."""
    readers = [name for name in names if name in ANSWERS]
    if not source.data:
        readers = [name for name in readers if name not in TASKS]
    flags = ("data", "prompt_column", "answer_column", "train_split", "test_split", "data_config")
    found = {}
    for name, path, *said in zip(readers, *(one_each(flag, source, readers) for flag in flags)):
        path = path or DEFAULTS.get(name)
        if not path:
            raise ValueError(
                f"task={source.task!r}: rows of {name} are in a file: say which, --data"
            )
        found.setdefault(Place(path, *said), []).append(name)
    return found


class Rows(Sequence):
    """Rows of one file or several, read when asked for: tests of programs come to gigabytes and
    stay on disk."""

    def __init__(self, table, prepared, reader, chosen: list[int]):
        self.table = table
        self.prepared = prepared
        self.reader = reader
        self.chosen = chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i):
        index = self.chosen[i]
        ids = self.prepared[index]["ids"]
        return self.reader(self.table[index], index + 1) | {"ids": ids}


@dataclass
class Split:
    """One split of one source."""

    path: str
    name: str  # train or test
    table: Sequence
    prepared: Sequence
    reader: partial
    tasks: list[str]  # of each row
    asked: list[int]  # a hash of the question
    dropped: list[str]  # why a row is left out, or ""

    def rows(self, task: str) -> Rows:
        chosen = []
        for i, why in enumerate(self.dropped):
            if not why and self.tasks[i] == task:
                chosen.append(i)
        return Rows(self.table, self.prepared, self.reader, chosen)

    def report(self) -> str:
        """Rows, kept and dropped, of every data_source; and how many for which reason, with the
        first of them."""
        counts, first_row = {}, {}
        for i, (where, why) in enumerate(zip(self.prepared["source"], self.dropped)):
            counts.setdefault(where, Counter())[why] += 1
            first_row.setdefault((where, why), i + 1)
        lines = [f"{self.path}, {self.name}:".ljust(28) + "      rows      kept   dropped"]
        for where, count in sorted(counts.items()):
            total = count.total()
            kept = count.pop("", 0)
            lines.append(f"  {where:26s}{total:10,d}{kept:10,d}{total - kept:10,d}")
            for why, n in count.most_common():
                lines.append(f"    {n:,} {why} (first: row {first_row[where, why]:,})")
        if len(lines) > 200:  # data_source may differ in every row
            lines = [*lines[:200], "  ..."]
        return "\n".join(lines)


@dataclass
class Opened:
    """One source, with the tasks whose rows are read there."""

    tasks: list[str]
    train: Split
    test: Split


def files_of(place: Place) -> dict[str, list[Path]]:
    """{split: files}, where the source is a file or a folder, or its test split is a file."""
    where = Path(place.path).expanduser()
    files = {}
    if where.suffix in FILES:
        files["train"] = [where]
    if where.is_dir():
        present = [p for p in sorted(where.rglob("[!.]*")) if p.suffix in FILES and p.is_file()]
        names = dict.fromkeys(["train", *HELD_OUT, place.train_split, place.test_split])
        for name in names:
            if name:
                files[name] = [p for p in present if p.name.startswith(name)]
    if Path(place.test_split).suffix in FILES:
        files[place.test_split] = [Path(place.test_split).expanduser()]
    return files


def open_tables(place: Place, progress: bool) -> dict:
    """{"train": table, perhaps "test": table} of a file, a folder of files or a hub id, with the
    rows on disk."""
    import datasets

    if progress:
        datasets.enable_progress_bars()
    else:
        datasets.disable_progress_bars()
    where = Path(place.path).expanduser()
    tables = {}
    try:
        files = files_of(place)
        for split, found in files.items():
            for where in found:
                kind = FILES.get(where.suffix, "text")
                more = {"encoding_errors": "replace"} if kind == "text" else {}
                part = datasets.load_dataset(
                    kind, data_files=glob.escape(str(where)), split="train", **more
                )
                if split in tables:
                    part = datasets.concatenate_datasets([tables[split], part])
                tables[split] = part
        if "train" not in files:
            config = place.config or None
            if not config and place.path == "openai/gsm8k":
                config = "main"
            tables |= dict(datasets.load_dataset(place.path, config))
    except Exception as error:  # the libraries below raise a dozen kinds
        raise ValueError(
            f"data={place.path!r}: no file here, no hub id in reach, or {where} is damaged: {error}"
        ) from error
    return choose_splits(place, tables)


def choose_splits(place: Place, tables: dict) -> dict:
    train = place.train_split or "train"
    test = place.test_split
    if not test:
        others = [name for name in HELD_OUT if name in tables and name != train]
        test = others[0] if others else ""
    for name in (train, test):
        if name and name not in tables:
            raise ValueError(
                f"data={place.path!r} has {sorted(tables)}, no {name!r}: say which, "
                "--train_split NAME --test_split NAME"
            )
    chosen = {"train": tables[train]}
    if test:
        chosen["test"] = tables[test]
    return chosen


# --------------------------------------------------------------------- which rows of files are kept


def prepare(table, indices: list[int], reader, tokenizer, limit: int) -> dict[str, list]:
    """Of a batch of rows: what they are and their ids, or why they are left out."""
    out, prompts = [], []
    for i, index in enumerate(indices):
        raw, row, why = {}, {}, ""
        try:
            raw = {name: table[name][i].as_py() for name in table.column_names}
            row = reader(raw, index + 1)
        except BadRow as error:
            why = str(error)
        except UnicodeError:
            why = "not UTF-8"
        where = str(raw.get("data_source") or row.get("source", ""))
        task = row.get("task", "")
        question = " ".join(row.get("asked", "").split())  # spaces aside
        digest = hashlib.sha256(question.encode()).digest()[:8]
        out.append(
            {
                "source": " ".join(where.split())[:26],
                "task": task,
                "dropped": why,
                "asked": int.from_bytes(digest, signed=True),
                "math": row["answer"] if task == "math" else "",
            }
        )
        prompts.append(row.get("prompt", ""))
    for row, ids in zip(out, encode(prompts, tokenizer)):
        if not row["dropped"] and len(ids) > limit:
            row["dropped"] = f"prompt over {limit} tokens"
        row["ids"] = [] if row["dropped"] else ids
    return {name: [row[name] for row in out] for name in out[0]}


def prepare_table(table, reader, tokenizer, limit: int, key: str, progress: bool):
    """What `prepare` makes of every row of a table; made once on a machine."""
    import datasets
    from filelock import FileLock

    made_of = "\n".join([table._fingerprint, key, identity(tokenizer), this_code()])
    name = hashlib.sha256(made_of.encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE, f"ppo-{name}")
    folder.mkdir(parents=True, exist_ok=True)
    processes = None
    if len(table) > 5000:
        processes = min(32, len(os.sched_getaffinity(0)))
    with FileLock(folder / "lock"):
        prepared = table.with_format("arrow").map(
            partial(prepare, reader=reader, tokenizer=tokenizer, limit=limit),
            with_indices=True,
            batched=True,
            batch_size=256,
            remove_columns=table.column_names,
            new_fingerprint=name,
            desc="filtering",
            cache_file_name=str(folder / "rows.arrow"),
            num_proc=processes,
        )
    return prepared.with_format(None)


VERIFIER_FILES = (HERE / "verify" / "equality.py",)
LIMIT_FILES = (HERE / "rewards.py", HERE / "verify" / "pool.py", HERE / "verify" / "sandbox.py")
LIMITS = re.compile(r"^(?:MATH_SECONDS|MEMORY) = .*", re.MULTILINE)  # what a comparison may take


def verifier() -> str:
    """All that decides which answers can be read: the verifier, its limits and its library. Nothing
    else in those files does, and 400,000 answers take minutes."""
    parts = [file.read_text() for file in VERIFIER_FILES]
    for file in LIMIT_FILES:
        if file.exists():
            parts += LIMITS.findall(file.read_text())
    return "\n".join([*parts, version("math-verify"), version("sympy")])


def ask_verifier(answers: list[str], progress: bool) -> list[str]:
    """Those of the answers that the program rewards.py cannot read; it may use all cores."""
    program = [sys.executable, HERE / "rewards.py", "readable"]
    if progress:
        program.append("--progress")
    said = subprocess.run(
        program,
        stdout=subprocess.PIPE,
        check=True,
        env=os.environ | {"LOCAL_WORLD_SIZE": "1"},
        input=json.dumps(answers).encode(),
    ).stdout
    return [answer for answer, ok in zip(answers, json.loads(said)) if not ok]


def unreadable(prepared, progress: bool) -> set[str]:
    """Math answers of the rows that the verifier cannot read; asked once on a machine."""
    answers = {a for a, why in zip(prepared["math"], prepared["dropped"]) if a and not why}
    answers = sorted(a for a in answers if not re.fullmatch(r"-?\d{1,30}", a))
    if not answers:
        return set()
    ask_all = partial(ask_verifier, answers, progress)
    return set(remembered("unreadable", ask_all, json.dumps(answers), verifier()))


def open_source(place: Place, wanted: list[str], source: Source, tokenizer, progress) -> Opened:
    """The splits of a place, prepared."""
    columns = {}
    if place.prompt_column:
        columns["prompt"] = place.prompt_column
    if place.answer_column:
        columns["answer"] = place.answer_column
    limit = source.max_prompt_tokens
    splits = {}
    for name, table in open_tables(place, progress).items():
        reader = partial(read, split=name, wanted=wanted, columns=columns, source=source)
        key = f"{wanted} {columns} {source.template} {source.system_prompt} {limit} {name}"
        prepared = prepare_table(table, reader, tokenizer, limit, key, progress)
        bad = unreadable(prepared, progress)
        dropped = prepared["dropped"][:]
        for i, answer in enumerate(prepared["math"]):
            if not dropped[i] and answer in bad:
                dropped[i] = "answer that cannot be read by the verifier"
        tasks = prepared["task"][:]
        asked = prepared["asked"][:]
        splits[name] = Split(place.path, name, table, prepared, reader, tasks, asked, dropped)
    if "test" not in splits:
        splits["test"] = hold_out(splits["train"])
    return Opened(wanted, splits["train"], splits["test"])


def hold_out(train: Split) -> Split:
    """A test split for a source without one, always the same: TinyZero's, or the questions of one
    hash in fifty. These rows are dropped from `train`."""
    count = len(train.asked)
    held_out = set()
    spare = range(0)  # rows that TinyZero uses for nothing
    if count >= sum(TINYZERO) and "countdown" in train.tasks:
        held_out.update(range(TINYZERO[0], sum(TINYZERO)))
        spare = range(sum(TINYZERO), count)
    if not spare:
        for task in set(train.tasks):
            rows = [i for i in range(count) if train.tasks[i] == task]
            asked = {train.asked[i] for i in rows if not train.dropped[i]}
            chosen = {question for question in asked if question % 50 == 0}
            if not chosen:
                chosen = {min(asked, default=0)}
            held_out.update(i for i in rows if train.asked[i] in chosen)
    test_dropped = train.dropped[:]
    for i in range(count):
        if train.dropped[i]:
            continue
        if i in held_out:
            train.dropped[i] = "held out"
            continue
        test_dropped[i] = "for training"
        if i in spare:
            train.dropped[i] = "spare"
    return replace(train, name="test", dropped=test_dropped)


def open_sources(names: list[str], source: Source, tokenizer, progress: bool) -> list[Opened]:
    """The sources in files; no training row asks what any test row asks."""
    found = places(names, source)
    if found and not tokenizer:
        raise ValueError(
            f"task={source.task!r}: rows of files are counted in tokens: say whose, --model DIR"
        )
    for tasks in found.values():
        for task in tasks:
            if task != "countdown":
                instruction(task)  # to say before anything is read that it lacks one
    if tokenizer:
        check_template(source.template, tokenizer)
    opened = []
    for place, tasks in found.items():
        opened.append(open_source(place, tasks, source, tokenizer, progress))
    seen = set()
    for one in opened:
        seen.update(asked for asked, why in zip(one.test.asked, one.test.dropped) if not why)
    for one in opened:
        for i, asked in enumerate(one.train.asked):
            if not one.train.dropped[i] and asked in seen:
                one.train.dropped[i] = "also in the test split"
    for one in opened:
        for task in one.tasks:
            for split in (one.train, one.test):
                if not split.rows(task):
                    raise no_rows(task, split)
    return opened


def check_template(template: str, tokenizer) -> None:
    has = "no" if tokenizer.chat_template is None else "a"
    if (template, has) not in [("base", "a"), ("base", "no"), ("chat", "a")]:
        raise ValueError(
            f"template={template!r}, and {tokenizer.name_or_path!r} has {has} chat template: "
            "use base or chat"
        )


def no_rows(task: str, split: Split) -> ValueError:
    what = f"data={split.path!r} has no row for task={task}, {split.name}"
    what = f"{what}; its first row is {split.table[:1]}"
    fix = "columns can be named: --prompt_column COLUMN --answer_column COLUMN"
    return ValueError(f"{what:.500}; {fix}\n{split.report()}")


# --------------------------------------------------------------------------------- what a run loads


def mixture(text: str) -> dict[str, Fraction | None]:
    """{task: weight} of "math:0.8,code:0.2", or of "math,code"."""
    weights = {}
    for part in text.split(","):
        name, colon, weight = part.rpartition(":")
        if not colon or name == "rg":
            name, weight = part, None
        known = name in TASKS or name in ANSWERS or re.fullmatch("rg:.+", name)
        if not known or name in weights:
            raise ValueError(
                f"task={text!r}: {name!r} is not known, or stands there twice: use each once: "
                f"{', '.join(TASKS | ANSWERS)}, rg:NAME; a new one goes into TASKS in data.py "
                "(rows made by rule) or into ANSWERS (rows of files)"
            )
        if weight is None:
            weights[name] = None
        elif re.fullmatch(r"\d+(?:\.\d*)?|\.\d+|\d+/0*[1-9]\d*", weight):
            weights[name] = Fraction(weight)
        else:
            weights[name] = Fraction(0)
    given = [weight for weight in weights.values() if weight is not None]
    if 0 in given or 0 < len(given) < len(weights):
        raise ValueError(
            f"task={text!r}: give every task a weight above 0, as in math:0.8,code:0.2, or none"
        )
    return weights


def rows_by_rule(task: str, source: Source, tokenizer, seed: int, eval_rows: int):
    """(training rows, test rows) of a task that needs no file."""
    if task.startswith("rg:"):
        make = partial(gym, task.removeprefix("rg:"))
    else:
        make = TASKS[task]
    train = make("train", seed, source.template)
    test = make("test", seed, source.template)[:eval_rows]
    rows = train + test
    if not tokenizer:
        return train, test
    for row, ids in zip(rows, encode_once([row["prompt"] for row in rows], tokenizer)):
        if not 0 < len(ids) <= source.max_prompt_tokens:
            raise ValueError(
                f"row {row['id']}: its prompt has {len(ids)} tokens, allowed are 1 to "
                f"max_prompt_tokens={source.max_prompt_tokens}: raise --max_prompt_tokens"
            )
        row["ids"] = ids
    return train, test


def encode_once(prompts: list[str | list[dict]], tokenizer) -> list[list[int]]:
    """encode(), which takes seconds for 20,000 prompts, made once on a machine."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:  # its identity cannot be told
        return encode(prompts, tokenizer)
    key = (json.dumps(prompts), identity(tokenizer), this_code())
    return remembered("ids", partial(encode, prompts, tokenizer), *key)


def load(
    source: Source, tokenizer, seed: int = 0, eval_rows: int = 256, progress: bool = False
) -> Data:
    """All rows of a run, each with its "ids" if there is a tokenizer. ValueError: flags and files
    do not fit."""
    # processes are enough; forks of threads are trouble
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    weights = mixture(source.task)
    opened = open_sources(list(weights), source, tokenizer, progress)
    reports = []
    in_files = {}
    for one in opened:
        reports += [one.train.report(), one.test.report()]
        in_files |= dict.fromkeys(one.tasks, one)
    train, test = {}, {}
    for task in weights:
        if task not in in_files:
            train[task], test[task] = rows_by_rule(task, source, tokenizer, seed, eval_rows)
            continue
        train[task] = in_files[task].train.rows(task)
        held = in_files[task].test.rows(task)
        chosen = random.Random(0).sample(range(len(held)), min(eval_rows, len(held)))
        test[task] = [held[i] for i in sorted(chosen)]
    shares = {task: Fraction(weights[task] or len(train[task])) for task in weights}
    return Data(train, test, shares, "\n".join(reports))


# -------------------------------------------------------------------------------- the order of rows


@lru_cache(maxsize=16)
def order(count: int, epoch: int, seed: int) -> list[int]:
    places_of_rows = list(range(count))
    random.Random(f"epoch {epoch} {seed}").shuffle(places_of_rows)
    return places_of_rows


def drawn(total: int, weights: dict[str, Fraction]) -> dict[str, int]:
    """How many of a run's first `total` rows come from each task: its share, to within the number
    of tasks."""
    shares = {name: Fraction(weight) for name, weight in weights.items()}
    rows_left = total
    weight_left = sum(shares.values())
    counts = {}
    for name, share in shares.items():
        counts[name] = int(rows_left * share / weight_left)
        rows_left -= counts[name]
        weight_left -= share
    return counts


def batch(
    rows: dict[str, Sequence], step: int, size: int, seed=0, weights: dict | None = None
) -> list[dict]:
    """Batch `step` (0, 1, ...) of `size` rows, from each task by its weight; by default a task has
    that of its rows. Every row of a task comes once an epoch of that task; each epoch has its own
    order."""
    weights = weights or {name: len(rows[name]) for name in rows}
    place = drawn(step * size, weights)
    after = drawn((step + 1) * size, weights)
    tasks = []
    for name in rows:
        tasks += [name] * (after[name] - place[name])
    random.Random(f"mix {step} {seed}").shuffle(tasks)
    chosen = []
    for name in tasks:
        epoch, k = divmod(place[name], len(rows[name]))
        chosen.append(rows[name][order(len(rows[name]), epoch, seed)[k]])
        place[name] += 1
    return chosen


# ----------------------------------------------------------------------- token-budget micro-batches


def cost(length: int, quadratic: float = 1 / 8192) -> float:
    """Relative cost of one sequence in a forward pass: the matmuls grow with L, attention with L^2.
    The default makes both equal at 8,192 tokens, about right for a 1.5B model (12 D^2 against 2 L D
    a layer and token, D = 1536)."""
    return length + quadratic * length * length


def plan_microbatches(lengths: list[int], budget: int, ranks: int = 1) -> list[list[list[int]]]:
    """plan[rank][k] = indices (into `lengths`) of the sequences that rank runs as its micro-batch
    k, at most `budget` tokens. Every rank gets as many of them (FSDP hangs otherwise; some may be
    empty), as few as first-fit-decreasing finds. Ranks wait for each other in every one: the k-th
    micro-batches of all ranks, a round, cost about the same."""
    longest = max(lengths, default=0)
    if longest > budget:
        raise ValueError(
            f"a sequence of {longest} tokens does not fit {budget}: "
            "raise --max_tokens_per_microbatch"
        )
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    packed = first_fit(longest_first, lengths, budget)
    rounds = max(1, math.ceil(len(packed) / ranks))
    bins = even_rounds(longest_first, lengths, budget, rounds, ranks)
    if bins is None:
        bins = packed + [[] for _ in range(rounds * ranks - len(packed))]

    # each round: the `ranks` dearest that are left, dealt to and fro
    bins.sort(key=lambda indices: -sum(cost(lengths[i]) for i in indices))
    plan = [[] for _ in range(ranks)]
    for k in range(rounds):
        deal = bins[k * ranks : (k + 1) * ranks]
        if k % 2:
            deal.reverse()
        for rank in range(ranks):
            plan[rank].append(deal[rank])
    return plan


def first_fit(longest_first: list[int], lengths: list[int], budget: int) -> list[list[int]]:
    """Each sequence goes into the first bin with room for it, or into a new one."""
    bins = []
    room = []
    for i in longest_first:
        for k, free in enumerate(room):
            if free >= lengths[i]:
                bins[k].append(i)
                room[k] -= lengths[i]
                break
        else:
            bins.append([i])
            room.append(budget - lengths[i])
    return bins


def even_rounds(
    longest_first: list[int], lengths: list[int], budget: int, rounds: int, ranks: int
) -> list[list[int]] | None:
    """rounds * ranks bins, filled so that the ranks wait little for each other in every round: each
    sequence goes into the bin that makes its round last the least longer, of those the emptiest.
    None: a sequence found no room."""
    bins = [[] for _ in range(rounds * ranks)]
    room = [budget] * len(bins)
    load = [0.0] * len(bins)
    slowest = [0.0] * rounds
    begun = 0  # rounds with a sequence in them; of the empty ones, all alike, one is tried
    for i in longest_first:
        work = cost(lengths[i])
        fits = []
        for k, free in enumerate(room[: (begun + 1) * ranks]):
            if free >= lengths[i]:
                longer = max(0.0, load[k] + work - slowest[k // ranks])
                fits.append((longer, load[k], k))
        if not fits:
            return None
        k = min(fits)[2]
        bins[k].append(i)
        room[k] -= lengths[i]
        load[k] += work
        slowest[k // ranks] = max(slowest[k // ranks], load[k])
        begun = max(begun, k // ranks + 1)
    return bins


def plan_summary(lengths: list[int], budget: int, ranks: int = 1) -> dict[str, float]:
    """How full the micro-batches of a plan are, and how much longer than the mean of all ranks'
    costs a pass takes, as every micro-batch lasts as long as the slowest rank's."""
    plan = plan_microbatches(lengths, budget, ranks)
    load = []  # load[rank][k]: cost of a micro-batch
    for rank in plan:
        load.append([sum(cost(lengths[i]) for i in microbatch) for microbatch in rank])
    rounds = len(plan[0])
    waiting = sum(max(costs) for costs in zip(*load))
    working = sum(sum(costs) for costs in load)
    return {
        "perf/microbatches": rounds,
        "perf/pack_fill": sum(lengths) / (budget * rounds * ranks),
        "perf/rank_imbalance": waiting / working * ranks - 1,
    }


# ----------------------------------------------------------------------------------- python data.py


def write_kept(source: Source, tokenizer, out: str) -> None:
    """The rows of files that are kept, as train.parquet and validation.parquet in `out`."""
    Path(out).mkdir(parents=True)
    opened = open_sources(list(mixture(source.task)), source, tokenizer, True)
    if len(opened) != 1:
        raise ValueError(
            f"out={out!r}: what is left of one source is written there, and these are {len(opened)}"
        )
    for split, name in ((opened[0].train, "train"), (opened[0].test, "validation")):
        kept = [i for i, why in enumerate(split.dropped) if not why]
        split.table.select(kept).to_parquet(Path(out, f"{name}.parquet"))


GENERATED = Source(",".join(TASKS))


def look(source: Source = GENERATED, show: int = 3, model: str = "", out: str = "") -> None:
    """What is kept of files and left out, and the first `show` rows of each task as a run would
    feed them. `model`: a folder whose tokenizer applies the template and counts; rows made by rule
    are shown without, too. OUT gets the rows of files that are kept, in the published schema, as
    train.parquet and validation.parquet, for --data OUT."""
    tokenizer = None
    if model:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
    if out:
        write_kept(source, tokenizer, out)
    found = load(source, tokenizer, progress=True)
    if found.report:
        print(found.report + "\n")
    for rows in found.train.values():
        for i in range(min(show, len(rows))):
            row = rows[i]
            text, count = row["prompt"], "uncounted"
            if tokenizer:
                text, count = tokenizer.decode(row["ids"]), len(row["ids"])
            answer = json.dumps(row["answer"])
            print(f"{row['id']} ({row['task']}, {count} tokens), answer {answer:.300}\n{text}\n")


def main(arguments: list[str]) -> None:
    import tyro

    if arguments[:1] == ["eurus"]:  # the rows of the reference run
        reference = "--task math,code --template chat --show 0 --model"
        model = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
        arguments = [*reference.split(), model, *arguments[1:]]
    config = (tyro.conf.OmitArgPrefixes,)
    try:
        tyro.cli(look, args=arguments, config=config, use_underscores=True)
    except ValueError as error:
        sys.exit(f"data.py: {error}")


if __name__ == "__main__":
    # this folder's kernels.py has the name of a package that transformers looks for
    del sys.path[0]
    main(sys.argv[1:])
