"""What a run says and writes: without secrets, and whole.

Owns: hiding what looks like a password or a token, printing, files that are complete or not there.
Refuses to know: what is said and written.
"""

import json
import os
import re
from pathlib import Path

# names of environment variables whose values are secrets
SECRET_NAME = re.compile("TOKEN(?!IZER)|SECRET|PASSW|CREDENTIAL|(API|ACCESS|PRIVATE|AUTH)_?KEY")

SECRET = re.compile(
    r"\b(?:hf_|sk-|ghp_|github_pat_|xox[bp]-)\w[\w-]{15,}"  # tokens of well-known places
    r"|(?<=://)[^/\s@\"]+(?=@)"  # what stands before an @ in an address
    r"|[?&]\w*(?i:token|key)=[^&\s\"]{8,}"  # a key in an address
)


def hide(text: str) -> str:
    """Without values of environment variables that are named like secrets, and without what looks
    like a token."""
    for name, value in os.environ.items():
        if len(value) >= 8 and SECRET_NAME.search(name.upper()):
            in_json = json.dumps(value)[1:-1]
            text = text.replace(value, f"<{name}>").replace(in_json, f"<{name}>")
    return SECRET.sub("<secret>", text)


def hidden(flags: dict) -> dict:
    """The same dictionary as it comes back from JSON, without secrets."""
    return json.loads(hide(json.dumps(flags)))


def say(text: str):
    print(hide(text), flush=True)


def write(path: Path, text: str):
    """All of it or, when the machine dies, what was there before."""
    aside = path.with_name(path.name + ".new")
    with open(aside, "w") as file:
        file.write(text)
    to_disk(aside)
    os.replace(aside, path)


def to_disk(path: Path):
    """To the disk, not only to the system's memory; of a folder: its names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def append(path: Path, text: str):
    """Adds text to a file; it is on the disk when this returns."""
    with open(path, "a") as file:
        file.write(text)
    to_disk(path)
