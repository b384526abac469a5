"""What a phase took: seconds, memory, and on request every operation.

Owns: the clocks of the phases and the profiler.
"""

import os
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from infra.watch import enter


@contextmanager
def timed(times: dict[str, float], phase: str):
    """Adds the block's seconds to times["time/<phase>"] and times["time/step"]; keeps the most memory that this process
    took in it in times["perf/peak_gb_<phase>"]. Waits for the GPU: the blame falls on the right phase."""
    enter(phase)
    start, before = time.perf_counter(), unseen()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif os.access(
        "/proc/self/clear_refs", os.W_OK
    ):  # Linux: from here on VmHWM is the peak of resident memory
        Path("/proc/self/clear_refs").write_text("5")
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds, peak = time.perf_counter() - start, f"perf/peak_gb_{phase}"
    for name in (f"time/{phase}", "time/step"):
        times[name] = times.get(name, 0.0) + seconds
    times[peak] = max(times.get(peak, 0.0), memory_peak(before))


def unseen() -> int:
    """Bytes of the card that torch's allocator does not know of (contexts, NCCL), less those of a sleeping engine, that
    it counts although they are free."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def memory_peak(before: int = 0) -> float:
    """GB (2**30) taken of the card, or on CPU by this process, at most since the phase began. `before` is what `unseen`
    said then: an engine may wake or fall asleep in between, and is counted."""
    if torch.cuda.is_available():
        return (torch.cuda.max_memory_allocated() + max(before, unseen())) / 2**30
    lines = (
        Path("/proc/self/status").read_text().splitlines()
        if os.path.exists("/proc/self/status")
        else []
    )
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20


@contextmanager
def profiled(folder: Path | None, name: str):
    """Records every operation of the block in folder/name.json.gz, for ui.perfetto.dev; on CUDA also every allocation,
    in name.pickle, for pytorch.org/memory_viz. Without a folder, nothing."""
    if not folder:
        yield
        return
    cuda = torch.cuda.is_available()
    folder.mkdir(parents=True, exist_ok=True)
    if cuda:
        torch.cuda.memory._record_memory_history(max_entries=1_000_000, stacks="python")
    with torch.profiler.profile(record_shapes=True, profile_memory=True) as profiler:
        yield
    profiler.export_chrome_trace(str(folder / f"{name}.json.gz"))
    if cuda:
        torch.cuda.memory._dump_snapshot(str(folder / f"{name}.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
