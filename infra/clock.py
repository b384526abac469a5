"""What a phase took: seconds, memory, and on request every operation.

Owns: the clocks of the phases and the profiler.
Refuses to know: what the phases are, and what becomes of the figures.
"""

import os
import time
from contextlib import contextmanager
from pathlib import Path

from torch import cuda
from torch.profiler import profile

from infra.watchdog import enter

STATUS = Path("/proc/self/status")  # Linux tells there what a process takes
CLEAR = Path("/proc/self/clear_refs")  # ... and forgets the most that it took when this is written


@contextmanager
def timed(times: dict[str, float], phase: str):
    """Adds the block's seconds to times["time/<phase>"] and times["time/step"]; keeps the most
    memory that this process took in it in times["perf/peak_gb_<phase>"]. Waits for the GPU: the
    blame falls on the right phase."""
    enter(phase)
    start = time.perf_counter()
    before = unseen()
    if cuda.is_available():
        cuda.reset_peak_memory_stats()
    elif os.access(CLEAR, os.W_OK):  # from here on VmHWM is the peak of resident memory
        CLEAR.write_text("5")
    yield
    if cuda.is_available():
        cuda.synchronize()
    seconds = time.perf_counter() - start
    for name in (f"time/{phase}", "time/step"):
        times[name] = times.get(name, 0.0) + seconds
    peak = f"perf/peak_gb_{phase}"
    times[peak] = max(times.get(peak, 0.0), memory_peak(before))


def unseen() -> int:
    """Bytes of the card that torch's allocator does not know of (contexts, NCCL), less those of a
    sleeping engine, that it counts although they are free."""
    if not cuda.is_available():
        return 0
    free, total = cuda.mem_get_info()
    return total - free - cuda.memory_reserved()


def memory_peak(before: int = 0) -> float:
    """GB (2**30) taken of the card, or on CPU by this process, at most since the phase began.
    `before` is what `unseen` said then: an engine may wake or fall asleep in between, and is
    counted."""
    if cuda.is_available():
        return (cuda.max_memory_allocated() + max(before, unseen())) / 2**30
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    return 0.0


@contextmanager
def profiled(folder: Path | None, name: str):
    """Records every operation of the block in folder/name.json.gz, for ui.perfetto.dev; on CUDA
    also every allocation, in name.pickle, for pytorch.org/memory_viz. Without a folder, nothing."""
    if not folder:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    if cuda.is_available():
        cuda.memory._record_memory_history(max_entries=1_000_000, stacks="python")
    with profile(record_shapes=True, profile_memory=True) as profiler:
        yield
    profiler.export_chrome_trace(f"{folder}/{name}.json.gz")
    if cuda.is_available():
        cuda.memory._dump_snapshot(f"{folder}/{name}.pickle")
        cuda.memory._record_memory_history(enabled=None)
