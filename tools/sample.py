"""python tools/sample.py --model DIR: answers of an engine, and how far it is from transformers.

Samples n answers to each prompt (greedy: one), a text that is fed as it stands. The gap is the mean
distance of the engine's log-probs from those of a plain forward of transformers, in float32 on the
CPU: what the canary of a run watches, without a run.
"""

import sys
from itertools import islice
from pathlib import Path
from typing import Literal

sys.path[0] = str(Path(__file__).resolve().parent.parent)
import ppo  # noqa: F401  first: the guard for the name `kernels`

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import rollout

EXAMPLES = (
    "Use the numbers 3, 5, 7 exactly once each with + - * / and parentheses to make 22. "
    "Think inside <think> </think>, then write the expression inside <answer> </answer>.\n<think>",
    "What is 2 + 3? The answer is",
)


def main(
    model: str,
    engine: Literal["vllm", "torch"] = "vllm",
    prompt: tuple[str, ...] = EXAMPLES,
    n: int = 2,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
):
    """Answers of an engine, and how far it is from transformers."""
    logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        plain = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        sys.exit(f"model={model!r} is no Hugging Face folder or hub id to be used: {error}")
    if temperature == 0:
        n = 1
    ids = tokenizer(list(prompt))["input_ids"]
    sampler = rollout.make_sampler(
        engine,
        model,
        rollout.eos_ids(model, tokenizer),
        seed=seed,
        max_len=max(map(len, ids)) + max_new_tokens,
        max_seqs=n * len(ids),
        dtype="auto" if torch.cuda.is_available() else "float32",
    )
    gaps = []
    samples = iter(sampler.sample(ids, n, max_new_tokens, temperature, seed))
    for text, fed in zip(prompt, ids):
        print(f"prompt of {len(fed)} tokens: {text!r}")
        for sample in islice(samples, n):
            logits = plain(torch.tensor([fed + sample.ids])).logits[0, len(fed) - 1 : -1]
            logprobs = (logits / (temperature or 1.0)).log_softmax(-1)
            chosen = logprobs[range(len(sample.ids)), sample.ids]
            gaps.append((chosen - torch.tensor(sample.logprobs)).abs())
            end = "finished" if sample.finished else "cut"
            print(
                f"  {end}, {len(sample.ids)} tokens, gap {gaps[-1].mean():.1e}: "
                f"{tokenizer.decode(sample.ids)!r}"
            )
    gap = torch.cat(gaps)
    print(
        f"{engine}: mean |log-prob difference| {gap.mean():.1e}, largest {gap.max():.1e}, "
        f"of {len(gap)} tokens"
    )
    sampler.close()


if __name__ == "__main__":
    tyro.cli(main, use_underscores=True)
