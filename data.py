"""Which prompts, in which order, as which token ids; and which sequences share a micro-batch.

Owns: loading or generating rows, prompt wording, the order of rows, token-budget planning. Pure Python: every function
here gives the same answer for the same arguments on every rank, so no rank ever has to ask another one.
Refuses to know: models, rewards, torch.
Left out on purpose: a DataLoader. Batch `step` is a function of (rows, step, size, seed); resuming is passing the step.

A row is the only contract with rewards.py: {"task": str, "prompt": str | list[dict], "answer": ..., "id": str}.
"prompt" is text for a base model, or chat messages, to which the tokenizer's template is applied at run time.
"""
import hashlib
import random
from fractions import Fraction
from functools import partial

# ---------------------------------------------------------------------------------------------- Countdown, generated

BASE_PROMPT = (
    "Use the numbers {numbers} exactly once each with + - * / and parentheses to make {target}. "
    "Think inside <think> </think>, then write the expression inside <answer> </answer>.\n<think>"
)
CHAT_PROMPT = (
    "Make {target} out of the numbers {numbers}. Use each of them exactly once, with + - * / and parentheses. "
    "Think first, inside <think> </think>. Then write nothing but the expression inside <answer> </answer>, "
    "for example <answer>(1+2)/3</answer>."
)


def is_held_out(numbers: list[int]) -> bool:
    """One set of numbers in ten belongs to the test split, whatever the seed: no test problem shares its numbers with
    a training problem."""
    return hashlib.sha256(repr(sorted(numbers)).encode()).digest()[0] % 10 == 0


def countdown(
    split: str, seed: int, template: str, sizes: tuple[int, ...] = (3, 4), max_number: int = 99, train: int = 20_000
) -> list[dict]:
    """`train` distinct problems, or 1,024 for the test split, with numbers in 1..max_number and a whole target in
    1..100. Solvable by construction: the target is the value of a random expression over the numbers."""
    rng = random.Random(f"countdown {split} {seed}")
    seen, out = set(), []
    while len(out) < (train if split == "train" else 1_024):
        numbers = [rng.randint(1, max_number) for _ in range(rng.choice(sizes))]
        if is_held_out(numbers) != (split == "test"):
            continue
        values = [Fraction(n) for n in numbers]
        while len(values) > 1:  # combine two of them until one value is left
            a, b = (values.pop(rng.randrange(len(values))) for _ in range(2))
            values.append(rng.choice([a + b, a - b, a * b] + ([a / b] if b else [])))
        target, key = values[0], (tuple(sorted(numbers)), values[0])
        if target.denominator != 1 or not 1 <= target <= 100 or key in seen:
            continue
        seen.add(key)
        words = {"numbers": ", ".join(map(str, numbers)), "target": int(target)}
        if template == "chat":
            prompt = [{"role": "user", "content": CHAT_PROMPT.format(**words)}]
        else:
            prompt = BASE_PROMPT.format(**words)
        answer = {"numbers": numbers, "target": int(target)}
        out.append({"task": "countdown", "prompt": prompt, "answer": answer, "id": f"countdown-{split}-{len(out)}"})
    return out


# ------------------------------------------------------------------------------------------------- rows to token ids


def load(task: str, split: str, seed: int = 0, template: str = "base", limit: int | None = None) -> list[dict]:
    """The rows of `task`; split is "train" or "test". `limit` keeps the first so many."""
    if task not in TASKS:
        raise ValueError(f"task={task!r} is not known: use one of {sorted(TASKS)}, or add a loader to TASKS in data.py")
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: use 'train' or 'test'")
    if template not in ("base", "chat"):
        raise ValueError(f"template={template!r}: use 'base' or 'chat'")
    return TASKS[task](split, seed, template)[:limit]


def encode(row: dict, tokenizer, max_tokens: int) -> list[int]:
    """Token ids of the prompt, chat template included (applied here and never baked into files); the same ids are
    fed to the engine and to the trainer."""
    if isinstance(row["prompt"], str):
        ids = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    if not 0 < len(ids) <= max_tokens:
        raise ValueError(
            f"row {row['id']}: its prompt has {len(ids)} tokens, allowed are 1 to max_prompt_tokens={max_tokens}: "
            f"raise --max_prompt_tokens or drop the row"
        )
    return ids


def batch(rows: list[dict], step: int, size: int, seed: int = 0) -> list[dict]:
    """Batch `step` (0, 1, ...) of `size` rows. Every row comes once an epoch; each epoch has its own order."""
    out: list[dict] = []
    for i in range(step * size, (step + 1) * size):
        epoch, place = divmod(i, len(rows))
        if not out or place == 0:
            order = list(range(len(rows)))
            random.Random(f"epoch {epoch} {seed}").shuffle(order)
        out.append(rows[order[place]])
    return out


# ------------------------------------------------------------------------------------------- token-budget micro-batches


def cost(length: int, quadratic: float = 1 / 8192) -> float:
    """Relative cost of one sequence in a forward pass: the matmuls grow with L, attention with L^2. The default makes
    both equal at 8,192 tokens, about right for a 1.5B model (12 D^2 against 2 L D a layer and token, D = 1536)."""
    return length + quadratic * length * length


def plan_microbatches(lengths: list[int], budget: int, ranks: int = 1) -> list[list[list[int]]]:
    """plan[rank][k] = indices (into `lengths`) of the sequences that rank runs as its micro-batch k.

    The budget is hard: sum of lengths <= budget in every micro-batch. Every rank gets the same number of them (FSDP
    hangs otherwise; some may be empty), as few as first-fit-decreasing finds, with costs balanced over micro-batches
    and ranks. Every rank computes the same plan.
    """
    longest = max(lengths, default=0)
    if longest > budget:
        fix = "raise --max_tokens_per_microbatch"
        raise ValueError(f"a sequence of {longest} tokens does not fit the budget of {budget} a micro-batch: {fix}")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))

    bins: list[list[int]] = []  # first fit, longest first
    room: list[int] = []
    for i in order:
        k = next((k for k, free in enumerate(room) if free >= lengths[i]), len(bins))
        if k == len(bins):
            bins.append([])
            room.append(budget)
        bins[k].append(i)
        room[k] -= lengths[i]

    count = max(1, -(-len(bins) // ranks)) * ranks
    even: list[list[int]] = [[] for _ in range(count)]  # same number of bins, now filled evenly by cost where that fits
    room, load = [budget] * count, [0.0] * count
    for i in order:
        fits = [k for k in range(count) if room[k] >= lengths[i]]
        if not fits:
            even = bins + [[] for _ in range(count - len(bins))]
            break
        k = min(fits, key=lambda k: (load[k], k))
        even[k].append(i)
        room[k] -= lengths[i]
        load[k] += cost(lengths[i])

    weight = [sum(cost(lengths[i]) for i in b) for b in even]
    plan: list[list[list[int]]] = [[] for _ in range(ranks)]  # dearest bin to the least loaded rank with a free slot
    total = [0.0] * ranks
    for k in sorted(range(count), key=lambda k: (-weight[k], k)):
        r = min((r for r in range(ranks) if len(plan[r]) < count // ranks), key=lambda r: (total[r], r))
        plan[r].append(even[k])
        total[r] += weight[k]
    return plan


def plan_summary(lengths: list[int], budget: int, ranks: int = 1) -> dict[str, float]:
    """How full the micro-batches of a plan are, and by how much the busiest rank exceeds the mean."""
    plan = plan_microbatches(lengths, budget, ranks)
    load = [sum(cost(lengths[i]) for microbatch in rank for i in microbatch) for rank in plan]
    return {
        "perf/microbatches": len(plan[0]),
        "perf/pack_fill": sum(lengths) / (budget * len(plan[0]) * ranks),
        "perf/rank_imbalance": max(load) * ranks / sum(load) - 1,
    }


TASKS = {  # task -> loader(split, seed, template)
    "countdown": countdown,  # 3 or 4 numbers up to 99, as in TinyZero
    "countdown3": partial(countdown, sizes=(3,), max_number=20, train=10_000),  # for models of 1M parameters
}

if __name__ == "__main__":  # python data.py: three rows of every task
    for name in TASKS:
        for row in load(name, "train", limit=3):
            print(name, row["answer"], repr(row["prompt"]))
