"""What each file is as a program (data.py, rewards.py, rollout.py, kernels.py) and tools/score.py: what they print is
true."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import fixtures
import launch
import pytest
from transformers import AutoTokenizer
from transformers.utils.import_utils import KERNELS_MIN_VERSION

import rollout

ROOT = Path(__file__).resolve().parent.parent


def good(*command) -> str:
    return launch.run(*command).good().said


def test_rows_are_shown_as_they_are_fed(tiny, tmp_path):
    """Guards `python data.py`: the number of rows of every task that needs no file, the answer below its question, the
    template, the count of tokens, the load report."""
    said = good("data.py", "--show", 4)
    rows = re.findall(
        r"^countdown-train-\d \(countdown\)\nquestion: .* the numbers (.*) exactly .* to make (\d+)\..*\n<think>\n"
        r"answer: {\"numbers\": \[(.*)\], \"target\": (\d+)}$",
        said,
        re.MULTILINE,
    )
    assert len(rows) == 2 * 4  # countdown and countdown3
    for numbers, target, *answer in rows:
        assert [numbers, target] == answer
    fixtures.eurus_folder(tmp_path)
    files = ["--task", "math,code", "--data", tmp_path, "--template", "chat"]
    said = good("data.py", *files, "--model", tiny, "--show", 2)
    assert re.search(r"taco +27 +6 +21", said) and "unequal numbers" in said
    counts = re.findall(
        r"^(math|code)-train-\d+ \(\1, \d+ tokens\)\nquestion: user: ", said, re.MULTILINE
    )
    assert counts == ["math", "math", "code", "code"]
    assert said.count("assistant: ") == said.count("\nanswer: ") == 4


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--task", "cuontdown"], "'cuontdown' is not known"),
        (["--task", "math"], "--model DIR"),
    ],
)
def test_wrong_tasks_are_named(flags, says):
    """Guards a traceback, or rows of something else, in the place of a message."""
    ended = launch.run("data.py", *flags)
    assert ended.code == 1 and ended.said.startswith("data.py: ") and says in ended.said


def test_verdicts_beside_questions():
    """Guards `python rewards.py`: what it teaches about right, wrong, hedged and endless answers."""
    said = good("rewards.py")
    for line in (
        "countdown Make 22 out of 3, 5, 7. '<answer>3*5+7</answer>' ok 1",
        "countdown Make 22 out of 3, 5, 7. '<answer>5*7-3</answer>' wrong 0.1",
        "countdown Make 22 out of 3, 5, 7. 'It is 3*5+7.' no_answer 0",
        r"math What is 1/2 + 1/4? 'It is \\boxed{0.75}.' ok 1",
        r"math What is 1/2 + 1/4? 'It is \\boxed{0.75 or 0.5}.' wrong 0",
        r"code Read a number, print its double. '```python\nprint(4)\n```' wrong 0",
        r"code Read a number, print its double. '```python\nwhile True: pass\n```' timeout 0",
    ):
        assert line in re.sub(" +", " ", said), said
    assert said.count(" ok ") == 3


def test_one_packed_row():
    """Guards `python kernels.py`: which slot predicts which token, and log-probs that are those of sequences alone."""
    said = good("kernels.py")
    rows = [line.split() for line in said.splitlines()[1:10]]
    assert [row[:4] for row in rows] == [
        ["0", "0", "11", "-"],
        ["1", "1", "12", "13"],
        ["2", "2", "13", "14"],
        ["3", "0", "21", "-"],
        ["4", "1", "22", "23"],
        ["5", "0", "31", "-"],
        ["6", "1", "32", "33"],
        ["7", "2", "33", "34"],
        ["8", "3", "34", "35"],
    ]
    predicting = [row for row in rows if len(row) == 6]
    assert len(predicting) == 6 and len({row[4] for row in predicting}) == 6
    for row in predicting:
        assert float(row[4]) == pytest.approx(float(row[5]), abs=2e-4)
    assert "[0, 3, 5, 9]" in said


def test_one_answer_where_the_package_kernels_is_installed(tiny, tmp_path):
    """Guards `python rollout.py`: what it prints is what the engine sampled. In an interpreter of its own: only there does
    transformers look for Hugging Face's package `kernels`, and would find our file of that name."""
    info = tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    info.mkdir()
    version = f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n"
    (info / "METADATA").write_text(version)
    flags = ["--model", tiny, "--engine", "torch", "--prompt", "1+2=", "--template", "chat"]
    said = subprocess.run(
        [sys.executable, "rollout.py", *flags, "--max_new_tokens", "5", "--seed", "3"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert said.returncode == 0, said.stderr[-2000:]
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    text = "user: 1+2=\nassistant: "
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    sampler = rollout.TorchSampler(tiny, rollout.eos_ids(tiny, tokenizer), len(prompt) + 5)
    (sample,) = sampler.sample([prompt], 1, 5, 1.0, 3)
    shown = said.stdout.splitlines()
    assert shown[0] == f"prompt    {text!r} ({len(prompt)} tokens)"
    assert shown[1] == f"answer    {tokenizer.decode(sample.ids)!r}"
    assert shown[2].startswith(f"finished  {sample.finished} ")
    assert shown[3].startswith(f"log-prob  {sum(sample.logprobs):.3f} nats")
    assert shown[4:] == [
        f"{logprob:8.3f}  {tokenizer.decode([token])!r}"
        for token, logprob in zip(sample.ids, sample.logprobs)
    ]


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
        ended = launch.run("tools/score.py", tmp_path / "bad.jsonl")
        assert ended.code == 1 and says in ended.said, ended.said
    (tmp_path / "bad.jsonl").write_text("\n")
    assert "line 1: no JSON object" in launch.run("tools/score.py", tmp_path / "bad.jsonl").said
    (tmp_path / "bad.jsonl").write_text("")
    assert "bad.jsonl has no lines" in launch.run("tools/score.py", tmp_path / "bad.jsonl").said
