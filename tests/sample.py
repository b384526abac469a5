"""[torchrun ...] python tests/sample.py MODEL ENGINE TP TEMPERATURE [STOP]: what an engine answers to fixed prompts."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo  # noqa: E402, F401, I001  (first: the guard for the name `kernels`)

from transformers import AutoTokenizer  # noqa: E402

import data  # noqa: E402
import rollout  # noqa: E402
from infra import dist  # noqa: E402

path, engine, tp, temperature = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
_, ranks = dist.start_ranks(bf16=False, sp=1)
tokenizer = AutoTokenizer.from_pretrained(path)
prompts = data.encode(
    [row["prompt"] for row in data.TASKS["countdown3"]("test", 0, "base")[:6]], tokenizer
)
prompts = [prompt[i:] for i, prompt in enumerate(prompts)]  # of different lengths
sampler = rollout.make_sampler(
    engine, path, [tokenizer.eos_token_id], tp=tp, max_len=90, dtype="float32", stop=sys.argv[5:]
)
n = 2 if temperature else 1
seed = n * len(prompts) * ranks.rank // ranks.world
samples = dist.gather(sampler.sample(dist.share(prompts, ranks), n, 40, temperature, seed), ranks)
if ranks.rank == 0:
    print(
        json.dumps({"prompts": [p for p in prompts for _ in range(n)], "samples": samples}),
        flush=True,
    )
sampler.close()
