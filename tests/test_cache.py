"""What is kept on disk: the cache of loaded files, three processes at once, memory, and python data.py eurus."""

import json
import random
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import fixtures
import launch
import pyarrow.parquet as pq
import pytest
from fixtures import UTF8, eurus, mark
from fixtures import parquet as write_parquet
from fixtures import tests as code_tests
from test_sources import account, load, marks

import data

ROOT = Path(__file__).resolve().parent.parent


def plain(loaded) -> list:
    """All of it, to compare."""
    splits = [
        {task: [dict(row) for row in rows] for task, rows in split.items()} for split in loaded[:2]
    ]
    return [*splits, loaded.weights, loaded.report]


def fail(*_, **__):
    raise AssertionError("made again")


def test_the_second_load_is_equal_and_makes_nothing(tmp_path, tok, monkeypatch):
    """Guards a cache that is never found again, or that holds something else than what was found."""
    rows = [eurus(n, "math", f"x+{n}" if n < 110 else f"{n}") for n in range(100, 400)]
    write_parquet(tmp_path / "train.parquet", rows)
    write_parquet(tmp_path / "test.parquet", [eurus(1, "math", "4")])
    source = data.Source(task="math", data=(str(tmp_path),), template="chat")
    first = data.load(source, tok)
    for name in ("prepare", "ask_verifier"):
        monkeypatch.setattr(data, name, fail)
    assert plain(data.load(source, tok)) == plain(first) and len(first.train["math"]) == 300
    write_parquet(tmp_path / "train.parquet", rows[1:])
    with pytest.raises(AssertionError, match="made again"):
        data.load(source, tok)


def test_the_cache_is_never_stale(tmp_path, tok):
    """Guards rows of yesterday: another template, limit, system prompt, tokenizer or file, under the same names."""
    file, held = tmp_path / "train.parquet", tmp_path / "test.parquet"
    write_parquet(file, [eurus(n, "math", "40", "x" * n) for n in range(10, 40)])
    write_parquet(held, [eurus(1, "math", "4", "x")])
    first = plain(load(tok, tmp_path))
    limit = len(first[0]["math"][9]["ids"])
    different = [{"template": "base"}, {"system_prompt": "keep"}, {"system_prompt": "Hm."}]
    for options in (*different, {"max_prompt_tokens": limit}):
        assert plain(load(tok, tmp_path, **options))[0] != first[0], options
    assert plain(load(tok, tmp_path)) == first
    for n, changes in enumerate(
        ({"template": fixtures.QWEN.replace("assistant", "Assistant")}, {"first": 5})
    ):
        other = fixtures.tokenizer(tmp_path / f"tokenizer {n}", **changes)
        assert plain(load(other, tmp_path))[0] != first[0]  # and load() compares the ids
    for token in fixtures.SPECIAL:
        other = fixtures.tokenizer(tmp_path / token, "{{ bos_token }}" + fixtures.QWEN)
        other.bos_token = token  # stands in no other file than the tokenizer's settings
        load(other, tmp_path)
    size = file.stat().st_size
    write_parquet(file, [eurus(n, "math", "50", "x" * n) for n in range(10, 40)])
    assert {row["answer"] for row in load(tok, tmp_path).train["math"]} == {
        "50"
    } and file.stat().st_size == size
    write_parquet(held, [eurus(2, "math", "4")])
    assert marks(load(tok, tmp_path).test["math"]) == [2]
    file.rename(tmp_path / "train-1.parquet")
    write_parquet(tmp_path / "train-2.parquet", [eurus(n, "math", "60", "x" * n) for n in (70, 71)])
    assert len(load(tok, tmp_path).train["math"]) == 32


# one rank: loads files and generated rows, and says what it has found and what memory that took
SCRIPT = """
import functools, hashlib, json, sys
from transformers import AutoTokenizer  # before our kernels.py can be found
sys.path.insert(0, {root!r})
import data, datasets
tokenizer, where, task = sys.argv[1:]
data.TASKS["countdown3"] = functools.partial(data.TASKS["countdown3"], train=300)
tok = AutoTokenizer.from_pretrained(tokenizer)
def memory():
    lines = [line.split() for line in open("/proc/self/status") if line.startswith("RssAnon")]
    return int(lines[0][1]) // 1024
before = memory()
loaded = data.load(data.Source(task=task, data=(where,), template="chat"), tok)
made = data.load(data.Source(task="countdown3"), tok)
after, digest, tests, count = memory(), hashlib.sha256(), 0, 0
for split in [*loaded[:2], *made[:2]]:
    for name, rows in sorted(split.items()):
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True).encode())
            tests, count = tests + len(str(row["answer"])), count + (name != "countdown3")
digest.update(loaded.report.encode())
grown = max(after, memory()) - before
print(json.dumps({{"grown": grown, "tests": tests, "rows": count, "digest": digest.hexdigest()}}))
"""


def start(folder: Path, where: Path, task: str = "math,code") -> launch.Job:
    (where / "rank.py").write_text(SCRIPT.format(root=str(ROOT)))
    environment = {"HF_DATASETS_CACHE": str(where / "cache")}
    return launch.start(where / "rank.py", folder, where, task, env=environment)


def result(job: launch.Job) -> dict:
    return json.loads(job.wait().good().said.splitlines()[-1])


def test_ranks_load_at_once(tmp_path, folder):
    """Guards ranks that write the same cache file together, of read rows or of generated ones: one reads half of it, or
    all wait for ever."""
    rows = []
    for n in range(600):
        if n % 5 == 0:
            rows.append(eurus(n, "code", fixtures.GOOD_TESTS[n % 3]))
        else:
            rows.append(eurus(n, "math", f"{n}/7" if n % 50 == 1 else f"{n}"))
    write_parquet(tmp_path / "train.parquet", rows[40:] + [eurus(9_999, "math", "")])
    write_parquet(tmp_path / "test.parquet", rows[:40])
    ranks = [start(folder, tmp_path) for _ in range(3)]
    (digest,) = {result(rank)["digest"] for rank in ranks}
    assert result(start(folder, tmp_path))["digest"] == digest
    kept = {file.suffix for file in (tmp_path / "cache").glob("*.*")}
    assert kept == {".json", ".lock"}


@pytest.mark.full
def test_a_load_that_was_killed(tmp_path, folder):
    """Guards a lock that nobody opens again, and half a file that is taken for a whole one."""
    programs = [eurus(n, "code", fixtures.GOOD_TESTS[0]) for n in range(10)]
    formulas = [eurus(n, "math", f"x+{n % 300}", "word " * 99) for n in range(10, 6_010)]
    write_parquet(tmp_path / "train.parquet", programs[1:] + formulas[1:])
    write_parquet(tmp_path / "test.parquet", programs[:1] + formulas[:1])
    for wait in (0.0, 1.0):
        killed = start(folder, tmp_path)
        while killed.process.exitcode is None and not list((tmp_path / "cache").glob("*/*")):
            time.sleep(0.02)
        time.sleep(wait)
        killed.kill()
        assert killed.process.exitcode == -signal.SIGKILL
    assert result(start(folder, tmp_path))["rows"] == 6_010


@pytest.mark.full
def test_unit_tests_stay_on_disk(tmp_path, folder):
    """Guards every rank of a node holding every unit test in memory: 1.7 GB each for Eurus-2-RL-Data."""
    pieces = [random.Random(n).randbytes(500_000).hex() for n in range(4)]
    rows = [eurus(n, "code", code_tests([pieces[n % 4] + str(n)], [f"{n}"])) for n in range(300)]
    rows += [eurus(n, "math", "4") for n in range(300, 320)]
    write_parquet(
        tmp_path / "train.parquet",
        rows,
        row_group_size=20,
        compression="none",
        use_dictionary=False,
    )
    write_parquet(
        tmp_path / "test.parquet",
        [eurus(901, "math", "4"), eurus(902, "code", fixtures.GOOD_TESTS[0])],
    )
    del rows
    made = result(start(folder, tmp_path))
    assert made["tests"] > 300e6 and made["grown"] < 150, made


def shape(rows) -> list:
    return sorted(
        (mark(row), row["prompt"], row["answer"], row["source"], row["ids"]) for row in rows
    )


@pytest.mark.parametrize("template", ["chat", pytest.param("base", marks=pytest.mark.full)])
def test_the_command_writes_what_was_kept(tmp_path, folder, tok, template):
    """Guards a filtered copy with other rows, other columns, or rows that the next load drops."""
    fixtures.eurus_folder(tmp_path / "in")
    flags = ["--out", tmp_path / "out", "--data", tmp_path / "in", "--template", template]
    flags += ["--model", folder, "--max_prompt_tokens", 1000]
    done = launch.run("data.py", "eurus", *flags).good()
    assert re.search(UTF8, done.said) and "taco" in done.said
    for name in ("train", "validation"):
        assert (
            pq.read_schema(tmp_path / "out" / f"{name}.parquet")
            .remove_metadata()
            .equals(fixtures.EURUS)
        )
    one, two = (
        load(tok, tmp_path / name, task="math,code", template=template) for name in ("in", "out")
    )
    assert all(
        shape(one[i][task]) == shape(two[i][task]) for i in (0, 1) for task in ("math", "code")
    )
    assert all(not reasons for *_, reasons in account(two)), two.report


def generated(tok, **options) -> list:
    return plain(data.load(data.Source(task="countdown3", **options), tok))


def test_generated_rows_are_made_once(tmp_path, tok, monkeypatch):
    """Guards seven seconds of CPU at every start on every rank, and remembered rows that differ, or that are taken for
    those of another seed, template or tokenizer."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    few = partial(data.TASKS["countdown3"], train=300)
    monkeypatch.setitem(data.TASKS, "countdown3", few)
    rows = generated(tok)
    chat = generated(tok, template="chat")
    other = generated(fixtures.tokenizer(tmp_path / "other", first=5))
    assert rows[0] != other[0] and rows[0] != chat[0] and len(rows[0]["countdown3"]) == 300
    for seed in (0, 1):
        assert len(data.countdown("train", seed, "base", train=20)) == 20
    kept = sorted((tmp_path / "cache").glob("*.json"))
    assert len(kept) == 2 + 3 + 2  # problems of two splits, ids three times, problems of two seeds

    with monkeypatch.context() as patch:
        patch.setattr(data, "encode", fail)
        patch.setattr(data, "random_value", fail)
        assert generated(tok) == rows and generated(tok, template="chat") == chat
        with pytest.raises(AssertionError, match="made again"):
            data.countdown("train", 2, "base", train=20)
    for file in kept:
        file.write_text(file.read_text()[:100])  # the machine stopped while it was written
    assert generated(tok) == rows
    monkeypatch.setenv("HF_DATASETS_CACHE", str(kept[0]))  # no folder, so that nothing can be kept
    assert generated(tok) == rows


def test_the_cache_is_where_that_of_datasets_is():
    """Guards a second cache: data.py says where it is without an import of datasets."""
    import datasets

    assert data.cache_folder() == Path(datasets.config.HF_DATASETS_CACHE)


def test_verdicts_outlive_edits_of_anything_but_the_verifier(tmp_path, tok, monkeypatch):
    """Guards minutes of asking again after an edit of rewards.py, and verdicts of another verifier."""
    write_parquet(tmp_path / "train.parquet", [eurus(n, "math", f"x+{n}") for n in range(20)])
    write_parquet(
        tmp_path / "test.parquet", [eurus(91, "math", r"\frac{1}{")] + [eurus(92, "math", "y")]
    )
    asked = []
    monkeypatch.setattr(data, "ask_verifier", lambda answers, progress: asked.append(answers) or [])
    for names in ("VERIFIER_FILES", "LIMIT_FILES"):
        copies = []
        for file in getattr(data, names):
            if file.exists():
                copies.append(Path(shutil.copy(file, tmp_path / f"{file.stem}.copy")))
        monkeypatch.setattr(data, names, tuple(copies))
    limits = "\n".join(file.read_text() for file in data.LIMIT_FILES)
    assert len(data.LIMITS.findall(limits)) == 2, (
        "a limit of the verifier has another name or place"
    )
    (verifier,) = data.VERIFIER_FILES
    load(tok, tmp_path)
    assert len(asked) == 2 and asked[1] == [r"\frac{1}{", "y"]

    def edit(file: Path, old: str, new: str) -> int:
        before = len(asked)
        text = file.read_text()
        file.write_text(text.replace(old, new))
        assert file.read_text() != text
        load(tok, tmp_path)
        return len(asked) - before

    rewards = next(file for file in data.LIMIT_FILES if "MATH_SECONDS = " in file.read_text())
    assert edit(rewards, "def ", "# a comment\ndef ") == 0
    assert edit(verifier, "def ", "# a comment\ndef ") == 2
    assert edit(rewards, "MATH_SECONDS = ", "MATH_SECONDS = 1 + ") == 2
    assert edit(rewards, "MATH_SECONDS = 1 + ", "MATH_SECONDS = ") == 0
    monkeypatch.setattr(data, "version", lambda name: f"{name} 99")
    load(tok, tmp_path)
    assert len(asked) == 8
