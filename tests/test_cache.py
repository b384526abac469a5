"""What is kept on disk: the cache of loaded files, four processes at once, memory, and python data.py eurus."""

import json
import os
import random
import re
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
