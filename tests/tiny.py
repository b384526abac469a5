"""Makes a tiny Hugging Face folder (Qwen2, 0.5M parameters) that knows a little Countdown: python tests/tiny.py DIR

Owns: the tokenizer, the demonstrator whose worked answers warm the model up, and the supervised steps on them.
Refuses to know: PPO. Everything follows from `seed`; steps=0 gives the random-initialised folder in a few seconds.

The demonstrator tries one expression after another, says whether it fits, and answers with its last try:

    <think>17-5=12*7=84 for 29: no           every result a whole number in 1..120
    17+7=24+5=29 for 29: yes</think><answer>(17+7)+5</answer><eos>

Its tries are guesses: no value twice, and values near the target more often. Its impatience is on purpose: after half
of its wrong tries it gives up and answers with a wrong one. So the model learns to calculate, to notice a fit and to
answer with what it found, and it also learns to stop too early: what is left for PPO is to search until it fits.

Two things a model of this size gets for nothing, as a minute or three is too short to find them: numbers up to 120 are
one token each (Llama 3 has them up to 999), and their embeddings start as waves in which arithmetic is rotation.
"""

import argparse
import math
import random
import re
import sys
import time
from functools import cache
from pathlib import Path

import torch
from tokenizers import AddedToken, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# our kernels.py has the name of a package that transformers looks for: see ppo.py, which may have been imported before
ours, sys.modules["kernels"] = sys.modules.get("kernels"), None
import transformers.integrations.hub_kernels  # noqa: F401, E402

del sys.modules["kernels"]
if ours:
    sys.modules["kernels"] = ours
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer  # noqa: E402

import data  # noqa: E402

# ------------------------------------------------------------------------------------------------------- the tokenizer

TAGS = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
]  # one token each, but text: they must survive decoding
NUMBERS = [str(n) for n in range(10, 121)]  # one token each; the smaller ones are anyway
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% if message.role == 'assistant' %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's own tokenizer, every byte of the alphabet included, without merges; and each tag, small number and fixed
    phrase of our prompts is one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Qwen2Tokenizer(
        vocabulary,
        [],
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token=None,
        padding_side="left",
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )
    parts = re.split(
        r"\{\w+\}|(<.*?>)", data.BASE_COUNTDOWN + "user: " + data.CHAT_COUNTDOWN + "\nassistant: "
    )
    phrases = sorted({part for part in parts if part and len(part) > 1} - set(TAGS))
    whole = [*TAGS, *NUMBERS, ", ", ASK, YES, NO, *phrases]
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in whole])
    return tokenizer


# ---------------------------------------------------------------------------------------------------- the demonstrator

ASK, YES, NO = " for ", ": yes", ": no"  # what stands behind every try, around the target
BOUND = 120  # no result above it: keeps the arithmetic that has to be learnt small
FOCUS = 0.5  # how much more likely a try near the target is: weight (1 + distance) ** -FOCUS
GIVE_UP = 0.5  # how often, after a wrong try
PATIENT = 0.4  # of the answers never give up: see worked_answer
MAX_TRIES = 8


def combine(a: int, b: int) -> list[tuple[str, int]]:
    """(operator, result) of every operator that is tried on a >= b.

    No division: when it comes out even is the hardest to learn, and six problems in seven can be solved without it,
    always working on the last result.
    """
    results = {"+": a + b, "-": a - b, "*": a * b}
    return [(operator, result) for operator, result in results.items() if 0 < result <= BOUND]


@cache
def expressions(numbers: tuple[int, ...]) -> list[tuple[str, str, int]]:
    """(the try as it is written, its expression, its value) for everything to be made out of three numbers."""
    out = []
    for i, c in enumerate(numbers):
        a, b = sorted(numbers[:i] + numbers[i + 1 :], reverse=True)
        for first, x in combine(a, b):
            for second, value in combine(x, c):
                out.append(
                    (f"{a}{first}{b}={x}{second}{c}={value}", f"({a}{first}{b}){second}{c}", value)
                )
    return out


def worked_answer(row: dict, rng: random.Random, drill: bool) -> tuple[str, bool]:
    """The text after the prompt, and whether its demonstrator was a patient one.

    Patient ones keep calculating and stopping reliable late in a long search. They go on until a try fits (or the text
    is cut off), and from them the model must not learn to go on: `warm_up` leaves their newlines out of the loss.
    A drill is a patient one without a target.
    """
    target, options = row["answer"]["target"], expressions(tuple(sorted(row["answer"]["numbers"])))
    patient, tries = drill or rng.random() < PATIENT, []
    while options and len(tries) < MAX_TRIES:
        weights = (
            None if drill else [(1 + abs(value - target)) ** -FOCUS for _, _, value in options]
        )
        text, answer, value = rng.choices(options, weights)[0]
        tries.append(f"{text}{ASK}{target}{YES if value == target else NO}")
        options = [option for option in options if option[2] != value]
        if not drill and (value == target or (not patient and rng.random() < GIVE_UP)):
            return "\n".join(tries) + f"</think><answer>{answer}</answer><eos>", patient
    return "\n".join(tries), patient


# ------------------------------------------------------------------------------------------------------------ the model

STEPS, BATCH = 1300, 24  # a bit over three minutes on two cores
MATRIX_LR, OTHER_LR = 0.02, 3e-3
DRILLS = 0.3  # of the steps, the first ones, are on drills
PERIODS = (2, 3, 5, 10, 20, 50, 125, 250)  # of the waves of n
LOG_RATES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # of the waves of log n


@torch.no_grad()
def teach_numbers(embedding: torch.Tensor, tokenizer: Qwen2Tokenizer) -> None:
    """Number tokens start as waves of n and of log n, so that adding and multiplying are rotations: models find the
    first kind by themselves, given time (arXiv:2502.00873)."""
    n = torch.arange(1, BOUND + 1)
    angles = [2 * math.pi * n / period for period in PERIODS] + [
        n.log() * rate for rate in LOG_RATES
    ]
    waves = torch.stack([f(a) for a in angles for f in (torch.cos, torch.sin)], dim=1)
    embedding[tokenizer.convert_tokens_to_ids([str(i) for i in n.tolist()]), : waves.shape[1]] = (
        0.15 * waves
    )


def warm_up(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, seed: int, steps: int) -> None:
    """Supervised steps on fresh worked answers of the train split; prompts are never learnt."""
    rows, rng = data.TASKS["countdown3"]("train", seed, "base"), random.Random(f"warm-up {seed}")
    newline, think = tokenizer("\n<think>")["input_ids"]
    # Muon for the matrices: in the same time the loss on drills came to 0.10, with AdamW to 0.55.
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or ".layers." not in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=MATRIX_LR, weight_decay=0.0),
        torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    rates, began = [MATRIX_LR, OTHER_LR], time.time()
    for step in range(steps):
        batch = []
        for row in rng.choices(rows, k=BATCH):
            text, patient = worked_answer(row, rng, drill=step < DRILLS * steps)
            ids = tokenizer(row["prompt"] + text)["input_ids"]
            first = len(ids) - ids[::-1].index(think)  # the prompt ends with this tag
            labels = [
                i if t >= first and not (patient and i == newline) else -100
                for t, i in enumerate(ids)
            ]
            batch.append((ids, labels))
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch])
        labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in batch])
        # Padding is on the right, where causal attention never sees it: no mask, and the fast attention kernel.
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, rates):
            optimizer.param_groups[0]["lr"] = rate * min(
                1.0, (step + 1) / 20, 1.5 * (1 - step / steps)
            )
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % max(1, steps // 10) == 0:
            left = (time.time() - began) / (step + 1) * (steps - step - 1)
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {left:.0f} s left", flush=True)


def make(path: str | Path, seed: int = 0, steps: int = STEPS, tie: bool = True) -> None:
    """Writes the folder. `tie`: input and output embeddings are one matrix, as in the small Qwen2 models."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.08,
        tie_word_embeddings=tie,
        **special,
    )  # heads of 32: the smallest that vLLM's attention for CPUs takes
    model = Qwen2ForCausalLM(config)
    if steps:
        teach_numbers(model.model.embed_tokens.weight, tokenizer)
        warm_up(model, tokenizer, seed, steps)
    model.generation_config = GenerationConfig(do_sample=True, **special)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    make(arguments.path, arguments.seed, arguments.steps)
