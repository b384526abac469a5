"""Which prompts, in which order, as which token ids; and which sequences share a micro-batch.

Owns: loading or generating rows, leaving out those that cannot teach, prompt wording, the order of rows and tasks,
token-budget planning. Every function gives the same answer on every rank, so no rank ever has to ask another one.
Refuses to know: models, torch, rewards (which answers can be judged, it asks the program rewards.py).
Left out on purpose: a DataLoader (batch `step` is a function of rows, step, size, seed; resuming is passing the step)
and preprocessing (`load` reads the published files, and keeps what it worked out in the cache of datasets).

A row is the only contract with rewards.py: {"task": str, "prompt": str | list[dict], "answer": ..., "id": str}.
"prompt" is text for a base model, or chat messages, to which the tokenizer's template is applied at run time.
"""
import glob
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, NamedTuple


@dataclass
class Source:
    """which prompts, and how they are worded"""
    task: str = "countdown"  # NAME[:WEIGHT],...: countdown, countdown3, math, code, rg:NAME (of reasoning-gym)
    data: tuple[str, ...] = ()  # file, folder or hub id for all tasks or for each, [:prompt=COLUMN,answer=COLUMN,...]
    template: Literal["base", "chat"] = "base"  # plain text for base models, chat messages for instruct models
    system_prompt: str = "drop"  # of a dataset: drop, keep, or the text to use instead
    max_prompt_tokens: int = 1000  # with the template; longer ones in files are left out, made by rule an error


class Data(NamedTuple):
    """What `load` found; a task is named as in --task."""
    train: dict[str, Sequence[dict]]
    test: dict[str, list[dict]]  # held-out rows
    weights: dict[str, Fraction]  # of each task in a batch
    report: str  # what was kept and what was left out, by source and reason


# ---------------------------------------------------------------------------------------------------- prompt wording

BASE_COUNTDOWN = (
    "Use the numbers {numbers} exactly once each with + - * / and parentheses to make {target}. "
    "Think inside <think> </think>, then write the expression inside <answer> </answer>.\n<think>"
)
CHAT_COUNTDOWN = (
    "Make {target} out of the numbers {numbers}. Use each of them exactly once, with + - * / and parentheses. "
    "Think first, inside <think> </think>. Then write nothing but the expression inside <answer> </answer>, "
    "for example <answer>(1+2)/3</answer>."
)
BASE_ENDING = "\n\nThink inside <think> </think>, then answer.\n<think>"
INSTRUCTIONS = {  # task -> (what its reward looks for, what is said where the question does not mention that)
    "math": ("\\boxed", "\n\nPut the final answer inside \\boxed{}."),
    "code": ("```", "\n\nWrite the whole program in Python, in one block between ```python and ```."),
    "rg": ("<answer>", "\n\nWrite nothing but the final answer inside <answer> </answer>."),
}


def ask_countdown(numbers: list[int], target: int, template: str) -> str | list[dict]:
    words = {"numbers": ", ".join(map(str, numbers)), "target": target}
    chat = [{"role": "user", "content": CHAT_COUNTDOWN.format(**words)}]
    return chat if template == "chat" else BASE_COUNTDOWN.format(**words)


def ask(messages: list[dict], task: str, template: str) -> str | list[dict]:
    """Messages with the instruction that the reward needs; for a base model one plain text that it can go on with."""
    mark, instruction = INSTRUCTIONS[task.partition(":")[0]]
    *before, last = messages
    if mark not in last["content"]:
        last = last | {"content": last["content"] + instruction}
    return [*before, last] if template == "chat" else "\n\n".join(m["content"] for m in [*before, last]) + BASE_ENDING


def encode(prompts: list[str | list[dict]], tokenizer) -> list[list[int]]:
    """Token ids of the prompts, as engine and trainer get them; the chat template is applied here, never in files."""
    chat = {"add_generation_prompt": True, "tokenize": False, "date_string": "26 Jul 2024"}  # Llama's would be today
    begin = tokenizer.bos_token if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else ""
    try:
        texts = [begin + p if isinstance(p, str) else tokenizer.apply_chat_template(p, **chat) for p in prompts]
    except Exception as error:  # jinja's, and those that templates raise
        fix = "try --system_prompt drop, or --template base"
        raise ValueError(f"{tokenizer.name_or_path!r}: its chat template refuses a prompt: {error}: {fix}") from error
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


# -------------------------------------------------------------------------------------------------- rows made by rule


def countdown(split: str, seed: int, template: str, sizes=(3, 4), max_number=99, train=20_000) -> list[dict]:
    """`train` distinct problems, or 1,024 for the test split, with numbers in 1..max_number and a whole target in
    1..100. Solvable by construction: the target is the value of a random expression over the numbers."""
    rng = random.Random(f"countdown {split} {seed}")
    out: dict[tuple, dict] = {}
    while len(out) < (train if split == "train" else 1_024):
        numbers = [rng.randint(1, max_number) for _ in range(rng.choice(sizes))]
        held_out = hashlib.sha256(repr(sorted(numbers)).encode()).digest()[0] % 10 == 0  # whatever the seed
        if held_out != (split == "test"):
            continue
        values = [Fraction(n) for n in numbers]
        while len(values) > 1:  # combine two of them until one value is left
            a, b = (values.pop(rng.randrange(len(values))) for _ in range(2))
            values.append(rng.choice([a + b, a - b, a * b] + ([a / b] if b else [])))
        target, key = values[0], (tuple(sorted(numbers)), values[0])
        if target.denominator != 1 or not 1 <= target <= 100 or key in out:
            continue
        prompt, answer = ask_countdown(numbers, int(target), template), {"numbers": numbers, "target": int(target)}
        out[key] = {"task": "countdown", "prompt": prompt, "answer": answer, "id": f"countdown-{split}-{len(out)}"}
    return [*out.values()]


GYM = """import base64, json, pickle, random, sys, numpy  # in its own process: some tasks use the global random state
random.seed(0), numpy.random.seed(0)
import reasoning_gym
problems = reasoning_gym.create_dataset(sys.argv[1], seed=int(sys.argv[2]), size=int(sys.argv[3]))
print("\\n" + json.dumps({p["question"]: base64.b64encode(pickle.dumps(p)).decode() for p in problems}))"""


def gym(name: str, split: str, seed: int, template: str) -> list[dict]:
    """Rows of a reasoning-gym task; the answer is the problem, for its own scorer. Test rows do not know the seed."""

    def made(seed: int, size: int) -> dict[str, str]:  # equal on all ranks, whatever the order of sets
        run = {"env": os.environ | {"PYTHONHASHSEED": "0"}, "capture_output": True, "text": True}
        done = subprocess.run([sys.executable, "-c", GYM, name, str(seed), str(size)], **run)
        if done.returncode:
            raise ValueError(f"task=rg:{name}: {done.stderr[-300:]}pip install reasoning-gym and use one of its tasks")
        return json.loads(done.stdout.splitlines()[-1])

    test, out = made(0, 256), []
    for question, entry in (test if split == "test" else made(seed + 1, 2_000)).items():
        if split == "test" or question not in test:
            prompt, where = ask([{"role": "user", "content": question}], "rg", template), f"{name}-{split}-{len(out)}"
            out.append({"task": f"rg:{name}", "prompt": prompt, "answer": {"name": name, "entry": entry}, "id": where})
    return out


TASKS = {  # task -> loader(split, seed, template) of rows that need no file; split is "train" or "test"
    "countdown": countdown,  # 3 or 4 numbers up to 99, as in TinyZero
    "countdown3": partial(countdown, sizes=(3,), max_number=20, train=10_000),  # for models of 1M parameters
}

# ------------------------------------------------------------------------------------------- rows of published files

DEFAULT = dict.fromkeys(("math", "code"), "PRIME-RL/Eurus-2-RL-Data") | {"countdown": None}  # tasks read from files
TINYZERO = 327_680, 1_024  # rows of Countdown-Tasks-3to4 for training, and the next ones for testing
FILES = {".parquet": "parquet", ".jsonl": "text"}  # file name -> builder of datasets; lines are parsed here, with names
HELD_OUT = ("validation", "test", "val", "dev")  # names of the split to evaluate on, the first that there is
PROMPTS = ("prompt", "question", "problem", "instruction")  # columns, the first that there is
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}")
ANSWERS = ("answer", "solution", "final_answer", "ground_truth", "expected_answer")


class BadRow(ValueError):
    """Why a row is left out, in words that many rows share."""


def need(ok, reason: str) -> None:
    if not ok:
        raise BadRow(reason)


def parse_json(text: str, reason: str):
    try:
        return json.loads(text, parse_constant=lambda name: need(False, reason))  # NaN, Infinity
    except (ValueError, RecursionError, TypeError):
        raise BadRow(reason) from None


def math_answer(given) -> str:
    """LaTeX from an answer, or from a solution that ends with it: "#### 72" (GSM8K) or \\boxed{72} (MATH)."""
    need(given not in (None, ""), "no answer")
    finite = isinstance(given, (str, int)) or isinstance(given, float) and abs(given) < float("inf")
    need(finite and not isinstance(given, bool), "answer of the wrong type")
    text = str(given).rpartition("####")[2]
    text = (BOXED.findall(text) or [""])[-1] if "\\boxed{" in text else text
    need(text.strip(), "no answer")
    return text.strip()


def code_answer(given) -> dict:
    """{"inputs", "outputs", "fn_name"} from the same, perhaps as JSON text; the tests are what rewards.code can run."""
    tests = parse_json(given, "tests are no JSON") if isinstance(given, str) else given
    mistyped = "tests of the wrong type"
    need(given, "no tests")
    need(isinstance(tests, dict), mistyped)
    inputs, outputs, name = tests.get("inputs"), tests.get("outputs"), tests.get("fn_name") or None
    need(inputs and outputs, "no tests")
    need(isinstance(inputs, list) and isinstance(outputs, list) and isinstance(name, str | None), mistyped)
    need(len(inputs) == len(outputs), "unequal numbers of inputs and outputs")
    if name is None:  # text on stdin and stdout, or its lines
        lines = [line for test in (*inputs, *outputs) for line in (test if isinstance(test, list) else [test])]
        need(all(isinstance(line, str) for line in lines), mistyped)
    else:  # arguments as JSON, one a line, or in a list; a result as JSON
        need(all(isinstance(test, str | list) for test in inputs), mistyped)
        lines = [line for test in inputs if isinstance(test, str) for line in test.split("\n") if line.strip()]
        for text in lines + [test for test in outputs if isinstance(test, str)]:
            parse_json(text, "tests are no JSON")
    return {"inputs": inputs, "outputs": outputs, "fn_name": name}


def read(raw: dict, number: int, split: str, wanted: list[str], columns: dict[str, str], source: Source) -> dict:
    """A row of ours from row `number` of a file, in any of the published schemas; BadRow when there is none in it."""
    if list(raw) == ["text"]:  # a line of a JSONL file
        text = raw["text"].removeprefix("\ufeff")
        need(text.strip(), "empty line")
        need("\ufffd" not in text, "not UTF-8")  # what came into the place of such bytes
        raw = parse_json(text, "no JSON")
        need(isinstance(raw, dict), "no JSON object")
    for name, column in columns.items():
        need(column in raw, f"no column {column!r}")
        raw = raw | {name: raw[column]}
    rule = raw.get("reward_model")
    gold = rule.get("ground_truth") if isinstance(rule, dict) else None
    raw = raw | gold if isinstance(gold, dict) and "target" in gold else raw  # TinyZero's files
    otherwise = "countdown" if "target" in raw and "countdown" in wanted else wanted[0]
    task = str(raw.get("task", raw.get("ability", otherwise))).lower()
    need(task in wanted, f"task {task} not asked for" if task.isidentifier() else "task not asked for")
    row = {"task": task, "source": str(raw.get("data_source") or task), "id": f"{task}-{split}-{number}"}

    if task == "countdown":
        numbers, target = raw.get("numbers", raw.get("nums")), raw.get("target")
        need(numbers is not None and target is not None, "no numbers or no target")
        whole = isinstance(numbers, list) and numbers and all(type(n) is int for n in [*numbers, target])
        need(whole, "numbers or target of the wrong type")
        answer = {"numbers": numbers, "target": target}
        return row | {"prompt": ask_countdown(numbers, target, source.template), "answer": answer, "asked": str(answer)}

    messages = next((raw[name] for name in PROMPTS if raw.get(name) is not None), None)
    need(messages is not None, "no prompt")
    messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    need(isinstance(messages, list) and all(isinstance(m, dict) for m in messages), "prompt neither text nor messages")
    texts = [m.get(key) for m in messages for key in ("role", "content")]
    need(all(isinstance(text, str) for text in texts), "prompt neither text nor messages")
    need(messages and texts[-2] == "user" and texts[-1].strip(), "no question in the prompt")
    if gold is None:
        gold = raw if "inputs" in raw else next((raw[name] for name in ANSWERS if raw.get(name) is not None), None)
    answer = (math_answer if task == "math" else code_answer)(gold)
    spoken = [m for m in messages if m["role"] != "system"]
    asked = "\n".join(m["content"] for m in spoken)
    if source.system_prompt != "keep":
        messages = spoken
    if source.system_prompt not in ("keep", "drop"):
        messages = [{"role": "system", "content": source.system_prompt}, *messages]
    json.dumps([messages, answer], ensure_ascii=False).encode()  # UnicodeError: half of a pair, from a JSON escape
    return row | {"prompt": ask(messages, task, source.template), "answer": answer, "asked": asked}


def prepare(table, indices: list[int], reader, tokenizer, limit: int) -> dict[str, list]:
    """Of a batch of rows: what they are and their ids, or why they are left out."""
    out, prompts = [], []
    for i, index in enumerate(indices):
        raw, row, why = {}, {}, ""
        try:
            raw = {name: table[name][i].as_py() for name in table.column_names}
            row = reader(raw, index + 1)
        except (UnicodeError, BadRow) as error:
            why = str(error) if isinstance(error, BadRow) else "not UTF-8"
        where, task = " ".join(str(raw.get("data_source") or row.get("source", "")).split())[:26], row.get("task", "")
        asked = hashlib.sha256(" ".join(row.get("asked", "").split()).encode()).digest()[:8]  # spaces aside
        out.append({"source": where, "task": task, "dropped": why, "asked": int.from_bytes(asked, signed=True)})
        out[-1]["math"] = row["answer"] if task == "math" else ""
        prompts.append(row.get("prompt", ""))
    for row, ids in zip(out, encode(prompts, tokenizer)):
        row["dropped"] = row["dropped"] or (f"prompt over {limit} tokens" if len(ids) > limit else "")
        row["ids"] = [] if row["dropped"] else ids
    return {name: [row[name] for row in out] for name in out[0]}


class Rows(Sequence):
    """Rows of one file or several, read when asked for: tests of programs come to gigabytes and stay on disk."""
    def __init__(self, table, prepared, reader, chosen: list[int]):
        self.table, self.prepared, self.reader, self.chosen = table, prepared, reader, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i):
        index = self.chosen[i]
        return self.reader(self.table[index], index + 1) | {"ids": self.prepared[index]["ids"]}


def open_tables(path: str, options: dict[str, str], progress: bool) -> dict:
    """{"train": table, perhaps "test": table} of a file, a folder of files or a hub id, with the rows on disk."""
    import datasets

    (datasets.enable_progress_bars if progress else datasets.disable_progress_bars)()
    where, tables = Path(path).expanduser(), {}
    files = {"train": [where]} if where.suffix in FILES else {}
    if where.is_dir():
        found = [p for p in sorted(where.rglob("[!.]*")) if p.suffix in FILES and p.is_file()]
        names = dict.fromkeys(["train", *HELD_OUT, *options.values()])
        files = {name: [p for p in found if p.name.startswith(name)] for name in names}
    if Path(options.get("test", "")).suffix in FILES:
        files[options["test"]] = [Path(options["test"]).expanduser()]
    try:
        for split, found in files.items():
            for where in found:
                kind = FILES.get(where.suffix, "text")
                more = {"encoding_errors": "replace"} if kind == "text" else {}
                part = datasets.load_dataset(kind, data_files=glob.escape(str(where)), split="train", **more)
                tables[split] = datasets.concatenate_datasets([tables[split], part]) if split in tables else part
        if "train" not in files:
            config = options.get("config", "main" if path == "openai/gsm8k" else None)
            tables |= dict(datasets.load_dataset(path, config))
    except Exception as error:  # the libraries below raise a dozen kinds
        raise ValueError(f"data={path!r}: no file here, no hub id in reach, or {where} is damaged: {error}") from error
    train, found = options.get("train", "train"), [name for name in HELD_OUT if name in tables]
    test = options.get("test") or next((name for name in found if name != train), None)
    for name in {train, test} - {None, *tables}:
        raise ValueError(f"data={path!r} has {sorted(tables)}, no {name!r}: say which, {path}:train=...,test=...")
    return {"train": tables[train]} | ({"test": tables[test]} if test else {})


def prepare_table(table, reader, tokenizer, limit: int, key: str, progress: bool):
    """What `prepare` makes of a table, and the math answers that the verifier cannot read; made once a machine."""
    import datasets
    from filelock import FileLock

    code = [Path(__file__).with_name(name).read_text() for name in ("data.py", "rewards.py", "equality.py")]
    made = [tokenizer.backend_tokenizer.to_str(), f"{tokenizer.chat_template} {tokenizer.special_tokens_map}"]
    name = hashlib.sha256("\n".join([table._fingerprint, key, *made, *code]).encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE, f"ppo-{name}")
    folder.mkdir(parents=True, exist_ok=True)
    verdicts, cores = folder / "unreadable.json", min(32, len(os.sched_getaffinity(0)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # processes are enough; forks of threads are trouble
    with FileLock(folder / "lock"):
        prepared = table.with_format("arrow").map(
            partial(prepare, reader=reader, tokenizer=tokenizer, limit=limit), with_indices=True, batched=True,
            batch_size=256, remove_columns=table.column_names, new_fingerprint=name, desc="filtering",
            cache_file_name=str(folder / "rows.arrow"), num_proc=cores if len(table) > 5000 else None,
        ).with_format(None)  # fmt: skip
        if not verdicts.exists():
            answers = {a for a, why in zip(prepared["math"], prepared["dropped"]) if a and not why}
            answers = sorted(a for a in answers if not re.fullmatch(r"-?\d{1,30}", a))
            program = [sys.executable, Path(__file__).with_name("rewards.py"), "readable", *["--progress"] * progress]
            given = {"env": os.environ | {"LOCAL_WORLD_SIZE": "1"}, "input": json.dumps(answers).encode()}  # all cores
            said = subprocess.run(program, stdout=subprocess.PIPE, check=True, **given).stdout if answers else "[]"
            bad = [answer for answer, ok in zip(answers, json.loads(said)) if not ok]
            verdicts.with_suffix(".new").write_text(json.dumps(bad))
            verdicts.with_suffix(".new").rename(verdicts)
    return prepared, set(json.loads(verdicts.read_text()))


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

    def rows(self, task: str) -> Rows:
        chosen = [i for i, (t, why) in enumerate(zip(self.tasks, self.dropped)) if t == task and not why]
        return Rows(self.table, self.prepared, self.reader, chosen)

    def report(self) -> str:
        """Rows, kept and dropped, of every data_source; and how many for which reason, with the first of them."""
        counts, first = {}, {}
        for i, (where, why) in enumerate(zip(self.prepared["source"], self.dropped)):
            counts.setdefault(where, Counter())[why] += 1
            first.setdefault((where, why), i + 1)
        lines = [f"{self.path}, {self.name}:".ljust(28) + "      rows      kept   dropped"]
        for where, count in sorted(counts.items()):
            total, kept = count.total(), count.pop("", 0)
            lines.append(f"  {where:26s}{total:10,d}{kept:10,d}{total - kept:10,d}")
            lines += [f"    {n:,} {why} (first: row {first[where, why]:,})" for why, n in count.most_common()]
        return "\n".join(lines[:200] + ["  ..."] * (len(lines) > 200))  # data_source may differ in every row


def mixture(text: str) -> dict[str, Fraction | None]:
    """{task: weight} of "math:0.8,code:0.2", or of "math,code"."""
    found: dict[str, Fraction | None] = {}
    for part in text.split(","):
        name, colon, weight = part.rpartition(":")
        name, weight = (name, weight) if colon and name != "rg" else (part, None)
        if name not in TASKS and name not in DEFAULT and not re.fullmatch("rg:.+", name) or name in found:
            why = f"use each once: {', '.join(TASKS | DEFAULT)}, rg:NAME; a new one goes into TASKS in data.py"
            raise ValueError(f"task={text!r}: {name!r} is not known, or stands there twice: {why}")
        number = re.fullmatch(r"\d+(?:\.\d*)?|\.\d+|\d+/0*[1-9]\d*", weight or "1")
        found[name] = weight and Fraction(weight if number else 0)
    if len({weight is None for weight in found.values()}) > 1 or 0 in found.values():
        raise ValueError(f"task={text!r}: give every task a weight above 0, as in math:0.8,code:0.2, or none")
    return found


def open_source(place: str, wanted: list[str], source: Source, tokenizer, progress: bool) -> list[Split]:
    """The splits of "PATH:key=value,...", prepared."""
    path, keys = re.fullmatch(r"(.*?)(?::(\w+=[^,=]+(?:,\w+=[^,=]+)*))?", place).groups()
    options = dict(part.split("=") for part in keys.split(",")) if keys else {}
    columns = {name: options.pop(name) for name in ("prompt", "answer") if name in options}
    if set(options) - {"train", "test", "config"}:
        raise ValueError(f"data={place!r}: after the colon come prompt=, answer=, train=, test=, config=")
    splits = []
    for name, table in open_tables(path, options, progress).items():
        reader = partial(read, split=name, wanted=wanted, columns=columns, source=source)
        key = f"{wanted} {columns} {source.template} {source.system_prompt} {source.max_prompt_tokens} {name}"
        prepared, bad = prepare_table(table, reader, tokenizer, source.max_prompt_tokens, key, progress)
        why = "answer that cannot be read by the verifier"
        dropped = [w or (why if answer in bad else "") for w, answer in zip(prepared["dropped"], prepared["math"])]
        splits.append(Split(path, name, table, prepared, reader, prepared["task"][:], prepared["asked"][:], dropped))
    if len(splits) == 1:
        splits.append(hold_out(splits[0]))
    return splits


def hold_out(train: Split) -> Split:
    """A test split for a source without one, always the same: TinyZero's, or the questions of one hash in fifty."""
    rows, out, unused = range(len(train.asked)), set(), range(0)
    if len(rows) >= sum(TINYZERO) and "countdown" in train.tasks:
        out, unused = rows[TINYZERO[0] : sum(TINYZERO)], rows[sum(TINYZERO) :]
    for task in set(train.tasks) if not unused else ():
        asked = {train.asked[i]: i for i in rows if train.tasks[i] == task and not train.dropped[i]}
        chosen = {hash for hash in asked if hash % 50 == 0} or {min(asked, default=0)}
        out |= {i for i in rows if train.tasks[i] == task and train.asked[i] in chosen}
    test = train._replace(name="test", dropped=[train.dropped[i] or ("" if i in out else "for training") for i in rows])
    for i in rows:
        train.dropped[i] = train.dropped[i] or ("held out" if i in out else "spare" if i in unused else "")
    return test


def open_sources(names: list[str], source: Source, tokenizer, progress: bool) -> list[tuple[list[str], list[Split]]]:
    """[(tasks, [train, test])] of the sources in files; no training row asks what any test row asks."""
    readers = [name for name in names if name in DEFAULT]
    if len(source.data) not in (0, 1, len(readers)) or source.data and not readers:
        text = f"data={list(source.data)} for task={source.task}: give one source, or one for each"
        raise ValueError(f"{text} of the {len(readers)} tasks that read files: {', '.join(readers)}")
    given = source.data * len(readers) if len(source.data) == 1 else source.data or map(DEFAULT.get, readers)
    pairs = [(name, place) for name, place in zip(readers, given) if place]  # without a place: made by rule
    places = {place: [n for n, p in pairs if p == place] for _, place in pairs}
    if pairs and not tokenizer:
        raise ValueError(f"task={source.task!r}: rows of files are counted in tokens: say whose, --model DIR")
    if tokenizer and source.template not in ["base"] + ["chat"] * (tokenizer.chat_template is not None):
        what = f"template={source.template!r}, and {tokenizer.name_or_path!r} has"
        raise ValueError(f"{what} {'no' if tokenizer.chat_template is None else 'a'} chat template: use base or chat")
    opened = [(wanted, open_source(place, wanted, source, tokenizer, progress)) for place, wanted in places.items()]
    seen = {asked for _, (_, test) in opened for asked, why in zip(test.asked, test.dropped) if not why}
    for _, (train, _) in opened:
        both = zip(train.asked, train.dropped)
        train.dropped[:] = [why or ("also in the test split" if asked in seen else "") for asked, why in both]
    for (wanted, splits), place in zip(opened, places):
        for task, split in ((task, split) for task in wanted for split in splits if not len(split.rows(task))):
            fix = f"columns can be named: --data {split.path}:prompt=COLUMN,answer=COLUMN"
            what = f"data={place!r} has no row for task={task}, {split.name}; its first row is {split.table[:1]}"
            raise ValueError(f"{what:.500}; {fix}\n{split.report()}")
    return opened


def load(source: Source, tokenizer, seed: int = 0, eval_rows: int = 256, progress: bool = False) -> Data:
    """All rows of a run, each with its "ids" if there is a tokenizer. ValueError: flags and files do not fit."""
    weights, train, test = mixture(source.task), {}, {}
    opened = open_sources(list(weights), source, tokenizer, progress)
    for name, splits in ((name, splits) for wanted, splits in opened for name in wanted):
        train[name], held = splits[0].rows(name), splits[1].rows(name)
        test[name] = [held[i] for i in sorted(random.Random(0).sample(range(len(held)), min(eval_rows, len(held))))]
    for name in weights.keys() - train.keys():
        make = partial(gym, name[3:]) if name.startswith("rg:") else TASKS[name]
        train[name], test[name] = make("train", seed, source.template), make("test", seed, source.template)[:eval_rows]
        for row in train[name] + test[name] if tokenizer else ():
            (row["ids"],) = encode([row["prompt"]], tokenizer)
            if not 0 < len(row["ids"]) <= source.max_prompt_tokens:
                limits = f"allowed are 1 to max_prompt_tokens={source.max_prompt_tokens}: raise --max_prompt_tokens"
                raise ValueError(f"row {row['id']}: its prompt has {len(row['ids'])} tokens, {limits}")
    known = {name: Fraction(weight or len(train[name])) for name, weight in weights.items()}
    report = "\n".join(split.report() for _, splits in opened for split in splits)
    return Data({n: train[n] for n in weights}, {n: test[n] for n in weights}, known, report)


# ------------------------------------------------------------------------------------------------- the order of rows


@lru_cache(maxsize=16)
def order(count: int, epoch: int, seed: int) -> list[int]:
    places = list(range(count))
    random.Random(f"epoch {epoch} {seed}").shuffle(places)
    return places


def drawn(total: int, weights: dict[str, Fraction]) -> dict[str, int]:
    """How many of a run's first `total` rows come from each task: its share, to within the number of tasks."""
    shares = {name: Fraction(w) for name, w in weights.items()}
    out, left, weight = {}, total, sum(shares.values())
    for name, w in shares.items():
        out[name] = int(left * w / weight)
        left, weight = left - out[name], weight - w
    return out


def batch(rows: dict[str, Sequence], step: int, size: int, seed=0, weights: dict | None = None) -> list[dict]:
    """Batch `step` (0, 1, ...) of `size` rows, from each task by its weight; by default a task has that of its rows.
    Every row of a task comes once an epoch of that task; each epoch has its own order."""
    weights = weights or {name: len(rows[name]) for name in rows}
    before, after = drawn(step * size, weights), drawn((step + 1) * size, weights)
    tasks = [name for name in rows for _ in range(after[name] - before[name])]
    random.Random(f"mix {step} {seed}").shuffle(tasks)
    out, place = [], dict(before)
    for name in tasks:
        epoch, k = divmod(place[name], len(rows[name]))
        out.append(rows[name][order(len(rows[name]), epoch, seed)[k]])
        place[name] += 1
    return out


# ------------------------------------------------------------------------------------------- token-budget micro-batches


def cost(length: int, quadratic: float = 1 / 8192) -> float:
    """Relative cost of one sequence in a forward pass: the matmuls grow with L, attention with L^2. The default makes
    both equal at 8,192 tokens, about right for a 1.5B model (12 D^2 against 2 L D a layer and token, D = 1536)."""
    return length + quadratic * length * length


def plan_microbatches(lengths: list[int], budget: int, ranks: int = 1) -> list[list[list[int]]]:
    """plan[rank][k] = indices (into `lengths`) of the sequences that rank runs as its micro-batch k, at most `budget`
    tokens. Every rank gets as many of them (FSDP hangs otherwise; some may be empty), as few as first-fit-decreasing
    finds. Ranks wait for each other in every one: the k-th micro-batches of all ranks, a round, cost about the same."""
    if (longest := max(lengths, default=0)) > budget:
        raise ValueError(f"a sequence of {longest} tokens does not fit {budget}: raise --max_tokens_per_microbatch")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins, room = [[] for _ in lengths], [budget] * len(lengths)  # first fit, longest first
    for i in order:
        k = next(k for k, free in enumerate(room) if free >= lengths[i])
        bins[k].append(i)
        room[k] -= lengths[i]
    bins = [bin for bin in bins if bin]
    rounds = max(1, -(-len(bins) // ranks))
    even: list[list[int]] = [[] for _ in range(rounds * ranks)]  # as many rounds, filled again to wait as little
    room, load, slowest, begun = [budget] * len(even), [0.0] * len(even), [0.0] * rounds, 0
    for i in order:
        work = cost(lengths[i])  # where it fits: the bin that makes its round last the least longer, then the emptiest
        fits = [k for k, free in enumerate(room[: (begun + 1) * ranks]) if free >= lengths[i]]  # later rounds: as empty
        if not fits:
            even = bins + [[] for _ in range(len(even) - len(bins))]
            break
        _, _, k = min((max(0.0, load[k] + work - slowest[k // ranks]), load[k], k) for k in fits)
        even[k].append(i)
        room[k] -= lengths[i]
        load[k] += work
        slowest[k // ranks], begun = max(slowest[k // ranks], load[k]), max(begun, k // ranks + 1)

    even.sort(key=lambda bin: -sum(cost(lengths[i]) for i in bin))  # each round: the `ranks` dearest that are left,
    deal = [even[k * ranks : (k + 1) * ranks][:: (-1) ** k] for k in range(rounds)]  # dealt to and fro
    return [list(rank) for rank in zip(*deal)]


def plan_summary(lengths: list[int], budget: int, ranks: int = 1) -> dict[str, float]:
    """How full the micro-batches of a plan are, and how much longer than the mean of all ranks' costs a pass takes, as
    every micro-batch lasts as long as the slowest rank's."""
    plan = plan_microbatches(lengths, budget, ranks)
    load = [[sum(cost(lengths[i]) for i in microbatch) for microbatch in rank] for rank in plan]
    fill, waiting = sum(lengths) / (budget * len(plan[0]) * ranks), sum(map(max, zip(*load))) / sum(map(sum, load))
    return {"perf/microbatches": len(plan[0]), "perf/pack_fill": fill, "perf/rank_imbalance": waiting * ranks - 1}


# ------------------------------------------------------------------------------------------------------ python data.py


def look(source: Source = Source(",".join(TASKS)), show: int = 3, model: str = "", out: str = "") -> None:
    """What is kept of files and left out, and the first `show` rows of each task as a run would feed them. `model`: a
    folder whose tokenizer applies the template and counts; rows made by rule are shown without, too. OUT gets the rows
    of files that are kept, in the published schema, as train.parquet and validation.parquet, for --data OUT."""
    tokenizer = None
    if model:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
    if out:
        Path(out).mkdir(parents=True)
        opened = open_sources(list(mixture(source.task)), source, tokenizer, True)
        if len(opened) != 1:
            raise ValueError(f"out={out!r}: what is left of one source is written there, and these are {len(opened)}")
        for split, name in zip(opened[0][1], ("train", "validation")):
            kept = [i for i, why in enumerate(split.dropped) if not why]
            split.table.select(kept).to_parquet(Path(out, f"{name}.parquet"))
    found = load(source, tokenizer, progress=True)
    if found.report:
        print(found.report + "\n")
    for row in (rows[i] for rows in found.train.values() for i in range(min(show, len(rows)))):
        text, count = (tokenizer.decode(row["ids"]), len(row["ids"])) if tokenizer else (row["prompt"], "uncounted")
        print(f"{row['id']} ({row['task']}, {count} tokens), answer {json.dumps(row['answer']):.300}\n{text}\n")


if __name__ == "__main__":
    import tyro

    del sys.path[0]  # this folder's kernels.py has the name of a package that transformers looks for
    r1 = "--task math,code --template chat --show 0 --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B".split()
    args = r1 + sys.argv[2:] if sys.argv[1:2] == ["eurus"] else sys.argv[1:]  # eurus: those of the reference run
    try:
        tyro.cli(look, args=args, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True)
    except ValueError as error:
        sys.exit(f"data.py: {error}")
