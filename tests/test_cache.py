"""What is kept on disk: the cache of loaded files, four processes at once, memory, and python data.py eurus."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fixtures
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


def test_the_second_load_is_fast_and_equal(tmp_path, tok):
    """Guards a cache that is never found again, or that holds something else than what was found."""
    write_parquet(
        tmp_path / "train.parquet",
        [eurus(n, "math", f"x+{n}", "word " * 50) for n in range(100, 400)],
    )
    write_parquet(tmp_path / "test.parquet", [eurus(1, "math", "4")])
    source, seconds, made = data.Source(task="math", data=(str(tmp_path),), template="chat"), [], []
    for _ in range(4):
        began = time.perf_counter()
        made.append(data.load(source, tok))
        seconds.append(time.perf_counter() - began)
    assert plain(made[0]) == plain(made[1]) and len(made[0].train["math"]) == 300
    assert min(seconds[1:]) < max(0.3, seconds[0] / 3), seconds


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


SCRIPT = """
import hashlib, json, sys
from transformers import AutoTokenizer  # before our kernels.py can be found
sys.path.insert(0, {root!r})
import data, datasets
tok = AutoTokenizer.from_pretrained(sys.argv[1])
def memory():
    lines = [line.split() for line in open("/proc/self/status") if line.startswith(("RssAnon", "VmHWM"))]
    return {{words[0][:-1]: int(words[1]) // 1024 for words in lines}}
before = memory()
loaded = data.load(data.Source(task="math,code", data=(sys.argv[2],), template="chat"), tok)
after, digest, tests, count = memory(), hashlib.sha256(), 0, 0
for split in loaded[:2]:
    for task, rows in sorted(split.items()):
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True).encode())
            tests, count = tests + len(str(row["answer"])), count + 1
digest.update(loaded.report.encode())
made = {{"before": before, "after": after, "read": memory(), "tests": tests, "rows": count}}
print(json.dumps(made | {{"digest": digest.hexdigest()}}))
"""


def start(folder: Path, where: Path, cache: Path, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT.format(root=str(ROOT)), str(folder), str(where)]
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache)}
    options |= {"cwd": folder, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **options)


def result(process: subprocess.Popen) -> dict:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3_000:]
    return json.loads(out.splitlines()[-1])


def test_ranks_load_at_once(tmp_path, folder):
    """Guards ranks that write the same cache file together: one reads half of it, or all wait for ever."""
    rows = [
        eurus(n, *(("code", fixtures.GOOD_TESTS[n % 3]) if n % 5 == 0 else ("math", f"{n}/7")))
        for n in range(600)
    ]
    write_parquet(tmp_path / "train.parquet", rows[40:] + [eurus(9_999, "math", "")])
    write_parquet(tmp_path / "test.parquet", rows[:40])
    ranks = [start(folder, tmp_path, tmp_path / "cache") for _ in range(3)]
    digests = {result(rank)["digest"] for rank in ranks}
    assert (
        len(digests) == 1
        and result(start(folder, tmp_path, tmp_path / "cache"))["digest"] in digests
    )


def test_a_load_that_was_killed(tmp_path, folder):
    """Guards a lock that nobody opens again, and half a file that is taken for a whole one."""
    programs = [eurus(n, "code", fixtures.GOOD_TESTS[0]) for n in range(10)]
    formulas = [eurus(n, "math", f"x+{n % 300}", "word " * 99) for n in range(10, 6_010)]
    write_parquet(tmp_path / "train.parquet", programs[1:] + formulas[1:])
    write_parquet(tmp_path / "test.parquet", programs[:1] + formulas[:1])
    for wait in (0.0, 1.0):
        killed = start(folder, tmp_path, tmp_path / "cache", start_new_session=True)
        while killed.poll() is None and not list((tmp_path / "cache").glob("*/*")):
            time.sleep(0.02)
        time.sleep(wait)
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
        assert killed.returncode == -signal.SIGKILL
    assert result(start(folder, tmp_path, tmp_path / "cache"))["rows"] == 6_010


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
    made = result(start(folder, tmp_path, tmp_path / "cache"))
    grown = [made[when]["RssAnon"] - made["before"]["RssAnon"] for when in ("after", "read")]
    assert made["tests"] > 300e6 and max(grown) < 150, made


def shape(rows) -> list:
    return sorted(
        (mark(row), row["prompt"], row["answer"], row["source"], row["ids"]) for row in rows
    )


@pytest.mark.parametrize("template", ["base", "chat"])
def test_the_command_writes_what_was_kept(tmp_path, folder, tok, template):
    """Guards a filtered copy with other rows, other columns, or rows that the next load drops."""
    fixtures.eurus_folder(tmp_path / "in")
    command = [
        sys.executable,
        str(ROOT / "data.py"),
        "eurus",
        "--out",
        str(tmp_path / "out"),
        "--template",
        template,
    ]
    command += [
        "--data",
        str(tmp_path / "in"),
        "--model",
        str(folder),
        "--max_prompt_tokens",
        "1000",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3_000:]
    assert re.search(UTF8, done.stdout) and "taco" in done.stdout
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
    rows = generated(tok)
    chat = generated(tok, template="chat")
    other = generated(fixtures.tokenizer(tmp_path / "other", first=5))
    assert rows[0] != other[0] and rows[0] != chat[0] and len(rows[0]["countdown3"]) == 10_000
    for seed in (0, 1):
        assert len(data.countdown("train", seed, "base", train=20)) == 20
    kept = sorted((tmp_path / "cache").glob("*.json"))
    assert len(kept) == 2 + 3 + 2  # problems of two splits, ids three times, problems of two seeds

    def fail(*_):
        raise AssertionError("made again")

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


GENERATED = """
import hashlib, json, sys
from transformers import AutoTokenizer  # before our kernels.py can be found
sys.path.insert(0, {root!r})
import data
loaded = data.load(data.Source(task="countdown3"), AutoTokenizer.from_pretrained(sys.argv[1]))
print(json.dumps({{"digest": hashlib.sha256(json.dumps(loaded[:2]).encode()).hexdigest()}}))
"""


def test_ranks_generate_at_once(tmp_path, folder, monkeypatch):
    """Guards ranks that write the same file together, and one that reads half of it."""
    monkeypatch.setattr(sys.modules[__name__], "SCRIPT", GENERATED)
    ranks = [start(folder, tmp_path, tmp_path / "cache") for _ in range(3)]
    assert len({result(rank)["digest"] for rank in ranks}) == 1
    assert {file.suffix for file in (tmp_path / "cache").iterdir()} <= {".json", ".lock"}


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
