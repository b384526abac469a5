"""How much faster, how much smaller? Markdown tables of

    python tools/bench/bench.py [packed logprob trl sampling sync scaling]

Every number that matters is a ratio of two things that were measured in turn, A B A B, in one run: machines are noisy,
and a time of today says nothing about a time of yesterday. Behind each median stand the least and the largest ratio.
Models are random, seeds fixed, files temporary. One thread a process, but for `logprob`.
"""

import functools
import gc
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "OMP_WAIT_POLICY": "PASSIVE"}
os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR"}
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import ppo  # noqa: E402, I001  (first: the guard for the name `kernels`)

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, Qwen2Config  # noqa: E402

import data  # noqa: E402
import kernels  # noqa: E402
import rewards  # noqa: E402
import rollout  # noqa: E402
import tiny  # noqa: E402
from infra import clock, dist, models  # noqa: E402

CUDA = torch.cuda.is_available()
ALONE = dist.Ranks()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
# flags of ppo.py: the step that TRL is compared with, and run_cpu.sh
DEMO = [
    "--prompts_per_step",
    "128",
    "--samples_per_prompt",
    "4",
    "--minibatch_size",
    "256",
    "--max_prompt_tokens",
    "32",
    "--max_new_tokens",
    "160",
    "--max_tokens_per_microbatch",
    "8000",
    "--lr",
    "1e-6",
]
TRL = [
    "--max_new_tokens",
    "256",
    "--prompts_per_step",
    "64",
    "--samples_per_prompt",
    "4",
    "--max_prompt_tokens",
    "64",
    "--max_tokens_per_microbatch",
    "8000",
    "--lr",
    "1e-6",
]

# ---------------------------------------------------------------------------------------------------------- measuring


def alternate(rounds: int, *ways: Callable[[], object]) -> list[list[float]]:
    """Seconds of each way, taken in turn. A first round warms up and does not count."""
    times: list[list[float]] = [[] for _ in ways]
    for turn in range(rounds + 1):
        for way, seconds in zip(ways, times):
            gc.collect()
            begun = time.perf_counter()
            way()
            if CUDA:
                torch.cuda.synchronize()
            if turn:
                seconds.append(time.perf_counter() - begun)
    return times


def spread(xs: list[float], digits: int = 2) -> str:
    return f"{statistics.median(xs):.{digits}f} ({min(xs):.{digits}f} to {max(xs):.{digits}f})"


def ratio(over: list[float], under: list[float]) -> str:
    return spread([a / b for a, b in zip(over, under, strict=True)])


def table(title: str, columns: str, rows: list[list]) -> None:
    """Columns are separated by `|`, as they will be."""
    print(f"\n**{title}**\n\n| {columns} |\n|" + "---|" * (columns.count("|") + 1))
    for row in rows:
        print(
            "| "
            + " | ".join(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row)
            + " |"
        )
    sys.stdout.flush()


def child(function: Callable, ranks: int = 0, threads: int = 1, **given):
    """What `function(**given)` says in a fresh process, or on rank 0 of `ranks` processes under torchrun."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
            if ranks
            else []
        )
        call = [__file__, "child", function.__name__, json.dumps(given), f"{folder}/answer"]
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_DATASETS_CACHE": f"{folder}/cache"}
        run = subprocess.run(
            [sys.executable, *launcher, *call], env=env, cwd=folder, capture_output=True, text=True
        )
        if run.returncode:
            raise RuntimeError(
                f"{function.__name__} {given}: {run.stdout[-500:]}\n{run.stderr[-3000:]}"
            )
        return json.loads(Path(folder, "answer").read_text())


def make_model(path: str, hidden: int, layers: int, vocab: int = 384, stops: bool = False) -> str:
    """A random Qwen2 with the tokenizer of tests/tiny.py. It seldom ends an answer, or, with `stops`, after any token
    with a chance of about one in fifty, so that lengths have a long tail."""
    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizer()
    config = Qwen2Config(
        vocab_size=max(vocab, len(tokenizer)),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if stops:
        with torch.no_grad():  # all embeddings share a large part, and that of EOS is larger
            model.get_input_embeddings().weight[:, 0] = 2.0
            model.get_input_embeddings().weight[config.eos_token_id, 0] = 2.8
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def parameters(path: str) -> str:
    return f"{sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(path).parameters()) / 1e6:.1f}M"


def load_pair(path: str) -> tuple:
    """Ranks, policy and critic as ppo.py has them."""
    accelerator, ranks = dist.start_ranks(bf16=CUDA, sp=1)
    kernels.setup("qwen2", liger=False, progress=False, bf16=CUDA)
    policy = models.load_policy(path, kernels.LogprobHead, accelerator)
    return ranks, policy, models.load_critic(path, accelerator)


def random_batch(lengths: list[int], vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask, (B, T): an eighth of each sequence, at most 64 tokens, is its prompt."""
    noise = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (len(lengths), max(lengths)), generator=noise)
    column, length = torch.arange(max(lengths)), torch.tensor(lengths)[:, None]
    mask = (column >= (length // 8).clamp(1, 64)) & (column < length)
    return ids.masked_fill(column >= length, 0).to(DEVICE), mask.to(DEVICE)


def packed_update(
    policy, critic, ids, mask, lengths: list[int], budget: int, ranks=ALONE
) -> torch.Tensor:
    """Forward and backward of both models on packed rows; the loss. Advantages and returns are made up."""
    total, scale = torch.zeros((), device=ids.device), ranks.world / mask.sum()
    micro = data.plan_microbatches([n - 1 for n in lengths], budget, ranks.rows)[ranks.row]
    for p in (kernels.pack(ids, mask, lengths, rows) for rows in micro):
        target = torch.cos(p.index.float())
        loss = -(kernels.policy_forward(policy, p, 1.0)[0] * target).sum() * scale
        loss.backward()
        error = 0.5 * ((kernels.critic_forward(critic, p) - target) ** 2).sum() * scale
        error.backward()
        total += (loss + error).detach()
    return total


# ------------------------------------------------------------------------------------------------------------- packed


def padded_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Rows in the order in which they were drawn, as many as fit rows x width."""
    batches: list[list[int]] = [[]]
    for b in range(len(lengths)):
        if (
            batches[-1]
            and (len(batches[-1]) + 1) * max(lengths[i] for i in [*batches[-1], b]) > budget
        ):
            batches.append([])
        batches[-1].append(b)
    return batches


def padded_update(policy, critic, ids, mask, lengths: list[int], budget: int) -> torch.Tensor:
    """packed_update in the usual way."""
    total, scale, length = (
        torch.zeros((), device=ids.device),
        1 / mask.sum(),
        torch.tensor(lengths, device=ids.device),
    )
    places = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
    for rows in padded_batches(lengths, budget):
        width = max(lengths[b] for b in rows)
        x, chosen, target = (
            ids[rows, :width],
            mask[rows, 1:width],
            torch.cos(places[rows, 1:width].float()),
        )
        real = (torch.arange(width, device=ids.device) < length[rows, None]).long()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=CUDA):
            hidden = policy.model(
                input_ids=x, attention_mask=real, use_cache=False
            ).last_hidden_state
            head = policy.lm_head.weight.to(hidden.dtype)
            logprobs, _ = kernels.token_logprobs_ref(
                hidden[:, :-1][chosen], head, x[:, 1:][chosen], 1.0
            )
            values = (
                critic(input_ids=x, attention_mask=real, use_cache=False)
                .logits[:, :-1, 0][chosen]
                .float()
            )
        loss = -(logprobs * target[chosen]).sum() * scale
        loss.backward()
        error = 0.5 * ((values - target[chosen]) ** 2).sum() * scale
        error.backward()
        total += (loss + error).detach()
    return total


def draw(mix: str, tokens: int, longest: int) -> list[int]:
    """long-tailed: log-normal, mean 0.15 of the limit, as answers of reasoning models are; cut at the limit."""
    rng, lengths = random.Random(mix), []
    while sum(lengths) < tokens:
        long_tailed = 0.15 * longest * rng.lognormvariate(-0.5, 1.0)
        n = {"long-tailed": long_tailed, "uniform": rng.uniform(2, longest), "equal": longest // 4}[
            mix
        ]
        lengths.append(int(min(max(n, 2), longest)))
    return lengths


def packed() -> None:
    """Forward and backward of policy and critic over one batch: rows packed by data.plan_microbatches, through
    kernels.py, against right-padded batches in the order drawn, with attention mask, transformers' sdpa and
    logits. Fair: the same weights, loss and limit on the area of a micro-batch; the padded way makes logits of response
    tokens only, which few trainers do. Checked first: equal loss and gradient norms."""
    longest, vocab, rows = 512, 8192, []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path = make_model(f"{folder}/model", 256, 4, vocab)
        _, policy, critic = load_pair(path)
        options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
        plain = AutoModelForCausalLM.from_pretrained(path, **options).to(DEVICE)
        valued = AutoModelForTokenClassification.from_pretrained(path, num_labels=1, **options).to(
            DEVICE
        )
    with torch.no_grad():  # not zero, as it starts: the gradient has to reach the layers
        critic.score.weight.normal_(0, 0.02, generator=torch.Generator(DEVICE).manual_seed(0))
    valued.load_state_dict(critic.state_dict())
    valued.eval()  # no dropout before the value head
    for mix, budget in (("long-tailed", 4), ("long-tailed", 1), ("uniform", 4), ("equal", 4)):
        lengths, budget = draw(mix, 8 * longest, longest), budget * longest
        ids, mask = random_batch(lengths, vocab)
        ours = functools.partial(packed_update, policy, critic, ids, mask, lengths, budget)
        theirs = functools.partial(padded_update, plain, valued, ids, mask, lengths, budget)
        outcomes = []
        for update, pair in ((ours, (policy, critic)), (theirs, (plain, valued))):
            for model in pair:
                model.zero_grad()
            loss = update().item()
            outcomes.append(
                [loss, *(torch.nn.utils.clip_grad_norm_(m.parameters(), 1e9).item() for m in pair)]
            )
        agree = max(abs(a / b - 1) for a, b in zip(*outcomes))
        assert agree < (0.05 if CUDA else 1e-4), f"{mix}: loss and norms {outcomes}"
        fast, slow = alternate(5, ours, theirs)
        slots = sum(
            len(b) * max(lengths[i] for i in b) for b in padded_batches(lengths, budget)
        ) / sum(lengths)
        medians = [f"{statistics.median(times):.2f}" for times in (fast, slow)]
        rows.append(
            [mix, budget, len(lengths), sum(lengths), slots, *medians, f"**{ratio(slow, fast)}**"]
        )
    columns = "lengths | budget | sequences | tokens | padded slots / tokens | packed, s | padded, s | padded / packed"
    table(f"One update, packed against padded (answers up to {longest} tokens)", columns, rows)


# ------------------------------------------------------------------------------------------------------------ logprob


def head_run(which: str, T: int, V: int, H: int) -> Callable[[], object]:
    noise = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(T, H, generator=noise, device=DEVICE).requires_grad_()
    weight = (0.1 * torch.randn(V, H, generator=noise, device=DEVICE)).requires_grad_()
    targets = torch.randint(V, (T,), generator=noise, device=DEVICE)

    def run():
        logprob, entropy = getattr(kernels, which)(hidden, weight, targets, 0.7)
        return torch.autograd.grad(logprob.sum() - 0.01 * entropy.sum(), (hidden, weight))

    return run


def peak(which: str, shape: list[int]) -> float:
    """MB that one forward and backward takes on top of its inputs, in a process that has done no other."""
    head_run(which, 8, 64, 16)()  # threads and libraries
    run, times = head_run(which, *shape), {}
    with clock.timed(times, "before"):
        pass
    with clock.timed(times, "run"):
        run()
    return 1024 * (times["perf/peak_gb_run"] - times["perf/peak_gb_before"])


def head_times(shape: list[int], rounds: int) -> list[list[float]]:
    return alternate(
        rounds, *(head_run(which, *shape) for which in ("token_logprobs", "token_logprobs_ref"))
    )


def logprob() -> None:
    """kernels.token_logprobs against its specification, which makes all logits: log-prob and entropy with gradients for
    hidden states and head. Memory is what a fresh process takes at its peak beyond its inputs; times are taken in turn
    in another process. Two threads."""
    rows, both = [], ("token_logprobs", "token_logprobs_ref")
    free = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        if not CUDA
        else torch.cuda.mem_get_info()[0]
    )
    for *shape, rounds in ((1024, 32_000, 256, 7), (4096, 32_000, 256, 5), (1024, 151_936, 896, 3)):
        if (needs := 6 * 4 * shape[0] * shape[1]) > free:
            rows.append([*shape, f"the naive way needs some {needs / 2**30:.0f} GB"] + [""] * 5)
            continue
        chunked, naive = (child(peak, threads=2, which=which, shape=shape) for which in both)
        fast, slow = child(head_times, threads=2, shape=shape, rounds=rounds)
        rows.append(
            [
                *shape,
                f"{chunked:.0f}",
                f"{naive:.0f}",
                f"**1/{naive / chunked:.1f}**",
                *map(statistics.median, (fast, slow)),
                f"**{ratio(fast, slow)}**",
            ]
        )
    columns = "tokens | vocabulary | hidden | chunked, MB | naive, MB | ratio | chunked, s | naive, s | ratio"
    table("Log-prob and entropy, forward and backward, without the logits", columns, rows)


# ---------------------------------------------------------------------------------------------------------------- trl


def load_bench(split: str, seed: int, template: str) -> list[dict]:
    return [row | {"task": "bench"} for row in data.countdown(split, seed, template)]


def variety(text: str) -> float:
    return len(set(text)) / 100


def bench_reward(text: str, row: dict, rules) -> dict:
    return {"reward": variety(text), "correct": 0.0, "status": "ok"}


def our_run(flags: list[str]) -> list[dict]:
    """metrics.jsonl of ppo.py without its first step."""
    data.TASKS["bench"], rewards.REWARDS["bench"] = load_bench, bench_reward
    return ppo.train(ppo.parse_args([*flags, "--out", "run", "--no_gradient_checkpointing"]))[1:]


def trl_run(
    model: str, prompts: int, samples: int, new: int, steps: int, use_vllm: bool
) -> list[dict]:
    """Seconds of each step of TRL's GRPO but the first, and of the parts that take most of it."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    engine = {}
    if (
        use_vllm
    ):  # what makes it work on CPU: weights that stay plain, and fp32 as asked for on our side
        import trl.generation.vllm_generation as theirs

        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        rollout._prepare_cpu()
        theirs.LLM = functools.partial(
            theirs.LLM, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=256 << 20
        )
        engine = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 64 + new}
    config = GRPOConfig(
        output_dir="trl",
        per_device_train_batch_size=prompts * samples,
        num_generations=samples,
        max_steps=steps,
        max_completion_length=new,
        learning_rate=1e-6,
        beta=0.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not CUDA,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        seed=0,
        **engine,
    )
    rows = load_bench("train", 0, "base")[: prompts * steps]
    trainer = GRPOTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        reward_funcs=lambda completions, **_: [variety(text) for text in completions],
    )
    parts, history = {}, []

    def watch(key: str, call: Callable) -> Callable:
        def watched(*given, **named):
            with clock.timed(parts, key):
                return call(*given, **named)

        return watched

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.begun = time.perf_counter()

        def on_step_end(self, *_, **__):
            history.append(parts | {"time/step": time.perf_counter() - self.begun})
            parts.clear()

    watched = {
        "generate": "_generate_single_turn",
        "reward": "_calculate_rewards",
        "loss": "compute_loss",
    }
    for key, name in watched.items() | {("log-probs", "_get_per_token_logps_and_entropies")}:
        setattr(trainer, name, watch(key, getattr(trainer, name)))
    trainer.add_callback(Clock())
    trainer.train()
    lengths = [
        row["completions/mean_length"]
        for row in trainer.state.log_history
        if "completions/mean_length" in row
    ]
    return [row | {"rollout/length_mean": n} for row, n in zip(history, lengths)][1:]


def trl() -> None:
    """A whole step of ppo.py, with vLLM, against one of TRL's GRPO: same prompts, samples, model, lengths, reward, one
    optimizer step, fp32, one process with one thread. TRL: no reference (beta 0), no checkpointing, the batch in one
    piece, its default engine (transformers), or vLLM in its process. Not equal, in TRL's favour: GRPO has no critic,
    ours has one to run and train, and proves after every step that the engine has the new weights. TRL supports
    vLLM 0.22 to 0.31 and GPUs; on CPU its weight sync raises, so that run has our corrections, _prepare_cpu."""
    if not importlib.util.find_spec("trl"):
        print("\ntrl: not installed (pip install --no-deps trl==1.16.0 datasets)")
        return
    size = {"prompts": 64, "samples": 4, "new": 256, "steps": 4}
    for stops, launches in ((True, 2), (False, 1)):
        sides: dict[str, list[dict]] = {"ours": [], "transformers": [], "vLLM": []}
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            model = make_model(f"{folder}/model", 128, 3, stops=stops)
            for _ in range(launches):
                sides["ours"] += child(
                    our_run, flags=["--model", model, "--task", "bench", "--steps", "4", *TRL]
                )
                for engine in ("transformers", "vLLM"):
                    sides[engine] += child(trl_run, model=model, use_vllm=engine == "vLLM", **size)
        rows, ours = [], [row["time/step"] for row in sides["ours"]]
        for who, steps in sides.items():
            seconds, length = (
                [row[key] for row in steps] for key in ("time/step", "rollout/length_mean")
            )
            parts = {
                key: statistics.median(row[key] for row in steps)
                for key in steps[0]
                if key.startswith("time/")
            }
            text = ", ".join(
                f"{key[5:]} {t:.2f}" for key, t in parts.items() if t > 0.005 and key != "time/step"
            )
            against = f"**{ratio(seconds, ours)}**" if who != "ours" else ""
            name = who if who == "ours" else f"TRL, {who}"
            rows.append([name, f"{statistics.mean(length):.0f}", spread(seconds), against, text])
        lengths = "lengths with a long tail" if stops else "most answers as long as they may be"
        table(
            f"A step of 64 x 4 answers of at most 256 tokens, {lengths}",
            " | answer, tokens | step, s | TRL / ours | parts, s (TRL's loss: only its forward)",
            rows,
        )


# ----------------------------------------------------------------------------------------------------------- sampling


def sampling_run(model: str, prompts: int, n: int, new: int) -> list[list[float]]:
    """Tokens a second of each round, bare vLLM and through the sampler."""
    from vllm import SamplingParams

    engine = rollout.VLLMSampler(model, [1], 64 + new, dtype=str(DTYPE)[6:])
    rng = random.Random(0)
    asked = [[rng.randrange(2, 300) for _ in range(rng.randrange(16, 48))] for _ in range(prompts)]
    params = [
        SamplingParams(
            n=n,
            max_tokens=new,
            seed=i * n,
            stop_token_ids=[1],
            ignore_eos=True,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
        )
        for i in range(prompts)
    ]
    counts = [[], []]

    def bare():
        engine.llm.reset_prefix_cache()  # as the sampler does: prompts of a step are new to the engine
        outputs = engine.llm.generate(
            [{"prompt_token_ids": ids} for ids in asked], params, use_tqdm=False
        )
        counts[0].append(sum(len(c.token_ids) for out in outputs for c in out.outputs))

    def ours():
        counts[1].append(sum(len(s.ids) for s in engine.sample(asked, n, new, 1.0, 0)))

    times = alternate(6, bare, ours)
    assert len({*counts[0], *counts[1]}) == 1, "the same seeds give the same answers"
    engine.close()
    return [[c / t for c, t in zip(count[1:], seconds)] for count, seconds in zip(counts, times)]


def sampling() -> None:
    """Tokens a second through rollout.VLLMSampler.sample against vllm.LLM.generate itself: the same engine object,
    prompts, seeds and sampling parameters, in turn. The difference is what the sampler adds: parameters and lists."""
    rows = []
    for hidden, layers, prompts, n in ((128, 3, 64, 4), (256, 4, 32, 4)):
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            model = make_model(f"{folder}/model", hidden, layers)
            bare, ours = child(sampling_run, model=model, prompts=prompts, n=n, new=128)
            rows.append(
                [
                    parameters(model),
                    f"{prompts} x {n}",
                    *(f"{statistics.median(x):.0f}" for x in (bare, ours)),
                    f"**{ratio(ours, bare)}**",
                ]
            )
    table("Sampling, tokens a second", "model | samples | bare vLLM | VLLMSampler | ratio", rows)


# --------------------------------------------------------------------------------------------------------------- sync


def sync_run(model: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of a weight sync and of a canary like that of ppo.py."""
    ranks, policy, _ = load_pair(model)
    engine = rollout.VLLMSampler(model, [1], 256, dtype=str(DTYPE)[6:])
    prompts = [[5 + i] * 30 for i in range(4)]

    def load():
        engine.load(models.full_weights(policy, DTYPE))

    @torch.no_grad()
    def canary():
        batch = rollout.collate(prompts, engine.sample(prompts, 1, 64, 1.0, 0), DEVICE)
        p = kernels.pack(*batch[:2], batch.lengths, range(4))
        gap = kernels.policy_forward(policy, p, 1.0)[0] - batch.engine_logprobs.view(-1)[p.index]
        assert gap.abs().mean() < (0.05 if CUDA else 0.001)

    times = alternate(rounds, load, canary)
    dist.gather([], ranks)  # close() ends torch.distributed for everybody
    engine.close()
    return dict(zip(("load", "canary"), times))


def sync() -> None:
    """Seconds that the engine needs for the trainer's new weights, and the canary (four answers a rank of at most 64
    tokens, whose log-probs the trainer must find again); then the share of both in whole steps of ppo.py, by its own
    metrics. The model of those steps is random."""
    rows, shares = [], []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for hidden, layers, vocab in ((128, 3, 384), (256, 8, 8192), (512, 8, 32_000)):
            model = make_model(f"{folder}/{hidden}", hidden, layers, vocab, stops=True)
            for ranks in (0, 2):
                times = child(sync_run, ranks, model=model, rounds=5)
                milliseconds = [
                    spread([1000 * t for t in times[name]], 0) for name in ("load", "canary")
                ]
                rows.append([parameters(model), ranks or 1, *milliseconds])
        for name, flags, ranks in (
            ("as in `trl`", TRL, 0),
            ("run_cpu.sh", DEMO, 0),
            ("run_cpu.sh", DEMO, 2),
        ):
            flags = ["--model", f"{folder}/128", "--task", "bench", "--steps", "5", *flags]
            steps = child(our_run, ranks, flags=flags)
            part = [100 * row["time/sync"] / row["time/step"] for row in steps]
            seconds = [
                statistics.median(row[key] for row in steps) for key in ("time/sync", "time/step")
            ]
            length = f"{statistics.mean(row['rollout/length_mean'] for row in steps):.0f}"
            shares.append([name, ranks or 1, length, *seconds, f"**{spread(part, 1)} %**"])
    table("Trainer to engine, milliseconds", "model | ranks | load | canary", rows)
    table("Share of a step", "run | ranks | answer, tokens | sync, s | step, s | share", shares)


# ------------------------------------------------------------------------------------------------------------ scaling


def scaling_run(model: str, lengths: list[int], tokens: int, rounds: int) -> list[list[float]]:
    """Seconds of an update of `tokens` tokens in sequences of each length; equal on all ranks, as they wait for all."""
    ranks, policy, critic = load_pair(model)
    trained = [
        models.Trained(m, torch.optim.AdamW(m.parameters(), lr=1e-4)) for m in (policy, critic)
    ]

    def update(length: int):
        sequences = [length] * (tokens // length)
        ids, mask = random_batch(sequences, 300)
        packed_update(policy, critic, ids, mask, sequences, max(lengths), ranks)
        for one in trained:
            models.optimizer_step(one, 1e-4, 1.0)

    return alternate(rounds, *(functools.partial(update, length) for length in lengths))


def scaling() -> None:
    """An update (both models, forward, backward, optimizer) of as many tokens in sequences of other lengths: layers
    cost the same, attention grows with the length. Then in one, two and four processes under torchrun, where FSDP2
    gathers and reduces: more processes than cores cannot be faster, they show what sharding costs."""
    lengths, tokens, cores = [512, 1024, 2048, 4096, 8192], 8192, os.cpu_count()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        model = make_model(f"{folder}/model", 128, 2)
        times = child(scaling_run, model=model, lengths=lengths, tokens=tokens, rounds=5)
        rows = [[n, statistics.median(t), ratio(t, times[0])] for n, t in zip(lengths, times)]
        table(
            f"An update of {tokens} tokens, by the length of its sequences",
            "length | seconds | ratio",
            rows,
        )
        rows, rounds = [], 2  # launches in turn
        shapes = (0, 1, 2, 4)
        sides = [
            [
                child(scaling_run, n, model=model, lengths=[1024], tokens=16384, rounds=3)[0]
                for n in shapes
            ]
            for _ in range(rounds)
        ]
        columns = [sum((run[k] for run in sides), []) for k in range(len(shapes))]
        for n, t in zip(shapes, columns):
            note = " (more than cores)" if n > cores else ""
            rows.append(
                [
                    f"{n or 'one, without torchrun'}{note}",
                    statistics.median(t),
                    ratio(t, columns[0]),
                ]
            )
        table(
            f"An update of 16384 tokens in sequences of 1024, {cores} cores",
            "processes | seconds | ratio",
            rows,
        )


# --------------------------------------------------------------------------------------------------------------- main

PARTS = {
    "packed": packed,
    "logprob": logprob,
    "trl": trl,
    "sampling": sampling,
    "sync": sync,
    "scaling": scaling,
}
CHILDREN = (peak, head_times, our_run, trl_run, sampling_run, sync_run, scaling_run)


def main(wanted: list[str]) -> None:
    if unknown := [name for name in wanted if name not in PARTS]:
        raise SystemExit(f"no part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    processor = torch.cuda.get_device_name() if CUDA else platform.processor() or platform.machine()
    load = os.getloadavg()[0]
    print(
        f"{date.today()}, {os.cpu_count()} cores, {processor}, torch {torch.__version__}, load {load:.1f}"
    )
    for name in wanted or PARTS:
        begun = time.perf_counter()
        PARTS[name]()
        print(f"\n({name}: {time.perf_counter() - begun:.0f} s)", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        _, _, function, given, where = sys.argv
        answer = {f.__name__: f for f in CHILDREN}[function](**json.loads(given))
        if os.environ.get("RANK", "0") == "0":
            Path(where).write_text(json.dumps(answer))
    else:
        main(sys.argv[1:])
