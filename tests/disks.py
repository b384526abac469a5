"""python tests/disks.py full|read-only FOLDER MODEL [flags of ppo.py]: toy runs on a disk that is too small, then larger;
and a run in a folder that may not be written.

What this process mounts, nobody else sees, and it ends with it. Exit code 77: nothing can be mounted here.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000


def own_mounts() -> None:
    """Before libraries start threads: then there is no way into a user namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    user = os.getuid()
    if libc.unshare(CLONE_NEWNS) != 0:
        if libc.unshare(CLONE_NEWNS | CLONE_NEWUSER) != 0:
            nothing_can_be_mounted(os.strerror(ctypes.get_errno()))
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    mount("--make-rprivate", "/")


def mount(*words) -> None:
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True)
    if done.returncode != 0:
        nothing_can_be_mounted(done.stderr.strip())


def nothing_can_be_mounted(why: str) -> None:
    print(f"nothing can be mounted here: {why}")
    sys.exit(77)


def full(folder: Path, model: str, size: str, *flags: str) -> None:
    """What two runs have left is in folder/first and folder/second."""
    disk = folder / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk)
    import toy

    try:
        toy.run(str(disk / "run"), "--model", model, *flags)
    except OSError as error:
        print(f"the first ended with: {error}", flush=True)
    shutil.copytree(disk / "run", folder / "first", symlinks=True)
    mount("-o", "remount,size=100m", disk)
    toy.run(str(disk / "run"), "--model", model, *flags, "--keep_last", "0", "--resume", "auto")
    shutil.copytree(disk / "run", folder / "second", symlinks=True)


def read_only(folder: Path, model: str, *flags: str) -> None:
    mount("--bind", folder, folder)
    mount("-o", "remount,ro,bind", folder)
    import toy

    toy.run(str(folder), "--model", model, *flags, "--resume", "auto")


if __name__ == "__main__":
    own_mounts()
    what, where, *rest = sys.argv[1:]
    {"full": full, "read-only": read_only}[what](Path(where), *rest)
