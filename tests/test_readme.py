"""The README against the code: every file, command, flag, link and edit that it names is there."""

import re
from dataclasses import fields
from pathlib import Path

import ppo

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
PATCHES = sorted((ROOT / "tests" / "ablations").glob("*.patch"))
SCRIPTS = r"py|sh|txt|html|png|patch"
# where a file may be that is named without its folder, as in the table of files
PLACES = [ROOT] + [ROOT / name for name in ("infra", "verify", "tools", "tests", "tests/ablations")]
MADE_BY_A_RUN = {"batch.pt", "runs/NAME/", "bad_step_N/", "profile/"}
# flags that are not those of ppo.py, and the program that has each
OTHER_FLAGS = {
    "plan": "ppo.py",
    "help": "ppo.py",  # tyro's
    "setup": "run_cpu.sh",
    "png": "tools/report.py",
    "watch": "tools/report.py",
    "show": "data.py",
}
OF_TORCHRUN = {
    *("nnodes", "nproc_per_node", "rdzv_backend", "rdzv_endpoint", "rdzv_id"),
    "shutdown_timeout",
}


def test_files_exist():
    """Guards against a README that names a file which is gone."""
    named = set(re.findall(rf"(?<![\w/.])([\w./-]*\w\.(?:{SCRIPTS}))\b", TEXT))
    named |= set(re.findall(r"`((?:\w+/)+)`", TEXT))
    assert {"ppo.py", "infra/", "tests/tiny.py", "tiny.py", "docs/report.png"} <= named
    gone = set()
    for name in named - MADE_BY_A_RUN:
        if not any((place / name).exists() for place in PLACES):
            gone.add(name)
    assert gone == set()


def test_commands_start_files_that_exist():
    """Guards a command that was copied from a README which names a program's old place."""
    started = re.findall(rf"(?:python|bash) ([\w./-]+\.(?:{SCRIPTS}))", TEXT)
    started += re.findall(r"torchrun [^`\n]*?([\w./-]+\.py)", TEXT)
    assert len(started) > 25
    assert {name for name in started if not (ROOT / name).exists()} == set()
    for line in re.findall(r"git apply ([\w./-]+)", TEXT):
        assert (ROOT / line).suffix == ".patch" and (ROOT / line).exists()


def test_flags_exist():
    """Guards against a README that names a flag which is gone."""
    named = set(re.findall(r"(?<![\w-])--([a-z_0-9]+)", TEXT))
    flags = {flag.name for flag in fields(ppo.Args)}
    assert len(named & flags) > 40
    named -= flags | OF_TORCHRUN
    assert named <= OTHER_FLAGS.keys(), "whose flags are they?"
    for name in named:
        source = (ROOT / OTHER_FLAGS[name]).read_text()
        found = name == "help" or re.search(rf"\b{name}\b", source)
        assert found, f"--{name} of {OTHER_FLAGS[name]}"


def test_links_lead_somewhere():
    """Guards the lecture against code that moved: [phase](ppo.py) has its banner there, and
    [`name`](file.py) is defined in that file, or at least stands in it."""
    seen = 0
    for shown, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", TEXT):
        if target.startswith("https://"):
            continue
        if target.startswith("#"):
            assert target[1:] in headings(), target
            continue
        assert (ROOT / target).exists(), target
        if target.endswith(".py"):
            seen += 1
            source = (ROOT / target).read_text()
            if shown.startswith("`"):
                name = re.escape(shown.strip("`"))
                defined = rf"^\s*(?:def|class) {name}\b|^\s*{name}(?:: .*)? = |\"{name}\""
            else:
                defined = rf"^\s*# ---- \d\. {shown}:"
            assert re.search(defined, source, re.MULTILINE), f"{target} has no {shown}"
    assert seen > 20


def headings() -> set[str]:
    """As GitHub links to them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE):
        found.add(re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-"))
    return found


def test_every_edit_is_named_and_those_that_are_shown_are_whole():
    """Guards the README against edits that are no longer those that are tested: test_ablations.py
    applies each patch, and here what the README shows of one is all of it."""
    for patch in PATCHES:
        assert f"](tests/ablations/{patch.name})" in TEXT, patch.name
    shown = re.findall(r"```diff\n(.*?)```", TEXT, re.DOTALL)
    assert shown
    edits = ["--- a/" + patch.read_text().partition("--- a/")[2] for patch in PATCHES]
    for diff in shown:
        assert diff in edits, diff
