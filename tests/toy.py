"""python tests/toy.py OUT [flags of ppo.py]: PPO learns to echo a digit and stop, from random weights, in seconds.

It is also the example of a new task: a loader in TASKS, a reward in REWARDS, and nothing else.
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo  # noqa: E402, I001  (first: the guard for the name `kernels`)

import torch  # noqa: E402
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

import data  # noqa: E402
import rewards  # noqa: E402


def load_toy(split: str, seed: int, template: str) -> list[dict]:
    rng = random.Random(f"{split} {seed}")
    digits = [rng.randrange(8) for _ in range(512)]
    prompts = [f"{d}" * (1 + i % 3) + "=" for i, d in enumerate(digits)]
    return [
        {"task": "toy", "prompt": p, "answer": p[0], "id": f"{i}"} for i, p in enumerate(prompts)
    ]


def toy(text: str, row: dict, rules=None) -> dict:
    """Half for the right first digit, half for stopping right after it."""
    first = text[:1] == row["answer"]
    right = text == row["answer"]
    return {
        "reward": 0.5 * first + 0.5 * right,
        "correct": float(right),
        "status": "ok" if right else "wrong",
    }


def make_model(path: str, layers: int = 2) -> None:
    """A transformer of 0.1M parameters over an alphabet of eight digits."""
    torch.manual_seed(0)
    vocabulary = {"<pad>": 0, "<eos>": 1, "=": 2, **{str(d): 3 + d for d in range(8)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(path)
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
    }
    config = Qwen2Config(
        vocab_size=11,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=True,
        **shape,
        **special,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)


FLAGS = """--task toy --engine torch --steps 40 --prompts_per_step 128 --minibatch_size 64
    --ppo_epochs 2 --max_prompt_tokens 4 --max_new_tokens 6 --max_tokens_per_microbatch 512
    --temperature 0.7 --entropy_coef 0.01 --lr 1e-3 --critic_lr 3e-3
    --no-gradient_checkpointing""".split()


def run(out: str, *flags: str) -> list[dict]:
    data.TASKS["toy"], rewards.REWARDS["toy"] = load_toy, toy
    if "--model" not in flags:
        make_model(f"{out}.model")
        flags = ("--model", f"{out}.model", *flags)
    return ppo.train(ppo.parse_args(["--out", out, *FLAGS, *flags]))


if __name__ == "__main__":
    run(*sys.argv[1:])
