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
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import product
from operator import add, mul, sub, truediv
from pathlib import Path
from typing import Literal, NamedTuple

HERE = Path(__file__).resolve().parent
Each = tuple[str, ...]  # one for all sources, or one for each
Prompt = str | list[dict]  # text for a base model, or chat messages


@dataclass
class Source:
    """which questions are asked, and how they are worded"""

    # countdown, countdown3, math, code or rg:NAME (any task of reasoning-gym); several with commas,
    # and with weights, as in math:0.8,code:0.2
    task: str = "countdown"
    # file, folder or hub id with rows: one for all tasks, or one for each that reads files; without
    # it, countdown and rg are made by rule, math and code are read from PRIME-RL/Eurus-2-RL-Data
    data: Each = ()
    # column of the question, one for all --data or one for each; without it: prompt, question, ...
    prompt_column: Each = ()
    # column of the answer, or of a solution that ends with it; without it: answer, solution, ...
    answer_column: Each = ()
    train_split: Each = ()  # split of --data to train on; without it: train
    # split of --data, or a file, with the held-out rows; without it: test, validation, or one
    # question in fifty of the training split
    test_split: Each = ()
    data_config: Each = ()  # configuration of a hub dataset that has several, as main of gsm8k
    # base: the question as plain text, for base models; chat: as a message, for instruct models
    template: Literal["base", "chat"] = "base"
    # system prompt of a dataset: drop it, keep it, or the text to use in its place
    system_prompt: str = "drop"
    # tokens of a prompt at most, template included; longer rows of --data are left out, longer ones
    # that are made by rule are an error
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


def ask_countdown(numbers: list[int], target: int, template: str) -> Prompt:
    listed = ", ".join(map(str, numbers))
    if template == "chat":
        text = CHAT_COUNTDOWN.format(numbers=listed, target=target)
        return [{"role": "user", "content": text}]
    return BASE_COUNTDOWN.format(numbers=listed, target=target)


def instruction(task: str):
    """The entry of a task in INSTRUCTIONS; ValueError: there is none."""
    name = task.partition(":")[0]
    if name not in INSTRUCTIONS:
        raise ValueError(
            f"task {name!r} has rows, and INSTRUCTIONS in data.py has only {[*INSTRUCTIONS]}: add "
            f"{name!r}: (mark, sentence), what its reward looks for in a response and the sentence "
            'that asks for it, or ("", "") when nothing is to be added to the questions'
        )
    return INSTRUCTIONS[name]


def ask(messages: list[dict], task: str, template: str) -> Prompt:
    """Messages with the instruction that the reward of the task needs; for a base model one plain
    text that it can go on with."""
    mark, sentence = instruction(task)
    *before, last = messages
    if mark not in last["content"]:
        messages = [*before, last | {"content": last["content"] + sentence}]
    if template == "chat":
        return messages
    return "\n\n".join(message["content"] for message in messages) + BASE_ENDING


def encode(prompts: list[Prompt], tokenizer) -> list[list[int]]:
    """Token ids of the prompts, as engine and trainer get them; the chat template is applied here,
    never in files. ValueError: the template refuses a prompt."""
    if not prompts:
        return []
    begin = ""
    if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        begin = tokenizer.bos_token
    texts = []
    for prompt in prompts:
        if isinstance(prompt, str):
            texts.append(begin + prompt)
            continue
        try:
            text = tokenizer.apply_chat_template(
                prompt,
                add_generation_prompt=True,
                tokenize=False,
                date_string="26 Jul 2024",  # or Llama's template says today's, and rows differ each day
            )
        except Exception as error:  # jinja's, and those that templates raise
            raise ValueError(
                f"{tokenizer.name_or_path!r}: its chat template refuses a prompt: {error}: "
                "try --system_prompt drop, or --template base"
            ) from error
        texts.append(text)
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


# --------------------------------------------------------------------- worked out once on a machine


def cache_folder() -> Path:
    """Where `datasets` keeps its files; to import it takes 0.7 s, which generated rows can save."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("HF_DATASETS_CACHE", Path(HF_HOME, "datasets")))


def digest(*key):
    """The name of what follows from the key."""
    return hashlib.sha256("\n".join(key).encode()).hexdigest()[:32]


def remembered(what: str, make: Callable, *key):
    """make(), something that JSON can hold, from a file that is named by a hash of the key. Of
    several ranks that start at once the first makes it, and the others wait and read."""
    from filelock import FileLock

    file = cache_folder() / f"ppo-{what}-{digest(*key)}.json"
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


# a part of most keys: whatever is edited in this file, nothing old is taken for new
THIS_CODE = Path(__file__).read_text()


def identity(tokenizer) -> str:
    """All that token ids depend on."""
    return (
        f"{tokenizer.backend_tokenizer.to_str()}\n"
        f"{tokenizer.chat_template} {tokenizer.special_tokens_map}"
    )


# -------------------------------------------------------------------------------- rows made by rule


def random_value(rng, numbers):
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


def countdown_problems(split, seed, sizes, max_number, count):
    """[[numbers, target], ...], distinct, with a whole target in 1..100. 20,000 take 2 to 3 s."""
    rng = random.Random(f"countdown {split} {seed}")
    problems = {}
    while len(problems) < count:
        numbers = [rng.randint(1, max_number) for _ in range(rng.choice(sizes))]
        # one set of numbers in ten, whatever the seed
        held_out = hashlib.sha256(repr(sorted(numbers)).encode()).digest()[0] % 10 == 0
        if held_out == (split == "test"):
            target = random_value(rng, numbers)
            if target.denominator == 1 and 1 <= target <= 100:
                problems.setdefault((*sorted(numbers), target), [numbers, int(target)])
    return list(problems.values())


def countdown(
    split: str, seed: int, template: str, sizes=(3, 4), max_number=99, train=20_000
) -> list[dict]:
    """`train` distinct problems, or 1,024 for the test split, with numbers in 1..max_number and a
    whole target in 1..100. Solvable by construction: the target is the value of a random
    expression over the numbers."""
    rule = (split, seed, sizes, max_number, train if split == "train" else 1_024)
    problems = remembered("countdown", partial(countdown_problems, *rule), repr(rule), THIS_CODE)
    return [
        {
            "task": "countdown",
            "prompt": ask_countdown(numbers, target, template),
            "answer": {"numbers": numbers, "target": target},
            "id": f"countdown-{split}-{n}",
        }
        for n, (numbers, target) in enumerate(problems)
    ]


def in_words(task: str, name: str, answers: dict, template: str) -> list[dict]:
    """Rows out of {question: answer}, asked as the reward of the task needs it."""
    return [
        {
            "task": task,
            "prompt": ask([{"role": "user", "content": question}], task, template),
            "answer": answer,
            "id": f"{name}-{n}",
        }
        for n, (question, answer) in enumerate(answers.items())
    ]


# in its own process: some tasks use the global random state
GYM = """import base64, json, pickle, random, sys, numpy
random.seed(0), numpy.random.seed(0)
import reasoning_gym
problems = reasoning_gym.create_dataset(sys.argv[1], seed=int(sys.argv[2]), size=int(sys.argv[3]))
found = {p["question"]: base64.b64encode(pickle.dumps(p)).decode() for p in problems}
print("\\n" + json.dumps(found))"""


def gym_problems(name, seed, size):
    """{question: problem}, equal on all ranks, whatever the order of sets."""
    done = subprocess.run(
        [sys.executable, "-c", GYM, name, str(seed), str(size)],
        env=os.environ | {"PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(
            f"task=rg:{name}: {done.stderr[-300:]}pip install reasoning-gym and use one of its tasks"
        )
    return json.loads(done.stdout.splitlines()[-1])


def gym(name: str, split: str, seed: int, template: str) -> list[dict]:
    """Rows of a reasoning-gym task; the answer is the problem, for its own scorer. Test rows do not
    know the seed."""
    problems = test = gym_problems(name, 0, 256)
    if split == "train":
        problems = gym_problems(name, seed + 1, 2_000)
    answers = {
        question: {"name": name, "entry": problem}
        for question, problem in problems.items()
        if split == "test" or question not in test
    }
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


def need(ok, reason):
    if not ok:
        raise BadRow(reason)


def parse_json(text, reason):
    """What a text holds as strict JSON; BadRow: it is none."""
    try:
        return json.loads(text, parse_constant=partial(need, False))  # NaN, Infinity
    except (ValueError, RecursionError):
        raise BadRow(reason) from None


BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}")


def math_answer(given) -> str:
    """LaTeX from an answer, or from a solution that ends with it: "#### 72" (GSM8K) or \\boxed{72}
    (MATH)."""
    need(given not in (None, ""), "no answer")
    typed = type(given) in (str, int) or (isinstance(given, float) and math.isfinite(given))
    need(typed, "answer of the wrong type")
    text = str(given).rpartition("####")[2]
    if "\\boxed{" in text:
        text = ["", *BOXED.findall(text)][-1]
    need(text.strip(), "no answer")
    return text.strip()


def code_answer(given) -> dict:
    """{"inputs", "outputs", "fn_name"} from the same, perhaps as JSON text; the tests are what
    rewards.code can run."""
    tests = parse_json(given, "tests are no JSON") if isinstance(given, str) else given
    mistyped = "tests of the wrong type"
    need(given, "no tests")
    need(isinstance(tests, dict), mistyped)
    inputs = tests.get("inputs")
    outputs = tests.get("outputs")
    name = tests.get("fn_name") or None
    need(inputs and outputs, "no tests")
    typed = isinstance(inputs, list) and isinstance(outputs, list) and isinstance(name, str | None)
    need(typed, mistyped)
    need(len(inputs) == len(outputs), "unequal numbers of inputs and outputs")
    if name is None:  # text on stdin and stdout, or a list of its lines
        for stream in inputs + outputs:
            lines = stream if isinstance(stream, list) else [stream]
            need(all(isinstance(line, str) for line in lines), mistyped)
    else:  # arguments as JSON, one a line, or in a list; a result as JSON
        need(all(isinstance(arguments, str | list) for arguments in inputs), mistyped)
        lines = "\n".join(text for text in inputs if isinstance(text, str)).split("\n")
        results = [text for text in outputs if isinstance(text, str)]
        for text in [*filter(str.strip, lines), *results]:
            parse_json(text, "tests are no JSON")
    return {"inputs": inputs, "outputs": outputs, "fn_name": name}


def countdown_answer(given) -> dict:
    """{"numbers": [int, ...], "target": int} from the same."""
    match given:
        case {"numbers": numbers, "target": target} if None not in (numbers, target):
            whole = isinstance(numbers, list) and all(type(n) is int for n in [*numbers, target])
            need(numbers and whole, "numbers or target of the wrong type")
            return {"numbers": numbers, "target": target}
    raise BadRow("no numbers or no target")


# task -> answer of a row from what a file gives, or BadRow: the tasks that are read from files
ANSWERS = {"math": math_answer, "code": code_answer, "countdown": countdown_answer}
# task -> hub id that is read without --data; the others need one, or are made by rule (TASKS)
DEFAULTS = {"math": "PRIME-RL/Eurus-2-RL-Data", "code": "PRIME-RL/Eurus-2-RL-Data"}

# --------------------------------------------------------------------------- the published schemas


class Place(NamedTuple):
    """What the flags say of a source; "": nothing."""

    data: str
    prompt_column: str
    answer_column: str
    train_split: str
    test_split: str
    data_config: str


PROMPT_COLUMNS = ("prompt", "question", "problem", "instruction")  # the first that there is
ANSWER_COLUMNS = ("answer", "solution", "final_answer", "ground_truth", "expected_answer")


def first(raw, columns):
    for name in columns:
        if raw.get(name) is not None:
            return raw[name]
    return None


def named_task(raw, default):
    for name in ("task", "ability"):
        if name in raw:
            return str(raw[name]).lower()
    return default


def tinyzero(raw):
    """The problem of a row of Countdown-Tasks-3to4, {"target": 98, "nums": [44, 19, 35]}, or of the
    files that TinyZero makes of it: those have the two as ground truth, and say "ability": "math".
    None: a row of something else."""
    match raw:
        case {"reward_model": {"ground_truth": {"target": _} as truth}}:
            raw = raw | truth
        case _ if named_task(raw, "countdown") != "countdown":
            return None
    match raw:
        case {"target": target, "numbers": numbers} | {"target": target, "nums": numbers}:
            return {"numbers": numbers, "target": target}
    return None


def published_answer(raw):
    """What a row says of its answer, for the function in ANSWERS."""
    match raw:
        # Eurus-2-RL-Data of PRIME, and whatever has veRL's schema
        case {"reward_model": {"ground_truth": truth}} if truth is not None:
            return truth
        case {"inputs": _}:  # tests in columns: "inputs", "outputs", "fn_name"
            return raw
    # GSM8K ("question", "answer"), MATH ("problem", "solution"), and files of your own
    return first(raw, ANSWER_COLUMNS)


def parse_line(raw):
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


def conversation(prompt):
    """Messages, the last of them a question, from messages or a text."""
    need(prompt is not None, "no prompt")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    mistyped = "prompt neither text nor messages"
    need(isinstance(prompt, list), mistyped)
    for message in prompt:
        match message:
            case {"role": str(), "content": str()}:
                pass
            case _:
                raise BadRow(mistyped)
    match prompt:
        case [*_, {"role": "user", "content": question}] if question.strip():
            return prompt
    raise BadRow("no question in the prompt")


def read(raw, number, split, wanted, place: Place, source: Source):
    """A row of ours from row `number` of a file, in any of the published schemas; BadRow when there
    is none in it."""
    raw = parse_line(raw)
    for name, column in (("prompt", place.prompt_column), ("answer", place.answer_column)):
        if column:
            need(column in raw, f"no column {column!r}")
            raw = raw | {name: raw[column]}
    task = named_task(raw, wanted[0])
    if place.answer_column:  # a column that is named is read, whatever else there is
        given = first(raw, ANSWER_COLUMNS)
    else:
        given = published_answer(raw)
        problem = tinyzero(raw)
        if problem and "countdown" in wanted:
            task, given = "countdown", problem
    if task not in wanted:
        raise BadRow(f"task {task} not asked for" if task.isidentifier() else "task not asked for")
    if task == "countdown":
        answer = countdown_answer(given)
        prompt = ask_countdown(**answer, template=source.template)
        asked = str(answer)
    else:
        messages = conversation(first(raw, PROMPT_COLUMNS))
        answer = ANSWERS[task](given)
        spoken = [message for message in messages if message["role"] != "system"]
        asked = "\n".join(message["content"] for message in spoken)
        if source.system_prompt != "keep":
            messages = spoken
        if source.system_prompt not in ("keep", "drop"):
            messages = [{"role": "system", "content": source.system_prompt}, *messages]
        # UnicodeError: half of a surrogate pair, from a JSON escape
        json.dumps([messages, answer], ensure_ascii=False).encode()
        prompt = ask(messages, task, source.template)
    return {
        "task": task,
        "source": str(raw.get("data_source") or task),
        "id": f"{task}-{split}-{number}",
        "prompt": prompt,
        "answer": answer,
        "asked": asked,
    }


# --------------------------------------------------------------------------------- files and splits

TINYZERO = 327_680, 1_024  # rows of Countdown-Tasks-3to4 for training, and the next for testing
# end of a file's name -> how datasets reads it; lines are parsed here, with names
FILES = {
    ".parquet": {"path": "parquet"},
    ".jsonl": {"path": "text", "encoding_errors": "replace"},
}
CONFIGS = {"openai/gsm8k": "main"}  # of the hub, by default
HELD_OUT = ("validation", "test", "val", "dev")  # the split to evaluate on, the first that there is


def one_each(flag, source: Source, readers):
    """What a flag says of the source of each task in `readers`: nothing, the same of all, or of
    each its own."""
    given = getattr(source, flag)
    if len(given) not in (0, 1, len(readers)) or (given and not readers):
        raise ValueError(
            f"{flag}={list(given)} for task={source.task}: give one, or one for each of the "
            f"{len(readers)} tasks that read files (--data): {', '.join(readers)}"
        )
    if len(given) < 2:
        given = (given or ("",)) * len(readers)
    return given


def places(names, source: Source):
    """{place: tasks whose rows are read there}; tasks that are made by rule are in none."""
    readers = [name for name in names if name in ANSWERS and (source.data or name not in TASKS)]
    said = [one_each(flag, source, readers) for flag in Place._fields]
    found = {}
    for name, where, *more in zip(readers, *said):
        where = where or DEFAULTS.get(name)
        if not where:
            raise ValueError(
                f"task={source.task!r}: rows of {name} are in a file: say which, --data"
            )
        found.setdefault(Place(where, *more), []).append(name)
    return found


class Rows(Sequence):
    """Rows of one file or several, read when asked for: tests of programs come to gigabytes and
    stay on disk."""

    def __init__(self, table, prepared, reader, chosen):
        self.table = table
        self.prepared = prepared
        self.reader = reader
        self.chosen = chosen

    def __len__(self):
        return len(self.chosen)

    def __getitem__(self, i):
        index = self.chosen[i]
        row = self.reader(self.table[index], index + 1)
        return row | {"ids": self.prepared[index]["ids"]}


class Split(NamedTuple):
    """One split of one source."""

    path: str
    name: str  # train or test
    table: Sequence
    prepared: Sequence
    reader: partial
    tasks: list[str]  # of each row
    asked: list[int]  # a hash of the question
    dropped: list[str]  # why a row is left out, or ""

    def rows(self, task):
        rows = zip(self.tasks, self.dropped)
        chosen = [i for i, row in enumerate(rows) if row == (task, "")]
        return Rows(self.table, self.prepared, self.reader, chosen)

    def drop(self, values, bad, why):
        """Leaves out the rows whose value, of one for each row, is in `bad`."""
        for i, value in enumerate(values):
            if value in bad and not self.dropped[i]:
                self.dropped[i] = why

    def report(self):
        """Rows, kept and dropped, of every data_source; and how many for which reason, with the
        first of them."""
        counts = defaultdict(Counter)
        first_row = {}
        for number, (where, why) in enumerate(zip(self.prepared["source"], self.dropped), 1):
            counts[where][why] += 1
            first_row.setdefault((where, why), number)
        lines = [f"{self.path}, {self.name}:".ljust(28) + "      rows      kept   dropped"]
        for where, count in sorted(counts.items()):
            total = count.total()
            kept = count.pop("", 0)
            lines.append(f"  {where:26s}{total:10,d}{kept:10,d}{total - kept:10,d}")
            for why, n in count.most_common():
                lines.append(f"    {n:,} {why} (first: row {first_row[where, why]:,})")
        if len(lines) > 200:  # data_source may differ in every row
            lines[200:] = ["  ..."]
        return "\n".join(lines)


def files_of(place: Place, where: Path):
    """{split: files}, where the source is a file or a folder, or its test split is a file."""
    files = {}
    if where.suffix in FILES:
        files["train"] = [where]
    if where.is_dir():
        present = [p for p in sorted(where.rglob("[!.]*")) if p.suffix in FILES and p.is_file()]
        for name in filter(None, ["train", *HELD_OUT, place.train_split, place.test_split]):
            files[name] = [p for p in present if p.name.startswith(name)]
    test = Path(place.test_split)
    if test.suffix in FILES:
        files[place.test_split] = [test.expanduser()]
    return files


def open_tables(place: Place, progress):
    """{"train": table, perhaps "test": table} of a file, a folder of files or a hub id, with the
    rows on disk."""
    import datasets

    if progress:
        datasets.enable_progress_bars()
    else:
        datasets.disable_progress_bars()
    where = Path(place.data).expanduser()
    tables = {}
    try:
        files = files_of(place, where)
        for split, found in files.items():
            for where in found:
                part = datasets.load_dataset(
                    **FILES[where.suffix], data_files=glob.escape(str(where)), split="train"
                )
                if split in tables:
                    part = datasets.concatenate_datasets([tables[split], part])
                tables[split] = part
        if "train" not in files:
            config = place.data_config or CONFIGS.get(place.data)
            tables |= datasets.load_dataset(place.data, config)
    except Exception as error:  # the libraries below raise a dozen kinds
        raise ValueError(
            f"data={place.data!r}: no file here, no hub id in reach, or {where} is damaged: {error}"
        ) from error
    return choose_splits(place, tables)


def choose_splits(place: Place, tables):
    train = place.train_split or "train"
    held_out = (name for name in HELD_OUT if name in tables and name != train)
    names = {"train": train, "test": place.test_split or next(held_out, "")}
    for name in names.values():
        if name and name not in tables:
            raise ValueError(
                f"data={place.data!r} has {sorted(tables)}, no {name!r}: say which, "
                "--train_split NAME --test_split NAME"
            )
    return {split: tables[name] for split, name in names.items() if name}


# --------------------------------------------------------------------- which rows of files are kept


def prepare(table, indices, reader, tokenizer, limit):
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
        asked = hashlib.sha256(question.encode()).digest()[:8]
        out.append(
            {
                "source": " ".join(where.split())[:26],
                "task": task,
                "dropped": why,
                "asked": int.from_bytes(asked, signed=True),
                "math": row["answer"] if task == "math" else "",
            }
        )
        prompts.append(row.get("prompt", ""))
    for row, ids in zip(out, encode(prompts, tokenizer)):
        if not row["dropped"] and len(ids) > limit:
            row["dropped"] = f"prompt over {limit} tokens"
        row["ids"] = [] if row["dropped"] else ids
    return {name: [row[name] for row in out] for name in out[0]}


def prepare_table(table, reader, tokenizer, limit, key):
    """What `prepare` makes of every row of a table; made once on a machine."""
    import datasets
    from filelock import FileLock

    name = digest(table._fingerprint, key, identity(tokenizer), THIS_CODE)
    folder = Path(datasets.config.HF_DATASETS_CACHE, f"ppo-{name}")
    folder.mkdir(parents=True, exist_ok=True)
    cores = min(32, len(os.sched_getaffinity(0)))
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
            num_proc=cores if len(table) > 5000 else None,
        )
    return prepared.with_format(None)


VERIFIER_FILES = (HERE / "verify/equality.py",)
LIMIT_FILES = (HERE / "rewards.py", HERE / "verify/pool.py")
LIMITS = re.compile(r"^(?:MATH_SECONDS|MEMORY) = .*", re.MULTILINE)  # what a comparison may take


def verifier():
    """All that decides which answers can be read: the verifier, its limits and its library. Nothing
    else in those files does, and 400,000 answers take minutes."""
    parts = [file.read_text() for file in VERIFIER_FILES]
    for file in LIMIT_FILES:
        parts += LIMITS.findall(file.read_text())
    return "\n".join([*parts, version("math-verify"), version("sympy")])


def ask_verifier(answers, progress):
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


def unreadable(prepared, progress):
    """Math answers of the rows that the verifier cannot read; asked once on a machine."""
    answers = {a for a, why in zip(prepared["math"], prepared["dropped"]) if a and not why}
    answers = sorted(a for a in answers if not re.fullmatch(r"-?\d{1,30}", a))
    if not answers:
        return set()
    make = partial(ask_verifier, answers, progress)
    return set(remembered("unreadable", make, json.dumps(answers), verifier()))


def open_source(place: Place, wanted, source: Source, tokenizer, progress):
    """The splits of a place, prepared: train, test."""
    limit = source.max_prompt_tokens
    splits = {}
    for name, table in open_tables(place, progress).items():
        reader = partial(read, split=name, wanted=wanted, place=place, source=source)
        key = (
            f"{wanted} {place.prompt_column!r} {place.answer_column!r} "
            f"{source.template} {source.system_prompt} {limit} {name}"
        )
        rows = prepare_table(table, reader, tokenizer, limit, key)
        of_rows = [rows[column][:] for column in ("task", "asked", "dropped")]
        splits[name] = Split(place.data, name, table, rows, reader, *of_rows)
        bad = unreadable(rows, progress)
        splits[name].drop(rows["math"], bad, "answer that cannot be read by the verifier")
    if "test" not in splits:
        splits["test"] = hold_out(splits["train"])
    return splits.values()


def hold_out(train: Split):
    """A test split for a source without one, always the same: TinyZero's, or the questions of one
    hash in fifty. These rows are dropped from `train`."""
    every = range(len(train.asked))
    held_out = set()
    spare = range(0)  # rows that TinyZero uses for nothing
    if len(every) >= sum(TINYZERO) and "countdown" in train.tasks:
        held_out.update(every[TINYZERO[0] : sum(TINYZERO)])
        spare = every[sum(TINYZERO) :]
    if not spare:
        for task in set(train.tasks):
            rows = [i for i in every if train.tasks[i] == task]
            asked = {train.asked[i] for i in rows if not train.dropped[i]}
            chosen = {value for value in asked if value % 50 == 0} or {min(asked, default=0)}
            held_out.update(i for i in rows if train.asked[i] in chosen)
    test = train._replace(name="test", dropped=train.dropped[:])
    test.drop(every, set(every) - held_out, "for training")
    train.drop(every, held_out, "held out")
    train.drop(every, spare, "spare")
    return test


def open_sources(names, source: Source, tokenizer, progress):
    """[(tasks, train, test), ...] of the sources in files; no training row asks what any test row
    asks."""
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
        opened.append((tasks, *open_source(place, tasks, source, tokenizer, progress)))
    seen = {
        asked for _, _, test in opened for asked, why in zip(test.asked, test.dropped) if not why
    }
    for _, train, _ in opened:
        train.drop(train.asked, seen, "also in the test split")
    for tasks, *splits in opened:
        for task, split in product(tasks, splits):
            if not split.rows(task):
                raise no_rows(task, split)
    return opened


def check_template(template, tokenizer):
    has = "no" if tokenizer.chat_template is None else "a"
    if template != "base" and (template, has) != ("chat", "a"):
        raise ValueError(
            f"template={template!r}, and {tokenizer.name_or_path!r} has {has} chat template: "
            "use base or chat"
        )


def no_rows(task, split: Split):
    what = (
        f"data={split.path!r} has no row for task={task}, {split.name}; "
        f"its first row is {split.table[:1]}"
    )
    return ValueError(
        f"{what:.500}; columns can be named: --prompt_column COLUMN --answer_column COLUMN\n"
        f"{split.report()}"
    )


# --------------------------------------------------------------------------------- what a run loads


def mixture(text: str) -> dict[str, Fraction | None]:
    """{task: weight} of "math:0.8,code:0.2", or of "math,code"."""
    weights = {}
    for part in text.split(","):
        name, colon, weight = part.rpartition(":")
        if not colon or name == "rg":
            name, weight = part, None
        known = name in TASKS | ANSWERS or re.fullmatch("rg:.+", name)
        if not known or name in weights:
            raise ValueError(
                f"task={text!r}: {name!r} is not known, or stands there twice: use each once: "
                f"{', '.join(TASKS | ANSWERS)}, rg:NAME; a new one goes into TASKS in data.py "
                "(rows made by rule) or into ANSWERS (rows of files)"
            )
        if weight is not None:
            number = re.fullmatch(r"\d+(?:\.\d*)?|\.\d+|\d+/0*[1-9]\d*", weight)
            weight = Fraction(weight if number else 0)
        weights[name] = weight
    given = [*weights.values()]
    if 0 in given or 0 < given.count(None) < len(given):
        raise ValueError(
            f"task={text!r}: give every task a weight above 0, as in math:0.8,code:0.2, or none"
        )
    return weights


def rows_by_rule(task, source: Source, tokenizer, seed, eval_rows):
    """(training rows, test rows) of a task that needs no file."""
    make = TASKS.get(task) or partial(gym, task.removeprefix("rg:"))
    train = make("train", seed, source.template)
    test = make("test", seed, source.template)[:eval_rows]
    if tokenizer:
        rows = train + test
        for row, ids in zip(rows, encode_once([row["prompt"] for row in rows], tokenizer)):
            if not 0 < len(ids) <= source.max_prompt_tokens:
                raise ValueError(
                    f"row {row['id']}: its prompt has {len(ids)} tokens, allowed are 1 to "
                    f"max_prompt_tokens={source.max_prompt_tokens}: raise --max_prompt_tokens"
                )
            row["ids"] = ids
    return train, test


def encode_once(prompts, tokenizer):
    """encode(), which takes seconds for 20,000 prompts, made once on a machine."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:  # its identity cannot be told
        return encode(prompts, tokenizer)
    make = partial(encode, prompts, tokenizer)
    return remembered("ids", make, json.dumps(prompts), identity(tokenizer), THIS_CODE)


def load(
    source: Source, tokenizer, seed: int = 0, eval_rows: int = 256, progress: bool = False
) -> Data:
    """All rows of a run, each with its "ids" if there is a tokenizer. ValueError: flags and files
    do not fit."""
    # processes are enough; forks of threads are trouble
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    weights = mixture(source.task)
    reports = []
    in_files = {}
    for tasks, *splits in open_sources(weights, source, tokenizer, progress):
        reports += [split.report() for split in splits]
        in_files |= dict.fromkeys(tasks, splits)
    train, test = {}, {}
    for task in weights:
        if task in in_files:
            train[task], held = [split.rows(task) for split in in_files[task]]
            chosen = random.Random(0).sample(range(len(held)), min(eval_rows, len(held)))
            test[task] = [held[i] for i in sorted(chosen)]
        else:
            train[task], test[task] = rows_by_rule(task, source, tokenizer, seed, eval_rows)
    shares = {task: Fraction(weights[task] or len(train[task])) for task in weights}
    return Data(train, test, shares, "\n".join(reports))


# -------------------------------------------------------------------------------- the order of rows


@lru_cache(maxsize=16)
def order(count, epoch, seed):
    places_of_rows = list(range(count))
    random.Random(f"epoch {epoch} {seed}").shuffle(places_of_rows)
    return places_of_rows


def drawn(total, weights):
    """How many of a run's first `total` rows come from each task: its share, to within the number
    of tasks."""
    weight_left = sum(map(Fraction, weights.values()))
    counts = {}
    for name, weight in weights.items():
        counts[name] = int(total * Fraction(weight) / weight_left)
        total -= counts[name]
        weight_left -= Fraction(weight)
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


def cost(length: int) -> float:
    """Relative cost of one sequence in a forward pass: the matmuls grow with L, attention with L^2.
    Both are equal at 8,192 tokens, about right for a 1.5B model (12 D^2 against 2 L D a layer and
    token, D = 1536)."""
    return length + length * length / 8192


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
    padded = packed + [[] for _ in range(rounds * ranks - len(packed))]
    bins = even_rounds(longest_first, lengths, budget, rounds, ranks) or padded

    # each round: the `ranks` dearest that are left, dealt to and fro
    bins.sort(key=lambda indices: -sum(cost(lengths[i]) for i in indices))
    deals = [bins[k * ranks : (k + 1) * ranks] for k in range(rounds)]
    for deal in deals[1::2]:
        deal.reverse()
    return [list(rank) for rank in zip(*deals)]


def first_fit(longest_first, lengths, budget):
    """Each sequence goes into the first bin with room for it, or into a new one."""
    bins = [[] for _ in lengths]
    room = [budget] * len(bins)
    for i in longest_first:
        k = next(k for k, free in enumerate(room) if free >= lengths[i])
        bins[k].append(i)
        room[k] -= lengths[i]
    return [indices for indices in bins if indices]


def even_rounds(longest_first, lengths, budget, rounds, ranks):
    """rounds * ranks bins, filled so that the ranks wait little for each other in every round: each
    sequence goes into the bin that makes its round last the least longer, of those the emptiest.
    None: a sequence found no room."""
    bins = [[] for _ in range(rounds * ranks)]
    room = [budget] * len(bins)
    load = [0.0] * len(bins)
    slowest = [0.0] * rounds
    for i in longest_first:
        work = cost(lengths[i])
        begun = sum(map(bool, slowest))  # rounds; of the empty ones, all alike, one is tried
        fits = [
            (max(0.0, load[k] + work - slowest[k // ranks]), load[k], k)
            for k, free in enumerate(room[: (begun + 1) * ranks])
            if free >= lengths[i]
        ]
        if not fits:
            return None
        k = min(fits)[2]
        bins[k].append(i)
        room[k] -= lengths[i]
        load[k] += work
        slowest[k // ranks] = max(slowest[k // ranks], load[k])
    return bins


def plan_summary(lengths: list[int], budget: int, ranks: int = 1) -> dict:
    """How full the micro-batches of a plan are, and how much longer than the mean of all ranks'
    costs a pass takes, as every micro-batch lasts as long as the slowest rank's."""
    plan = plan_microbatches(lengths, budget, ranks)
    # load[rank][k]: cost of a micro-batch
    load = [[sum(cost(lengths[i]) for i in microbatch) for microbatch in rank] for rank in plan]
    rounds = len(plan[0])
    waiting = sum(map(max, zip(*load)))
    working = sum(map(sum, load))
    return {
        "perf/microbatches": rounds,
        "perf/pack_fill": sum(lengths) / (budget * rounds * ranks),
        "perf/rank_imbalance": waiting / working * ranks - 1,
    }


# ----------------------------------------------------------------------------------- python data.py


def write_kept(source: Source, tokenizer, out):
    """The rows of files that are kept, as train.parquet and validation.parquet in `out`."""
    Path(out).mkdir(parents=True)
    opened = open_sources(mixture(source.task), source, tokenizer, True)
    if len(opened) != 1:
        raise ValueError(
            f"out={out!r}: what is left of one source is written there, and these are {len(opened)}"
        )
    for split, name in zip(opened[0][1:], ("train", "validation")):
        kept = [i for i, why in enumerate(split.dropped) if not why]
        split.table.select(kept).to_parquet(Path(out, f"{name}.parquet"))


GENERATED = Source(",".join(TASKS))


def look(source: Source = GENERATED, show: int = 3, model: str = "", out: str = ""):
    """What is kept of files and left out, and the first rows of each task: the question as a run
    would feed it, and the answer that its reward looks for.

    Args:
        show: rows of each task that are shown, 0 or more.
        model: folder or hub id of a tokenizer; without it rows are shown without their template.
        out: new folder for the rows of files that are kept, as parquet; then --data takes it.
    """
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
        for _, row in zip(range(show), rows):
            question, count = row["prompt"], ""
            if tokenizer:
                question, count = tokenizer.decode(row["ids"]), f", {len(row['ids'])} tokens"
            print(
                f"{row['id']} ({row['task']}{count})\n"
                f"question: {question}\n"
                f"answer: {json.dumps(row['answer']):.300}\n"
            )


def main(arguments):
    import tyro

    if arguments[:1] == ["eurus"]:  # the rows of the reference run
        reference = (
            "--task math,code --template chat --show 0 "
            "--model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
        )
        arguments = [*reference.split(), *arguments[1:]]
    try:
        tyro.cli(look, args=arguments, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True)
    except ValueError as error:
        sys.exit(f"data.py: {error}")


if __name__ == "__main__":
    # this folder's kernels.py has the name of a package that transformers looks for
    del sys.path[0]
    main(sys.argv[1:])
