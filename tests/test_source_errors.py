"""Files that cannot be used and flags that make no sense: errors that say what was given and what to do."""

import os
from pathlib import Path

import fixtures
import pytest
from fixtures import eurus, line
from fixtures import jsonl as write_jsonl
from fixtures import parquet as write_parquet
from test_sources import load

import data


def spoil(path: Path, at: int, size: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at : at + size] = bytes(255 - b for b in raw[at : at + size])
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "problem",
    [
        "missing",
        "hub",
        "empty.jsonl",
        "empty.parquet",
        "no rows",
        "cut",
        "magic",
        "page",
        "text",
        "no files",
        "csv",
        "columns",
        "named column",
        "all bad",
        "one task lacks rows",
        "utf-16",
        "test file",
        "all held out",
        "shard",
    ],
)
def test_files_that_cannot_be_used(tmp_path, tok, problem):
    """Guards an exception of pyarrow or datasets without the name of the file, and training on nothing."""
    lines, rows, task, extra = (
        [line(n) for n in range(9)],
        [eurus(n, "math", "4") for n in range(300)],
        "math",
        (),
    )
    path, options = tmp_path / "rows.jsonl", {}
    if problem in ("cut", "magic", "page", "text", "no rows", "empty.parquet"):
        path = tmp_path / "rows.parquet"
        write_parquet(
            path, [] if problem == "no rows" else rows, compression="zstd", use_dictionary=False
        )
        size = path.stat().st_size
    else:
        write_jsonl(path, lines)
    if problem == "missing":
        path = tmp_path / "absent.parquet"
    elif problem == "hub":
        path = Path("nobody/nothing-at-all")
    elif problem in ("empty.jsonl", "empty.parquet"):
        path.write_bytes(b"")
    elif problem == "cut":
        os.truncate(path, size // 2)
    elif problem == "magic":
        spoil(path, size - 40, 40)
    elif problem == "page":
        spoil(path, 60, 400)
    elif problem == "text":
        path.write_text("data_source,prompt\n")
    elif problem == "no files":
        path = tmp_path / "folder"
        write_jsonl(path / "notes.txt", lines)
    elif problem == "csv":
        path = path.rename(tmp_path / "rows.csv")
    elif problem == "columns":
        write_jsonl(path, [{"foo": "a", "bar": "b"}] * 3)
        extra = ("foo", "bar", "answer")
    elif problem == "named column":
        options, extra = {"answer_column": ("gold",)}, ("gold", "--answer_column")
    elif problem == "all bad":
        write_jsonl(path, [line(1, answer=""), line(2, answer=None), b"nothing"])
        extra = ("no answer",)
    elif problem == "one task lacks rows":
        path, task, extra = (
            Path(write_parquet(tmp_path / "e.parquet", rows[:9])),
            "math,code",
            ("code",),
        )
    elif problem == "utf-16":
        path.write_bytes(path.read_text().encode("utf-16"))
    elif problem == "test file":
        options, extra = {"test_split": (f"{tmp_path}/lost.jsonl",)}, ("lost.jsonl",)
    elif problem == "shard":
        path = tmp_path / "folder"
        write_parquet(path / "train-0.parquet", rows[:9])
        spoil(Path(write_parquet(path / "train-1.parquet", rows[9:99])), 0, 9_999)
        write_parquet(path / "test.parquet", rows[99:])
        extra = ("train-1.parquet",)
    elif problem == "all held out":
        options, extra = {"test_split": (str(path),)}, ("also",)
    with pytest.raises(ValueError) as caught:
        data.load(data.Source(task=task, data=(str(path),), template="chat", **options), tok)
    assert all(word in str(caught.value) for word in (path.name, *extra)), str(caught.value)


def test_a_template_that_refuses_system_prompts(tmp_path, tok):
    """Guards jinja's own exception, which names neither the file nor the flag; Gemma's template is such a one."""
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    other = fixtures.tokenizer(tmp_path / "gemma", refuses + fixtures.QWEN)
    file = write_parquet(tmp_path / "rows.parquet", [eurus(n, "math", "4") for n in range(9)])
    assert load(other, file).train["math"]
    with pytest.raises(
        ValueError,
        match="(?s)System role not supported.*system_prompt|system_prompt.*System role not",
    ):
        load(other, file, system_prompt="keep")


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"task": "maths"}, ["maths", "countdown3", "code"]),
        ({"task": ""}, ["math"]),
        ({"task": "rg:no_such", "data": ()}, ["no_such"]),
        ({"task": "math:0"}, ["0"]),
        ({"task": "math:-1,code:1"}, ["-1"]),
        ({"task": "math:half,code:1"}, ["half"]),
        ({"task": "math:1,code"}, ["code"]),
        ({"task": "math:nan,code:1"}, ["nan"]),
        ({"task": "math:inf,code:1"}, ["inf"]),
        ({"task": "math,math"}, ["math"]),
        ({"prompt_column": ("promt",)}, ["promt", "--prompt_column"]),
        ({"answer_column": ("a", "b")}, ["answer_column", "a", "b", "1"]),
        ({"train_split": ("trian",)}, ["trian", "--train_split"]),
        ({"test_split": ("tset",)}, ["tset", "--test_split"]),
        ({"data": ("FILE:answer=gold",)}, ["FILE:answer=gold"]),
        ({"task": "countdown", "data": (), "prompt_column": ("x",)}, ["prompt_column", "--data"]),
        ({"data": ("FILE", "FILE")}, ["rows.jsonl", "1"]),
        ({"task": "math,code,countdown", "data": ("FILE", "FILE")}, ["rows.jsonl", "3"]),
        ({"template": "jinja"}, ["jinja", "base", "chat"]),
        ({"max_prompt_tokens": 0}, ["0 tokens"]),
    ],
)
def test_flags_that_make_no_sense(tmp_path, tok, flags, words):
    """Guards a mistyped flag that is ignored, and an error that does not say what was given."""
    file = write_jsonl(tmp_path / "rows.jsonl", [line(n) for n in range(9)])
    where = tuple(text.replace("FILE", file) for text in flags.get("data", ("FILE",)))
    words = [word.replace("FILE", file) for word in words]
    with pytest.raises(
        (ValueError, ImportError) if "rg:" in flags.get("task", "") else ValueError
    ) as caught:
        data.load(data.Source(**{"task": "math", **flags, "data": where}), tok)
    assert all(word in str(caught.value) for word in words), str(caught.value)
