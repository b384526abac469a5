"""The README against the code: its links to lines, flags, files. python tests/test_readme.py mends the links."""
import re
import sys
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "README.md"
LINK = re.compile(r"\[`?(\w+)`?\]\((\w+\.py)#L(\d+)\)")  # [`name`](file.py#L12), or [phase](ppo.py#L12)


def line_of(name: str, file: str) -> int:
    """Where a phase has its banner, or where a name is defined, or else first stands."""
    lines = (ROOT / file).read_text().splitlines()
    for pattern in (rf"\s*# ---- \d\. {name}:", rf"\s*(def|class) {name}\b", rf"{name} =", rf".*\b{name}\b"):
        for number, line in enumerate(lines, 1):
            if re.match(pattern, line):
                return number
    raise AssertionError(f"README.md links to {name} in {file}, which has no such name")


def mended(text: str) -> str:
    return LINK.sub(lambda link: link[0].replace(f"#L{link[3]}", f"#L{line_of(link[1], link[2])}"), text)


def test_links_lead_to_the_lines():
    """Guards the lecture against code that moved: python tests/test_readme.py writes the lines anew."""
    text = PAGE.read_text()
    assert len(LINK.findall(text)) > 15
    assert text == mended(text)


def test_flags_and_metrics_exist():
    """Guards against a README that names a flag which is gone."""
    import ppo

    known = {field.name for field in fields(ppo.Args)} | {"plan", "replay", "help"}
    programs = {"setup", "out", "png", "watch", "show", "task", "model", "extra"}  # of run_cpu.sh, report.py and others
    elsewhere = set("nnodes nproc_per_node rdzv_backend rdzv_endpoint rdzv_id shutdown_timeout".split())  # of torchrun
    named = set(re.findall(r"(?<![\w-])--([a-z_]+)", PAGE.read_text()))
    assert named - known - programs - elsewhere == set()


def test_files_exist():
    """Guards against a README that names a file which is gone."""
    text = PAGE.read_text()
    named = set(re.findall(r"(?<![\w/.])((?:tests/|docs/)?[\w/-]+\.(?:py|sh|txt|png|patch))\b", text))
    made = {"report.html", "batch.pt"}
    places = ROOT, ROOT / "tests", ROOT / "tests" / "ablations"
    assert {name for name in named - made if not any((place / name).exists() for place in places)} == set()


if __name__ == "__main__":
    PAGE.write_text(mended(PAGE.read_text()))
    sys.exit()
