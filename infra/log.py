"""What a run says and writes: without secrets, and whole.

Owns: hiding what looks like a password or a token, printing, and files that are complete or not there.
"""

import json
import os
import re
from pathlib import Path

SECRET_NAME = re.compile("TOKEN(?!IZER)|SECRET|PASSW|CREDENTIAL|(API|ACCESS|PRIVATE|AUTH)_?KEY")

SECRET = re.compile(  # tokens of well-known places; in addresses what stands before an @, and keys
    r"\b(?:hf_|sk-|ghp_|github_pat_|xox[bp]-)\w[\w-]{15,}|(?<=://)[^/\s@\"]+(?=@)|[?&]\w*(?i:token|key)=[^&\s\"]{8,}"
)


def hide(text: str) -> str:
    """Without values of environment variables that are named like secrets, and without what looks like a token."""
    for name, value in os.environ.items():
        if len(value) >= 8 and SECRET_NAME.search(name.upper()):
            text = text.replace(value, f"<{name}>").replace(json.dumps(value)[1:-1], f"<{name}>")
    return SECRET.sub("<secret>", text)


def hidden(flags: dict) -> dict:
    return json.loads(hide(json.dumps(flags)))


def say(text: str) -> None:
    print(hide(text), flush=True)


def write(path: Path, text: str) -> None:
    """All of it or, when the machine dies, what was there before."""
    aside = path.with_name(path.name + ".new")
    with open(aside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def sync(path: Path) -> None:
    """To the disk, not only to the system's memory; of a folder: its names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_append(path: Path, text: str) -> None:
    """Adds text to a file; it is on the disk when this returns."""
    with open(path, "a") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
