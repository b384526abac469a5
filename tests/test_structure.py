"""The budgets and boundaries of the repository itself: what keeps it readable in an afternoon."""
import ast
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import planted
import pytest
from transformers.utils.import_utils import KERNELS_MIN_VERSION

import data
import ppo
import rewards

ROOT = Path(__file__).resolve().parent.parent
FILES = {"ppo.py", "rollout.py", "rewards.py", "data.py", "kernels.py", "runs.py", "costs.py"}
REQUIRED = FILES | {"run_4xh100.sh", "run_cpu.sh", "requirements.txt", "requirements-cpu.txt", "README.md", "LICENSE",
                    "tests", ".ci", ".gitignore"}  # fmt: skip
PROGRAMS = {"sandbox.py", "equality.py"}  # run in other processes; the trainer imports none
LATER = PROGRAMS | {"report.py", "BENCHMARKS.md", "docs"}


def test_exactly_these_top_level_entries():
    """Guards the next file: a new module needs a better reason than that this one was full."""
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    entries = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert entries - REQUIRED - LATER == set(), "not agreed on"
    assert REQUIRED - entries == set(), "missing"


def imported(path: Path) -> set[str]:
    """First names of every import statement in the file, those inside functions too."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


def test_imports_are_a_star():
    """Guards cycles and side doors: ppo.py imports the other six, they import nothing local, nobody imports ppo.py."""
    local = {path.stem for path in ROOT.glob("*.py")}
    arrows = {path.name: imported(path) & local for path in ROOT.glob("*.py")}
    assert arrows.pop("ppo.py") == {"costs", "data", "kernels", "rewards", "rollout", "runs"}
    assert set().union(*arrows.values()) == set()


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("*.py")))
def test_files_are_short(name):
    """Guards the afternoon in which all of it can be read."""
    lines = (ROOT / name).read_text().splitlines()
    assert len(lines) <= 600
    assert [number for number, line in enumerate(lines, 1) if len(line) > 120] == []


def test_one_step_is_inline_and_short():
    """Guards the loop that reads top to bottom: seven phases, 150 lines."""
    functions = [node for node in ast.parse((ROOT / "ppo.py").read_text()).body if isinstance(node, ast.FunctionDef)]
    (train,) = (node for node in functions if node.name == "train")
    (loop,) = (node for node in train.body if isinstance(node, ast.For) and ast.unparse(node.iter).startswith("range("))
    assert ast.unparse(loop.target) == "step"
    assert loop.end_lineno - loop.lineno + 1 <= 150


def test_at_most_sixty_flags():
    """Guards the flag that should have been a five-line edit."""
    assert len(fields(ppo.Args)) <= 60


@pytest.mark.parametrize("task", sorted(data.TASKS))
def test_every_task_has_a_reward(task):
    """Guards a loader whose rows name a task that rewards.py does not know."""
    assert {row["task"] for row in data.TASKS[task]("test", 0, "base")[:8]} <= set(rewards.REWARDS)


def test_the_name_kernels_is_guarded(tmp_path):
    """Guards models of transformers where Hugging Face's package `kernels` is installed: without the guard at the top
    of ppo.py they import our kernels.py in its place. Both ways, so that the guard leaves when it is not needed."""
    info = tmp_path / "site" / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    copy = tmp_path / "unguarded"
    copy.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    text = (copy / "ppo.py").read_text()
    lines = text.splitlines(keepends=True)
    guard = [line for line in lines if 'sys.modules["kernels"]' in line or ".hub_kernels" in line]
    assert len(guard) == 3
    for line in guard:
        text = text.replace(line, "")
    (copy / "ppo.py").write_text(text)
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    run = {"env": env, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, "-c", "import ppo, transformers.modeling_utils; ppo.parse_args()", "--help"]
    with_guard, without = (subprocess.Popen(command, cwd=at, **run) for at in (ROOT, copy))
    shown, error = with_guard.communicate()[0], without.communicate()[0]
    assert with_guard.returncode == 0 and "usage:" in shown
    assert without.returncode == 1 and "ImportError" in error and "kernels" in error


def test_planted_bugs_still_apply():
    """Guards tests/planted.py against the day when the line it breaks has another form."""
    for bug in planted.BUGS:
        assert (ROOT / bug.file).read_text().count(bug.old) == 1, bug.name
        assert all((ROOT / "tests" / name).exists() for name in bug.tests), bug.name
