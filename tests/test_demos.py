"""data.py as a program and tools/score.py: what they print is true."""

import json
import re
import subprocess
import sys
from pathlib import Path

import fixtures
import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=200
    )


def good(*command) -> str:
    said = run(*command)
    assert said.returncode == 0, said.stderr[-2000:]
    return said.stdout


def test_rows_are_shown_as_they_are_fed(tiny, tmp_path):
    """Guards `python data.py`: the number of rows, the template, the count of tokens, the load report."""
    said = good("data.py", "--task", "countdown3", "--show", 4)
    assert (
        len(re.findall(r"^countdown-train-\d \(countdown, uncounted tokens\)", said, re.MULTILINE))
        == 4
    )
    assert '"target": 38' in said and said.count("<think>\n") == 4
    fixtures.eurus_folder(tmp_path)
    files = ["--task", "math,code", "--data", tmp_path, "--template", "chat"]
    said = good("data.py", *files, "--model", tiny, "--show", 2)
    report, _, rows = said.partition("\n\n")
    assert re.search(r"taco +27 +6 +21", report) and "unequal numbers" in report
    counts = re.findall(r"^(math|code)-train-\d+ \(\1, (\d+) tokens\), answer ", rows, re.MULTILINE)
    assert [task for task, _ in counts] == ["math", "math", "code", "code"]
    assert rows.count("user: ") == rows.count("assistant: ") == 4


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--task", "cuontdown"], "'cuontdown' is not known"),
        (["--task", "math"], "--model DIR"),
    ],
)
def test_wrong_tasks_are_named(flags, says):
    """Guards a traceback, or rows of something else, in the place of a message."""
    said = run("data.py", *flags)
    assert said.returncode == 1 and said.stderr.startswith("data.py: ") and says in said.stderr


def test_a_file_of_responses(tmp_path):
    """Guards `python tools/score.py`: verdicts of a JSONL file, lines that lack something, bad rows."""
    sums = {"numbers": [1, 2, 3], "target": 6}
    lines = [
        {"task": "countdown", "answer": sums, "response": "<answer>1+2+3</answer>", "id": "a"},
        {"task": "math", "answer": "0.5", "text": r"\boxed{\frac12}"},
        {"task": "math", "answer": "0.5", "text": r"\boxed{\frac12}", "finished": False},
        {"task": "math", "answer": "0.5", "text": r"\boxed{2}"},
    ]
    fixtures.jsonl(tmp_path / "in.jsonl", lines)
    said = good("tools/score.py", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")
    assert re.search(r"^math +ok +1 +'\\\\frac12' +line 2$", said, re.MULTILINE), said
    assert "4 responses" in said and "correct 0.5" in said and "no_answer_frac 0.25" in said
    out = [json.loads(line) for line in open(tmp_path / "out.jsonl")]
    assert [line["verdict"]["status"] for line in out] == ["ok", "ok", "no_answer", "wrong"]
    assert all(line.items() <= judged.items() for line, judged in zip(lines, out))
    sample = {
        "step": 1,
        "id": "x",
        "prompt": "?",
        "response": r"\boxed{2}",
        "status": "wrong",
        "answer": "2",
    }
    bad = {"task": "countdown", "answer": "22", "response": "<answer>22</answer>"}
    unknown = lines[0] | {"task": "maths"}
    for line, says in (
        (sample, 'line 2: there is no "task", no "answer"'),
        (bad, "line 2: its answer cannot be used"),
        (unknown, "bad.jsonl: no reward for task 'maths': add it to REWARDS"),
    ):
        fixtures.jsonl(tmp_path / "bad.jsonl", [lines[0], line])
        said = run("tools/score.py", tmp_path / "bad.jsonl")
        assert said.returncode == 1 and says in said.stderr, said.stderr
    (tmp_path / "bad.jsonl").write_text("\n")
    assert "line 1: no JSON object" in run("tools/score.py", tmp_path / "bad.jsonl").stderr
    (tmp_path / "bad.jsonl").write_text("")
    assert "bad.jsonl has no lines" in run("tools/score.py", tmp_path / "bad.jsonl").stderr
    assert "tools/score.py" in run("rewards.py").stderr
