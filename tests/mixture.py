"""python tests/mixture.py OUT [flags of ppo.py]: PPO on math and code together, judged by the real verifiers.

One token of this toy's alphabet is a whole answer: \\boxed{d}, a program that adds d to its input, or one of those that
a verifier must survive. A prompt is a digit and the kind of answer that is wanted; the policy starts at random.
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

HOSTILE = [
    "while True: pass",
    "import os\nos.fork()",
    "x = [0] * 10**10",
    "print(open('/etc/passwd').read())",
]
PROGRAMS = [f"print(int(input()) + {d})" for d in range(4)] + HOSTILE
ANSWERS = [rf"\boxed{{{d}}}" for d in range(4)] + [
    r"\boxed{9**9**9**9}",
    r"\boxed{1 or 2}",
    r"\boxed{\sqrt{2}}",
]
ANSWERS += [f"\n```python\n{program}\n```\n" for program in PROGRAMS]


def load(split: str, seed: int, template: str) -> list[dict]:
    rng, rows = random.Random(f"{split} {seed}"), []
    for i in range(256):
        d = rng.randrange(4)
        code = {"inputs": ["1", "20"], "outputs": [str(1 + d), str(20 + d)], "fn_name": None}
        kind, answer = rng.choice(
            [("math", str(d)), ("math", rf"\frac{{{2 * d}}}{{2}}"), ("code", code)]
        )
        rows.append({"task": kind, "prompt": f"{d}{kind[0]}", "answer": answer, "id": f"{i}"})
    return rows


def make_model(path: str) -> None:
    torch.manual_seed(0)
    words = ["<pad>", "<eos>", "m", "c", *"0123", *ANSWERS]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(path)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = Qwen2Config(
        vocab_size=len(words),
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=True,
        **shape,
        **special,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)


if __name__ == "__main__":
    out, *flags = sys.argv[1:]
    data.TASKS["mixture"] = load
    rewards.TEST_SECONDS = 0.3
    if "--model" not in flags:
        flags += ["--model", f"{out}.model"]
        make_model(f"{out}.model")
    ppo.train(
        ppo.parse_args(
            [
                "--out",
                out,
                "--task",
                "mixture",
                "--engine",
                "torch",
                "--steps",
                "9",
                "--prompts_per_step",
                "128",
                "--max_prompt_tokens",
                "4",
                "--max_new_tokens",
                "3",
                "--entropy_coef",
                "0.01",
                "--ppo_epochs",
                "2",
                "--minibatch_size",
                "64",
                "--max_tokens_per_microbatch",
                "512",
                "--lr",
                "7e-3",
                "--critic_lr",
                "3e-3",
                "--no-gradient_checkpointing",
                *flags,
            ]
        )
    )
