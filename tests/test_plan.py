"""The memory plan: against numbers by hand, against itself, and against what a run really takes."""

import ctypes
import functools
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # this file is also the program that is measured
import ppo  # noqa: E402, I001  (first: the guard for the name `kernels`)

from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402

import data  # noqa: E402
import rewards  # noqa: E402
import toy  # noqa: E402
from infra import clock  # noqa: E402
import tools.plan  # noqa: E402
from tools.plan import memory_plan, model_shape  # noqa: E402


def qwen(
    hidden: int, layers: int, heads: int, mlp: int, tied: bool, vocab: int = 151_936
) -> Qwen2Config:
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
    }
    return Qwen2Config(
        **sizes, num_key_value_heads=2, intermediate_size=mlp, tie_word_embeddings=tied
    )


HALF = qwen(896, 24, 14, 4864, True)
SMALL = qwen(1536, 28, 12, 8960, False)


def like_large(layers: int) -> Qwen2Config:
    return qwen(2048, layers, 16, 11008, True)


LARGE = like_large(36)
CARD = dict(
    ranks=4,
    card_gb=80,
    bf16=True,
    gradient_checkpointing=True,
    max_tokens_per_microbatch=18_000,
    sequences=256,
    longest=17_384,
    tp=1,
    gpu_memory=0.6,
    max_seqs=256,
    engine="vllm",
    sharded=True,
)


@pytest.fixture(autouse=True)
def shapes_once(monkeypatch):
    """To count a model of 36 layers takes a tenth of a second; most plans here are of the same few."""
    monkeypatch.setattr(tools.plan, "model_shape", shape_once)


@functools.cache
def shape_of(config: str, critic: bool) -> tools.plan.Shape:
    return model_shape(Qwen2Config.from_dict(json.loads(config)), critic)


def shape_once(config: Qwen2Config, critic: bool) -> tools.plan.Shape:
    return shape_of(config.to_json_string(use_diff=False), critic)


def plan(model=SMALL, critic=None, reference=None, **flags) -> tuple[dict[str, float], str]:
    """GB by item, and of the totals; and what people read."""
    given = CARD | flags
    given.setdefault("prompts_per_step", given["sequences"])
    found = memory_plan(model, critic or model, reference, **given)
    totals = {f"while {part}": gb for part, gb in found.totals.items()}
    return found.items | totals, found.text


# ------------------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    "config, published", [(HALF, 494_032_768), (SMALL, 1_777_088_000), (LARGE, 3_085_938_688)]
)
def test_parameters_are_the_published_numbers(config, published):
    """Guards a tied head counted twice (the first and the third), an untied one once, and a critic with a head."""
    assert model_shape(config, critic=False).params == published
    without_head = published - (0 if config.tie_word_embeddings else 151_936 * 1536)
    assert model_shape(config, critic=True).params == without_head + config.hidden_size + 1


def test_numbers_by_hand():
    """Guards each item against a lost factor: a state of AdamW, the ranks, the layers, the bytes of a number."""
    items, _ = plan(reference=HALF)  # 1.777B parameters over four ranks
    policy, critic, gb = 1_777_088_000, 1_543_714_304 + 1537, 2**30
    bytes_by_hand = {
        "policy weights": 4 * policy / 4,
        "policy gradients": 4 * policy / 4,
        "policy Adam states": 8 * policy / 4,
        "critic Adam states": 8 * critic / 4,
        "reference weights": 4 * 494_032_768 / 4,
        # bf16, a checkpoint a layer, the norm and the head
        "policy activations": 2 * 18_000 * (28 + 3) * 1536,
        "(B, T) tensors": 51 * 256 * 17_384,
        "log-probs, head gradient": 3 * (128 << 20) + (2 + 4) * 18_000 * 1536 + 2 * 151_936 * 1536,
        "engine weights": 2 * policy,
        "KV cache": 0.6 * 80 * gb - 2 * policy - 16_384 * 3 * 2 * (8960 + 1536),
    }
    assert {name: items[name] * gb for name in bytes_by_hand} == pytest.approx(bytes_by_hand)
    # the critic is elsewhere, the policy over two ranks
    moved, _ = plan(reference=HALF, offload=["critic"], replicas=2)
    assert moved["policy Adam states"] * gb == pytest.approx(8 * policy / 2)
    assert not {"critic weights", "critic Adam states", "critic gradients"} & moved.keys()
    assert "critic activations" in moved
    assert plan(LARGE, tp=2)[0]["engine weights"] * gb == pytest.approx(2 * 3_085_938_688 / 2)
    text = plan(reference=HALF)[1]
    token = 2 * 2 * 28 * 2 * 128  # k and v, bf16, 28 layers, two heads of 128
    tokens = bytes_by_hand["KV cache"] / token
    held = f"{tokens:,.0f} tokens, {tokens / 17_384:.1f} sequences of 17384"
    assert f"KV cache: {held}; 64 want to run" in text


ON_CPU = {"ranks": 1, "bf16": False, "engine": "torch", "sharded": False}


def test_the_optimizer_step_by_hand():
    """Guards a total that leaves out an item. One token to train on: next to nothing but weights, on CPU."""
    items, _ = plan(SMALL, **ON_CPU, max_tokens_per_microbatch=1, longest=1, sequences=1)
    policy, critic, embedding = 1_777_088_000, 1_543_714_304 + 1537, 151_936 * 1536
    kept = 12 * (policy + critic) + 4 * policy  # weights and states of both, the sampler's copy
    assert items["while updating"] * 2**30 == pytest.approx(
        kept + 4 * policy + 4 * embedding, rel=1e-4
    )


def test_activations_by_hand():
    """Guards the count of what one layer keeps: on CPU 4 bytes of 6 hidden + 3 q + 2 k + 4 MLP elements a token."""
    items, _ = plan(
        HALF, **ON_CPU, gradient_checkpointing=False, max_tokens_per_microbatch=1000, longest=1000
    )
    layer = 6 * 896 + 3 * 896 + 2 * 128 + 4 * 4864
    assert items["policy activations"] * 2**30 == pytest.approx(4 * 1000 * (24 * layer + 4 * 896))


# ------------------------------------------------------------------------------------------------------ against itself


def totals(*models, **flags) -> tuple[float, float]:
    items, text = plan(*models, **flags)
    both = items["while sampling"], items["while updating"]
    assert ("does not fit" in text) == (max(both) > (CARD | flags)["card_gb"])
    return both


@pytest.mark.parametrize("model", [HALF, LARGE])
def test_more_of_anything_never_needs_less(model):
    """Guards a sign, or a division by the ranks of what no rank shares."""
    for steps in (
        [{"ranks": n} for n in (64, 16, 8, 4, 2, 1)],
        [{"max_tokens_per_microbatch": n} for n in (17_384, 18_000, 30_000, 60_000)],
        [{"gradient_checkpointing": True}, {"gradient_checkpointing": False}],
        [{"sequences": n} for n in (64, 256, 1024)],
        [{"gpu_memory": g} for g in (0.2, 0.4, 0.8)],
        [{"reference": None}, {"reference": HALF}, {"reference": LARGE}],
        [{"critic": HALF}, {"critic": LARGE}],
        [{"replicas": n, "reference": LARGE} for n in (1, 2, 4)],
        [
            {"offload": m, "reference": LARGE}
            for m in (["policy", "critic", "reference"], ["policy", "critic"], ["policy"], [])
        ],
    ):
        found = [totals(**{"model": model} | step) for step in steps]
        for one in zip(*found):
            assert list(one) == sorted(one), steps
    # the engine sleeps meanwhile
    assert totals(model, gpu_memory=0.4)[1] == totals(model, gpu_memory=0.8)[1]


def test_the_reference_run_fits():
    """Guards the order of magnitude of the run that this repository is made for: four cards of 80 GB, run_4xh100.sh."""
    items, text = plan(reference=SMALL)
    assert 55 < items["while sampling"] < 75
    assert 12 < items["while updating"] < 30
    assert "\nfits in 80 GB" in text
    assert totals(reference=SMALL, gpu_memory=0.9)[0] > 80


HOPELESS = "no flag is enough alone"
TIGHT = [  # model, flags, what of the advice must be there
    (SMALL, {"gpu_memory": 0.9}, "gpu_memory"),
    (
        SMALL,
        {"gradient_checkpointing": False, "max_tokens_per_microbatch": 60_000},
        "gradient_checkpointing",
    ),
    (
        SMALL,
        {"max_tokens_per_microbatch": 600_000, "longest": 8_000, "sequences": 1024},
        "max_tokens_per_microbatch",
    ),
    (LARGE, {"gpu_memory": 0.6, "ranks": 2, "tp": 2, "longest": 1280}, "GPUs"),
    (LARGE, {"gpu_memory": 0.4, "ranks": 2, "tp": 2, "longest": 1280, "card_gb": 70}, "kl_coef"),
    (LARGE, {"ranks": 1, "longest": 1280, "gpu_memory": 0.2, "sharded": False}, "critic_model"),
    (LARGE, {"ranks": 1, "longest": 1280, "card_gb": 8, "sequences": 1021}, HOPELESS),
]


@pytest.mark.parametrize("model, flags, expected", TIGHT)
def test_following_the_advice_helps(model, flags, expected):
    """Guards advice that is not enough, or that could have been milder, or that nobody can follow."""
    _, text = plan(model, reference=model, **flags)
    advice = dict(re.findall(r"while (sampling|updating): (.+)", text))
    assert advice and any(expected in line for line in advice.values()), text
    assert max(totals(model, reference=model, **flags)) > (CARD | flags)["card_gb"]

    def fits(what: str, model=model, **changed) -> bool:
        given = {"reference": model} | flags | changed
        return totals(model, **given)[what == "updating"] <= (CARD | flags)["card_gb"]

    for what, line in advice.items():
        for way in [] if line == HOPELESS else line.split(" or "):
            number = (re.findall(r"[\d.,]*\d", way) or [""])[-1].replace(",", "")
            if "gpu_memory" in way:
                assert fits(what, gpu_memory=float(number))
                assert not fits(what, gpu_memory=float(number) + 0.01)
            elif "checkpointing" in way:
                assert fits(what, gradient_checkpointing=True)
            elif "max_tokens" in way:
                assert (CARD | flags)["longest"] <= int(number)
                limit = int(number)
                assert fits(what, max_tokens_per_microbatch=limit)
                assert not fits(what, max_tokens_per_microbatch=limit + 1)
            elif "GPUs" in way:
                assert int(number) % (CARD | flags)["tp"] == 0
                assert fits(what, ranks=int(number), sharded=True)
            elif "offload" in way:
                *milder, _ = models = way.removeprefix("--offload ").split()
                assert fits(what, offload=models, sharded=True)
                assert not fits(what, offload=milder, sharded=True)
            elif "kl_coef" in way:
                assert fits(what, reference=None)
            else:  # the nearest real one below: fewer layers of the same kind
                least, more = (model_shape(like_large(n), True).params for n in (1, 2))
                layers = 1 + (int(number) - least) // (more - least)
                assert "critic_model" in way and fits(what, critic=like_large(layers))


def test_a_cache_that_is_too_small_is_said():
    """Guards a plan that fits on paper and an engine that does not start: not one answer of full length has room."""
    assert "holds no sequence of full length" in plan(gpu_memory=0.055)[1]
    assert "holds no sequence" not in plan(gpu_memory=0.1)[1]


# ------------------------------------------------------------------------------------------- against what a run takes


class Job(NamedTuple):
    """A run of two steps, each of two micro-batches for each model: optimizer states, and gradients while activations
    are at their peak. Random models do not hit one id among hundreds, so every answer has its full length."""

    shape: dict
    rows: int  # sequences in a micro-batch
    prompt: int
    new: int
    checkpointing: bool = True

    @property
    def budget(self) -> int:
        return self.rows * (self.prompt + self.new - 1)


def shape(hidden: int, layers: int, vocab: int, tied: bool) -> dict:
    return qwen(hidden, layers, hidden // 32, 4 * hidden, tied, vocab).to_dict()


JOBS = {  # by what takes most; as much memory for as few operations as can be
    "Adam states": Job(shape(384, 4, 12_000, tied=False), rows=4, prompt=60, new=4),
    "activations": Job(
        shape(128, 6, 512, tied=True), rows=48, prompt=60, new=4, checkpointing=False
    ),
    "one layer": Job(shape(128, 2, 512, tied=True), rows=160, prompt=60, new=4),
    "log-probs": Job(shape(128, 2, 16_000, tied=True), rows=32, prompt=4, new=28),
}


def load_long(split: str, seed: int, template: str) -> list[dict]:
    rows = toy.load_toy(split, seed, template)
    return [
        row | {"task": "long", "prompt": row["answer"] * (load_long.tokens - 1) + "="}
        for row in rows
    ]


def train(out: str, model: str, job: Job) -> float:
    """GB that ppo.train takes at its peak, on top of what the process has before."""
    data.TASKS["long"], rewards.REWARDS["long"], load_long.tokens = load_long, toy.toy, job.prompt
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = clock.memory_peak()
    flags = (
        f"--task long --engine torch --steps 2 --prompts_per_step {2 * job.rows} "
        f"--max_prompt_tokens {job.prompt} --max_new_tokens {job.new} "
        f"--max_tokens_per_microbatch {job.budget} --gradient_checkpointing"
    ).split()
    if not job.checkpointing:
        flags.append("--no-gradient_checkpointing")
    rows = ppo.train(ppo.parse_args(["--out", out, "--model", model, *flags]))
    return max(clock.memory_peak(), *(row["perf/peak_gb"] for row in rows)) - before


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, float]:
    """One process takes all the measurements, after a run of a tiny model that pays for imports and threads. A new
    interpreter, as the C library reads its settings at the start."""
    at = tmp_path_factory.mktemp("plan")
    for name, job in JOBS.items():
        toy.make_model(at / name)  # for its tokenizer
        special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
        Qwen2ForCausalLM(Qwen2Config(**job.shape | special)).save_pretrained(at / name)
    # every tensor worth counting gets pages of its own, which go back at once: the peak is what was alive
    env = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "131072",
        "MALLOC_TRIM_THRESHOLD_": "131072",
        "MALLOC_ARENA_MAX": "1",
    }
    env |= {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"
    }  # in large pages, where there are: half the time
    run = subprocess.run(
        [sys.executable, __file__, str(at)], env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.full
@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs /proc/self/clear_refs"
)
@pytest.mark.parametrize("name", JOBS)
def test_the_plan_is_what_a_run_takes(name, measured):
    """Guards every item that the plan forgets, and every copy that the trainer starts to keep."""
    job = JOBS[name]
    items, _ = plan(
        Qwen2Config(**job.shape),
        **ON_CPU,
        gradient_checkpointing=job.checkpointing,
        max_tokens_per_microbatch=job.budget,
        sequences=2 * job.rows,
        longest=job.prompt + job.new,
    )
    total = max(gb for item, gb in items.items() if item.startswith("while "))
    print(
        f"{name}: planned {total:.3f} GB, measured {measured[name]:.3f} GB, ratio {total / measured[name]:.3f}"
    )
    assert abs(total / measured[name] - 1) < 0.2


if __name__ == "__main__":
    folder, peaks = Path(sys.argv[1]), {}
    toy.make_model(folder / "warm")
    for name, job in {"warm": Job({}, rows=8, prompt=4, new=4), **JOBS}.items():
        peaks[name] = train(f"{folder}/run {name}", f"{folder}/{name}", job)
    print(json.dumps(peaks))
