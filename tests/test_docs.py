"""README.md and docs/ against the code: links lead somewhere, files that are named are there, and
commands and flags are those of the programs.

Owns: nothing but these pages. Each check takes (page, text) and returns what is wrong with it; the
last test gives each of them texts with one fault. Left out on purpose: wording, and whether a
command does what the page says of it.
"""

import contextlib
import functools
import io
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import ppo
import pytest
import tyro
from torch.distributed.run import get_args_parser

import data
from tools import report, score

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("tools/*/README.md"))]
PATCHES = sorted(ROOT.glob("tests/ablations/*.patch"))
README_LINES = 200
README_BYTES = 12_288
PHASES = {"sample", "reward", "forward", "advantage", "update", "sync", "report"}
NOT_OURS = {"train.sh", "alloc_conf.py"}  # a reader's own file; one of vLLM
MODEL = ("--model", "DIR")  # what ppo.py cannot do without
FOLDERS = (".", "docs", "infra", "tests", "tests/ablations", "tools", "tools/*", "verify")


# ------------------------------------------------------------------------------ parts of a page


class Block(NamedTuple):
    language: str  # of a fence; "": a fence without one, or an indented block
    text: str


FENCED = re.compile(r"^( *)```(\w*)[^\n`]*\n(.*?)^ *```[ ]*$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:\A|(?<=\n\n))(?: {4}.*(?:\n|\Z)(?:\n(?= {4}))*)+", re.MULTILINE)


def blocks(text: str) -> list[Block]:
    found = [Block(language, code) for _, language, code in FENCED.findall(text)]
    for code in INDENTED.findall(FENCED.sub("\n", text)):
        found.append(Block("", re.sub("^ {4}", "", code, flags=re.MULTILINE)))
    return found


def prose(text: str) -> str:
    """The text without its blocks of code."""
    return INDENTED.sub("\n", FENCED.sub("\n", text))


def inline_code(text: str) -> list[str]:
    return [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose(text))]


def links(text: str) -> list[tuple[str, str]]:
    return re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", prose(text))


def anchors(text: str) -> set[str]:
    """Of its headings, as GitHub links to them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", FENCED.sub("\n", text), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w -]", "", shown.strip().lower()).replace(" ", "-")
        number = 1
        while anchor in found:
            anchor = re.sub(r"(-\d+)?$", f"-{number}", anchor, count=1)
            number += 1
        found.add(anchor)
    return found


# -------------------------------------------------------------------------------- links, files


def dead_links(page: Path, text: str) -> list[str]:
    faults = []
    for shown, target in links(text):
        if re.search(r"#L\d", target):
            faults.append(f"{target}: a line number will be wrong soon")
        elif not target.startswith(("https://", "http://")):
            faults += dead_link(page, text, shown, target)
    for place in re.findall(r"\w+\.py:\d+", prose(text)):
        faults.append(f"{place}: a line number will be wrong soon")
    return faults


def dead_link(page: Path, text: str, shown: str, target: str) -> list[str]:
    path, _, anchor = target.partition("#")
    file = page.parent / path
    if not file.exists():
        return [f"{target}: no such file"]
    if anchor:
        there = file.read_text() if path else text
        return [] if anchor in anchors(there) else [f"{target}: no such heading"]
    if file.suffix == ".py" and not stands_in(shown, file):
        return [f"{target} has no {shown}"]
    return []


def stands_in(shown: str, file: Path) -> bool:
    """[`name`](file.py): the name is defined there, or a string. [phase](ppo.py): its banner."""
    if shown in PHASES:
        wanted = rf"^\s*# ---- \d\. {shown}:"
    elif shown.startswith("`") and not shown.endswith(".py`"):
        name = re.escape(shown.strip("`()").rpartition(".")[2])
        wanted = rf"^\s*(?:def|class) {name}\b|^\s*{name}(?:: .*)? = |\"{name}\""
    else:
        return True
    return bool(re.search(wanted, file.read_text(), re.MULTILINE))


def missing_files(page: Path, text: str) -> list[str]:
    """Files that are named in backticks or in a command, and are not there."""
    named = set()
    for code in [*inline_code(text), *map(" ".join, commands(text))]:
        named |= set(re.findall(r"(?<![\w/.*-])([\w./-]*\w\.(?:py|sh|md|png|svg|patch))\b", code))
    faults = []
    for name in sorted(named - NOT_OURS):
        made_by_a_run = name.startswith("runs/") or re.search("[A-Z]{2}", Path(name).parent.name)
        if not made_by_a_run and not is_there(name, page):
            faults.append(f"{name}: no such file")
    return faults


def is_there(name: str, page: Path) -> bool:
    if "/" in name:
        return (ROOT / name).exists() or (page.parent / name).exists()
    return any(True for folder in FOLDERS for _ in ROOT.glob(f"{folder}/{name}"))


def copied_diffs(page: Path, text: str) -> list[str]:
    """A diff is a file under tests/ablations, which is tested; its text in a page is not."""
    faults = []
    for block in blocks(text):
        for name in re.findall(r"^--- a/(\S+)", block.text, re.MULTILINE):
            if (ROOT / name).exists():
                faults.append(f"a diff of {name}: link to a patch")
    return faults


def too_long(page: Path, text: str) -> list[str]:
    faults = []
    if text.count("\n") > README_LINES:
        faults.append(f"{text.count(chr(10))} lines, at most {README_LINES}")
    if len(text.encode()) > README_BYTES:
        faults.append(f"{len(text.encode())} bytes, at most {README_BYTES}")
    return faults


# ------------------------------------------------------------------------------------ commands

PROGRAMS = {"python", "python3", ".venv/bin/python", "torchrun", "bash", "pytest", "git", "pip"}


def commands(text: str) -> list[list[str]]:
    """The words of every command that starts one of PROGRAMS, in blocks and in backticks."""
    lines = []
    for block in blocks(text):
        if block.language in ("", "bash", "sh", "console"):
            joined = re.sub(r"\\\n\s*", " ", block.text)
            lines += joined.split("\n")
    whole = [words for line in lines for words in parts_of(line)]
    mentioned = [words for code in inline_code(text) for words in parts_of(code)]
    for words in mentioned:
        if "ppo.py" in words and "--model" not in words:  # a sentence may leave it out
            words += MODEL
    return [words for words in whole + mentioned if words and words[0] in PROGRAMS]


def parts_of(line: str) -> list[list[str]]:
    """The commands of a line of shell: without comments, variables set before them, and srun."""
    line = re.sub(r"(^|\s)#.*", "", line)
    line = re.sub(r"\[[A-Z][^\]]*\]", "", line)  # [RUN ...]: may be left out
    line = re.sub(r"\$\{?\w+\}?", "1", line)
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split = True
    lexer.commenters = ""
    try:
        words = list(lexer)
    except ValueError:  # an apostrophe: not a command
        return []
    parts = [[]]
    for word in words:
        if re.fullmatch("[&|;<>]+", word):
            parts.append([])
        elif parts[-1] or not re.fullmatch(r"[A-Z_0-9]+=.*|srun", word):
            parts[-1].append(word)
    return parts


def bad_commands(page: Path, text: str) -> list[str]:
    faults = []
    for words in commands(text):
        why = refused(tuple(words))
        if why:
            faults.append(f"{' '.join(words)}: {why}")
    return faults


@functools.cache
def refused(words: tuple[str, ...]) -> str:
    """Why the program would not take this command; "": it would."""
    program, *rest = words
    if program == "torchrun":
        why = complaint(get_args_parser().parse_args, rest)
        if why:
            return why
        parsed = get_args_parser().parse_args(rest)
        return refused_by_script(parsed.training_script, parsed.training_script_args)
    if program == "git":
        return refused_by_git(rest)
    if program == "pip":
        files = [name for flag, name in zip(rest, rest[1:]) if flag == "-r"]
        return "".join(f"no {name}" for name in files if not (ROOT / name).exists())
    if program == "pytest" or rest[:2] == ["-m", "pytest"]:
        return refused_by_source(["tests/conftest.py"], rest)
    if not rest or rest[0].startswith("-"):
        return ""  # python alone, python -m, bash -n
    return refused_by_script(rest[0], rest[1:])


def refused_by_script(script: str, rest: list[str]) -> str:
    if "/" not in script and script.isupper():
        return ""  # a placeholder
    if not (ROOT / script).exists():
        return f"no {script}"
    rest = ["1" if word in ("N", "GPUS", "GB") else word for word in rest]
    if script == "ppo.py":
        return refused_by_ppo(rest)
    if script in ("run_cpu.sh", "run_4xh100.sh"):  # they know a model
        return refused_by_ppo([*MODEL, *(word for word in rest if word != "--setup")])
    if script == "data.py":
        words = rest[1:] if rest[:1] == ["eurus"] else rest
        return complaint(tyro_parser(data.look).parse_args, words)
    if script == "tools/score.py":
        return complaint(tyro_parser(score.main).parse_args, rest)
    if script == "tools/report.py":
        return complaint(report_arguments, rest)
    if script == "tests/run.sh":
        return refused_by_source(["tests/conftest.py"], rest)
    if script.endswith(".sh"):  # its flags may be for the programs beside it
        beside = (ROOT / script).parent.glob("*.py")
        return refused_by_source([script, *beside], rest)
    return refused_by_source([script], rest)


def refused_by_ppo(rest: list[str]) -> str:
    if "--plan" in rest:
        at = rest.index("--plan")
        numbers = rest[at + 1 : at + 3]
        if len(numbers) < 2 or not all(re.fullmatch(r"[\d.]+", number) for number in numbers):
            return "--plan takes GPUS and GB"
        rest = rest[:at] + rest[at + 3 :]
    if "..." in rest:  # something is left out, perhaps a value: at least the names
        names = {word.removeprefix("--") for word in rest if word.startswith("--")}
        unknown = sorted(names - ppo_flags())
        return f"unknown flags {unknown}" if unknown else ""
    return complaint(ppo.parse_args, rest)


def refused_by_source(files: list, rest: list[str]) -> str:
    """Flags, and words in small letters that are no path, must stand in one of the files."""
    source = "\n".join((ROOT / file).read_text() for file in files)
    for word in rest:
        flag = re.fullmatch(r"--([\w-]+)(?:=.*)?", word)
        if flag and not re.search(rf"(?<!\w)(?:--)?{flag[1]}(?!\w)", source):
            return f"unknown flag --{flag[1]}"
    if "tests/conftest.py" not in files:  # pytest's -k takes any words
        for word in rest:
            if re.fullmatch(r"[a-z][a-z_-]*", word) and word not in source:
                return f"unknown word {word}"
    return ""


def refused_by_git(rest: list[str]) -> str:
    if rest[:1] != ["apply"] or "-R" in rest:
        return ""
    done = subprocess.run(
        ["git", "apply", "--check", *rest[1:]], cwd=ROOT, capture_output=True, text=True
    )
    return done.stderr.strip()


def complaint(parse, words: list[str]) -> str:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            parse(list(words))
    except SystemExit as end:
        if isinstance(end.code, str):
            return end.code
        if end.code:
            return " ".join(re.findall(r"[\w'`./=-]+", said.getvalue()))[-300:]
    return ""


@functools.cache
def tyro_parser(function):
    config = (tyro.conf.OmitArgPrefixes,)
    return tyro.extras.get_parser(function, config=config, use_underscores=True)


def report_arguments(words: list[str]):
    before = sys.argv
    sys.argv = ["report.py", *words]
    try:
        report.parse_args()
    finally:
        sys.argv = before


# ------------------------------------------------------------------------------ flags in prose


@functools.cache
def ppo_flags() -> set[str]:
    names = {flag.name for flag in fields(ppo.Args)}
    negated = {f"no_{flag.name}" for flag in fields(ppo.Args) if isinstance(flag.default, bool)}
    return names | negated | {"plan", "help"}


@functools.cache
def other_flags() -> set[str]:
    """Of torchrun, and of the programs beside ppo.py."""
    names = {name for action in get_args_parser()._actions for name in action.option_strings}
    names |= set(tyro_parser(data.look)._option_string_actions)
    names |= set(tyro_parser(score.main)._option_string_actions)
    for file in ("run_cpu.sh", "tests/conftest.py", "tools/report.py"):
        names |= set(re.findall(r"--[a-z_]+", (ROOT / file).read_text()))
    return {name.removeprefix("--") for name in names}


def unknown_flags(page: Path, text: str) -> list[str]:
    """Of `--flag` and `--flag value`; what ppo.py can parse it must parse."""
    faults = []
    for span in inline_code(text):
        if not span.startswith("--"):
            continue
        words = [word for part in parts_of(span) for word in part]
        names = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
        unknown = names - ppo_flags() - other_flags()
        if unknown:
            faults.append(f"{span}: unknown flags {sorted(unknown)}")
        elif names <= ppo_flags() and has_all_values(words):
            why = refused(("python", "ppo.py", *MODEL, *words))
            faults += [f"{span}: {why}"] if why else []
    return faults


def has_all_values(words: list[str]) -> bool:
    pairs = zip(words, [*words[1:], "--"])
    return all(not word.startswith("--") or not after.startswith("--") for word, after in pairs)


def broken_bash(page: Path, text: str) -> list[str]:
    faults = []
    for block in blocks(text):
        if block.language in ("bash", "sh"):
            done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
            if done.returncode:
                faults.append(done.stderr.strip())
    return faults


# ----------------------------------------------------------------------------------- the tests

CHECKS = (dead_links, missing_files, copied_diffs, bad_commands, unknown_flags, broken_bash)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page, check):
    """Guards readers against pages that the code has left behind."""
    assert check(page, page.read_text()) == []


def test_the_readme_is_short():
    """Guards the one page that everybody reads."""
    assert too_long(README, README.read_text()) == []


def test_every_edit_is_named():
    """Guards edits that nobody finds."""
    text = README.read_text()
    recipes = ROOT / "docs" / "recipes.md"
    if recipes.exists():
        text += recipes.read_text()
    assert [patch.name for patch in PATCHES if patch.name not in text] == []


PAGE = ROOT / "docs" / "planted.md"  # where the texts below would be
FAULTS = [  # the check that must complain, the text, a word of the complaint
    (dead_links, "[a page](gone.md)", "gone.md"),
    (dead_links, "![a picture](gone.png)", "gone.png"),
    (dead_links, "[a heading](#gone)\n\n# Here\n", "#gone"),
    (dead_links, "[a comment](#gone)\n\n```bash\n# gone\n```\n", "#gone"),
    (dead_links, "[elsewhere](find_it.md#gone)", "find_it.md#gone"),
    (dead_links, "[`gone`](../ppo.py)", "`gone`"),
    (dead_links, "[`Run.gone`](../infra/run.py)", "`Run.gone`"),
    (dead_links, "[`train`](../ppo.py#L12)", "line number"),
    (dead_links, "the loop, ppo.py:1057, runs", "line number"),
    (missing_files, "as `tests/gone.py` does", "tests/gone.py"),
    (missing_files, "as `gone.py` does", "gone.py"),
    (missing_files, "see `docs/gone.md`", "docs/gone.md"),
    (missing_files, "so:\n\n    .venv/bin/python tools/gone.py RUN\n", "tools/gone.py"),
    (copied_diffs, "```diff\n--- a/rewards.py\n+++ b/rewards.py\n```\n", "rewards.py"),
    (bad_commands, "so:\n\n    python ppo.py --gone 3\n", "gone"),
    (bad_commands, "so:\n\n    python ppo.py --steps many\n", "many"),
    (bad_commands, "so:\n\n    python ppo.py --advantage grpoo   # a comment\n", "grpoo"),
    (bad_commands, "```bash\nX=1 torchrun --gone 1 ppo.py --steps 1\n```\n", "gone"),
    (bad_commands, "```bash\ntorchrun --nproc_per_node 2 ppo.py \\\n  --gone\n```\n", "gone"),
    (bad_commands, "```bash\nsrun torchrun --nnodes 2 ppo.py --gone 1\n```\n", "gone"),
    (bad_commands, "so:\n\n    python ppo.py --plan 4\n", "plan"),
    (bad_commands, "`python ppo.py --gone 3 ...`", "gone"),
    (bad_commands, "```\nbash run_cpu.sh --gone\n```\n", "gone"),
    (bad_commands, "`RECIPE=countdown-3b bash run_4xh100.sh --gone 1`", "gone"),
    (bad_commands, "`python data.py --task math --gone`", "gone"),
    (bad_commands, "`python data.py eurus --gone DIR`", "gone"),
    (bad_commands, "`python tools/score.py FILE --gone`", "gone"),
    (bad_commands, "`python tools/report.py RUN [RUN ...] --gone`", "gone"),
    (bad_commands, "`python tools/replay.py --gone FILE`", "gone"),
    (bad_commands, "`python tests/planted.py no-such-bug`", "no-such-bug"),
    (bad_commands, "`bash tests/gone.sh`", "tests/gone.sh"),
    (bad_commands, "`bash tests/run.sh --gone`", "gone"),
    (bad_commands, "`git apply tests/ablations/gone.patch`", "gone.patch"),
    (bad_commands, "`git apply ruff.toml`", "patch"),
    (bad_commands, "`pip install -r gone.txt`", "gone.txt"),
    (bad_commands, "`true && python ppo.py --gone 1`", "gone"),
    (unknown_flags, "give `--gone 3`", "gone"),
    (unknown_flags, "| `--lam 0.95 --critic_lam much` |", "much"),
    (unknown_flags, "| `--advantage grpoo` |", "grpoo"),
    (broken_bash, "```bash\nif true; do\n```\n", "syntax error"),
    (too_long, "a\n" * (README_LINES + 1), "lines"),
    (too_long, "a" * (README_BYTES + 1), "bytes"),
]


@pytest.mark.parametrize("check, text, word", FAULTS)
def test_a_fault_is_seen(check, text, word):
    """Guards checks that look at nothing."""
    faults = check(PAGE, text)
    assert len(faults) == 1
    assert word in faults[0]


GOOD = """# A page

[`train`](../ppo.py), [sample](../ppo.py), [one](#a-page), [`GUARDS`](../infra/guards.py), [`Engine.ask`](../rollout.py)

    SEED=1 bash run_cpu.sh --lr 1e-4                 # 2 minutes
    git apply tests/ablations/gspo.patch && python ppo.py --model DIR --steps 1
    python tools/report.py RUN [RUN ...] --png FOLDER

```bash
srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node 4 \\
    ppo.py --model DIR --replicas "$SLURM_NNODES" --offload critic policy
```

`--offload critic policy`, `--sp --tp ...`, `torchrun ppo.py --model ...`, `python ppo.py --plan GPUS GB --model DIR`
"""


def test_a_sound_page_has_no_fault():
    """Guards checks that complain of everything."""
    assert [fault for check in CHECKS for fault in check(PAGE, GOOD)] == []
