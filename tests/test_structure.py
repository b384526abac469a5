"""The boundaries of the repository itself: what keeps it readable, and an edit of a reader harmless."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import planted
import pytest
from transformers.utils.import_utils import KERNELS_MIN_VERSION

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("ppo", "rollout", "rewards", "data", "kernels")
SHEDS = ("infra", "verify", "tools")
ENTRIES = {f"{room}.py" for room in ROOMS} | {
    *SHEDS,
    "run_4xh100.sh",
    "run_cpu.sh",
    "requirements.txt",
    "requirements-cpu.txt",
    "ruff.toml",
    "README.md",
    "LICENSE",
    "tests",
    "docs",
    ".ci",
    ".gitignore",
}
# Who may import what of ours; tools may import everything, and tests. Deeper arrows go down only.
ARROWS = {
    "ppo": {"rollout", "rewards", "data", "kernels", "infra", "tools.plan"},
    "rollout": {"infra.dist"},
    "kernels": {"infra.dist"},
    "rewards": {"verify.pool"},
    "data": {"verify.pool"},
    "infra": {"infra"},
    "verify": {"verify", "equality"},
}
STEP_LINES = 110
COMPLEXITY = 20
# functions that are above it, and why
COMPLEX = {"ppo.py train": "the loop of the algorithm, to be read top to bottom in one place"}


def product_files(root: Path) -> list[Path]:
    """Everything but tests, and the kit for a GPU machine."""
    files = [root / f"{room}.py" for room in ROOMS]
    for shed in SHEDS:
        files += sorted(path for path in (root / shed).rglob("*.py") if "gpu" not in path.parts)
    return files


# ----------------------------------------------- what holds of a checkout, and of an edited copy of it


def check_format(root: Path) -> None:
    """ruff's format at 100 columns, and its rules that find real faults (ruff.toml)."""
    for command in (["format", "--check", "--quiet"], ["check", "--quiet"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "."]
        done = subprocess.run(ruff, cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stdout + done.stderr)


def check_arrows(root: Path) -> None:
    for path in product_files(root):
        place = path.relative_to(root).with_suffix("").parts
        if place[0] == "tools":
            continue
        allowed = ARROWS[place[0]]
        for name in imported(path):
            if name.split(".")[0] in (*ROOMS, *SHEDS):
                ok = name in allowed or name.split(".")[0] in allowed
                assert ok, f"{'/'.join(place)} imports {name}; allowed are {sorted(allowed)}"


def imported(path: Path) -> set[str]:
    """Dotted names of every import statement in the file, those inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names |= (
                {f"{module}.{alias.name}" for alias in node.names} if module in SHEDS else {module}
            )
    return names


def check_step(root: Path) -> None:
    """From the first banner to the last line of the loop."""
    text = (root / "ppo.py").read_text()
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    (train,) = (node for node in functions if node.name == "train")
    (loop,) = (node for node in train.body if isinstance(node, ast.For))
    assert ast.unparse(loop.target) == "step"
    lines = text.splitlines()[loop.lineno - 1 : loop.end_lineno]
    banners = [i for i, line in enumerate(lines) if line.strip().startswith("# ---- ")]
    names = [lines[i].split(":")[0].split(". ")[1] for i in banners]
    phases = ["sample", "reward", "forward", "advantage", "update", "sync", "report"]
    assert names == phases
    length = len(lines) - banners[0]
    assert length <= STEP_LINES, f"one step has {length} lines: move what is no PPO behind `run`"


def check_complexity(root: Path) -> None:
    for path in product_files(root):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                name = f"{path.relative_to(root)} {node.name}"
                if name not in COMPLEX:
                    assert complexity(node) <= COMPLEXITY, name


def complexity(function: ast.AST) -> int:
    """Branches and loops; comprehensions and conditional expressions are both."""
    count = 1
    branches = (ast.If, ast.For, ast.While, ast.IfExp, ast.ExceptHandler, ast.With, ast.Assert)
    for node in ast.walk(function):
        if isinstance(node, (*branches, ast.comprehension)):
            count += 1
        if isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        if isinstance(node, ast.comprehension):
            count += len(node.ifs)
    return count


def check_all(root: Path) -> None:
    for check in (check_format, check_arrows, check_step, check_complexity):
        check(root)


@pytest.mark.parametrize("check", [check_format, check_arrows, check_step, check_complexity])
def test_this_checkout(check):
    """Guards one form for all, arrows that go down only, a step that reads top to bottom, and functions that a reader
    can hold in mind."""
    check(ROOT)


FAULTS = {
    check_format: ("data.py", "import random\n", "import random;import secrets\n"),
    check_arrows: (
        "kernels.py",
        "from infra.dist import",
        "from infra.models import SAFE\nfrom infra.dist import",
    ),
    check_step: (
        "ppo.py",
        "        run.done = step + 1\n",
        "        run.done = step + 1\n" + 40 * "        step\n",
    ),
    check_complexity: (
        "rewards.py",
        "STATUSES = (",
        "def f(x):\n" + 21 * "    if x: pass\n" + "\n\nSTATUSES = (",
    ),
}


@pytest.mark.parametrize("check", FAULTS)
def test_the_checks_find_faults(check, tmp_path):
    """Guards the checks themselves."""
    planted.copy(tmp_path)
    check(tmp_path)
    file, old, new = FAULTS[check]
    text = (tmp_path / file).read_text()
    assert text.count(old) == 1
    (tmp_path / file).write_text(text.replace(old, new))
    with pytest.raises(AssertionError):
        check(tmp_path)


def test_exactly_these_top_level_entries():
    """Guards the next file: a new room or shed needs a reason."""
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert {line.split("/")[0] for line in listed.stdout.splitlines()} == ENTRIES


# imports what takes most of the time, and then ppo.py from each folder, in a process of its own
IMPORTS = """
import os, sys, traceback
import accelerate, torch._dynamo, torch.distributed.fsdp, transformers
assert "transformers.integrations.hub_kernels" not in sys.modules
for folder in sys.argv[1:]:
    if os.fork() == 0:
        os.chdir(folder)
        try:
            import ppo, transformers.modeling_utils
            print("good", flush=True)
        except ImportError:
            traceback.print_exc()
        os._exit(0)  # to end as usual takes a second
    os.wait()
    print("--", flush=True)
os._exit(0)
"""


def test_the_name_kernels_is_guarded(tmp_path):
    """Guards models of transformers where Hugging Face's package `kernels` is installed: without the guard at the top
    of ppo.py they import our kernels.py in its place. Both ways, so that the guard leaves when it is not needed. In a
    new interpreter, as it is about the order of imports."""
    info = tmp_path / "site" / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    info.mkdir(parents=True)
    version = f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n"
    (info / "METADATA").write_text(version)
    copy = tmp_path / "unguarded"
    copy.mkdir()
    planted.copy(copy)
    text = (copy / "ppo.py").read_text()
    lines = text.splitlines(keepends=True)
    guard = [line for line in lines if 'sys.modules["kernels"]' in line or ".hub_kernels" in line]
    assert len(guard) == 3
    for line in guard:
        text = text.replace(line, "")
    (copy / "ppo.py").write_text(text)
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", IMPORTS, ROOT, copy]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    said = subprocess.run(command, env=env, text=True, **both).stdout
    assert said.count("--\n") == 2, said
    with_guard, without, _ = said.split("--\n")
    assert with_guard.endswith("good\n"), with_guard
    assert "ImportError" in without and "kernels" in without and "good" not in without


@pytest.mark.skipif(
    not os.environ.get("CI"),
    reason="without CI=1: a reader may edit a line that tests/planted.py breaks",
)
def test_planted_bugs_still_apply():
    """Guards tests/planted.py against the day when the line it breaks has another form."""
    for bug in planted.BUGS:
        assert (ROOT / bug.file).read_text().count(bug.old) == 1, bug.name
        assert all((ROOT / "tests" / name).exists() for name in bug.tests), bug.name
