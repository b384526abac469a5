"""Starts scripts as `python SCRIPT flags` does, each in a process of its own, without their 4 seconds
of imports: they are forked from one process that has imported what all of them import. For copies of
the repository, whose own modules are not among that.

    python tests/forked.py < lines of JSON: [folder, [script, flag, ...]]

Two run at a time, in the order given. What one says goes to FOLDER/said, its exit status, when it
has ended, to FOLDER/ended.
"""

import json
import os
import runpy
import sys
from pathlib import Path

sys.modules["kernels"] = None  # as at the top of ppo.py
import transformers.integrations.hub_kernels  # noqa: F401

del sys.modules["kernels"]
import accelerate.utils.fsdp_utils  # noqa: F401
import torch.optim  # noqa: F401
import transformers.models.qwen2.modeling_qwen2  # noqa: F401
import tyro  # noqa: F401

running: dict[int, str] = {}  # process -> its folder


def wait() -> None:
    pid, status = os.wait()
    ended = Path(running.pop(pid), "ended")
    ended.with_suffix(".new").write_text(str(os.waitstatus_to_exitcode(status)))
    ended.with_suffix(".new").rename(ended)  # whole, once it has its name


def become(folder: str, command: list[str]) -> None:
    """This process goes on as the script."""
    os.chdir(folder)
    said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.argv = command
    sys.path[0] = str(Path(command[0]).resolve().parent)
    runpy.run_path(command[0], run_name="__main__")
    sys.exit()


for line in sys.stdin.read().splitlines():
    folder, command = json.loads(line)
    if len(running) == 2:
        wait()
    pid = os.fork()
    if pid == 0:
        become(folder, command)
    running[pid] = folder
while running:
    wait()
