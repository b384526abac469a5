"""python tools/sample.py --model DIR: answers of an engine, and how far it is from transformers.

Samples n answers to each prompt (greedy: one), a text that is fed as it stands. The gap is the mean
distance of the engine's log-probs from those of a plain forward of transformers, in float32 on the
CPU: what the canary of a run watches, without a run.
"""

import sys
from pathlib import Path
from typing import Literal

sys.path[0] = str(Path(__file__).resolve().parent.parent)
import ppo  # noqa: F401  first: the guard for the name `kernels`

import torch
import tyro
from torch import Tensor
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
) -> None:
    """Answers of an engine, and how far it is from transformers."""
    logging.disable_progress_bar()
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
    dtype = "auto"
    if not torch.cuda.is_available():
        dtype = "float32"
    sampler = rollout.make_sampler(
        engine,
        model,
        rollout.eos_ids(model, tokenizer),
        seed=seed,
        max_len=max(len(x) for x in ids) + max_new_tokens,
        max_seqs=n * len(ids),
        dtype=dtype,
    )
    gaps = []
    for i, sample in enumerate(sampler.sample(ids, n, max_new_tokens, temperature, seed)):
        fed = ids[i // n]
        logprobs = plain_logprobs(plain, fed, sample.ids, temperature or 1.0)
        gaps.append((logprobs - torch.tensor(sample.logprobs)).abs())
        if i % n == 0:
            print(f"prompt of {len(fed)} tokens: {prompt[i // n]!r}")
        end = "cut"
        if sample.finished:
            end = "finished"
        text = tokenizer.decode(sample.ids)
        print(f"  {end}, {len(sample.ids)} tokens, gap {gaps[-1].mean():.1e}: {text!r}")
    gap = torch.cat(gaps)
    print(
        f"{engine}: mean |log-prob difference| {gap.mean():.1e}, largest {gap.max():.1e}, "
        f"of {len(gap)} tokens"
    )
    sampler.close()


@torch.no_grad()
def plain_logprobs(model, prompt: list[int], response: list[int], temperature: float) -> Tensor:
    """Of every response token, by a forward over the whole sequence."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs.gather(1, torch.tensor(response)[:, None])[:, 0]


if __name__ == "__main__":
    tyro.cli(main, use_underscores=True)
