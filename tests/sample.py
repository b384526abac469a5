"""python tests/sample.py MODEL ENGINE TP TEMPERATURES [STOP ...]: what an engine answers to fixed prompts.

On one rank or on several. TEMPERATURES: 0,0.7 say; one engine is asked at each of them. Prints one line of JSON, a list
of what `ask` returns. Tests also call the functions in their own process.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo  # noqa: E402, F401, I001  (first: the guard for the name `kernels`)

from transformers import AutoTokenizer  # noqa: E402

import data  # noqa: E402
import rollout  # noqa: E402
from infra import dist  # noqa: E402

LIMIT = 40  # tokens of an answer


def ask(
    ranks: dist.Ranks, path: str, engine: str, tp: int, temperatures: list[float], *stop: str
) -> list[dict]:
    """For each temperature the prompts, of different lengths but the last, which is the first again,
    and their samples: one when greedy, else two. Each rank asks for its share. Closes the engine."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = data.TASKS["countdown3"]("test", 0, "base")[:6]
    prompts = data.encode([row["prompt"] for row in rows], tokenizer)
    prompts = [prompt[i:] for i, prompt in enumerate(prompts)]
    prompts.append(prompts[0])
    first = len(prompts) * ranks.rank // ranks.world
    ends = [tokenizer.eos_token_id]
    sampler = rollout.make_sampler(
        engine, path, ends, tp=tp, max_len=90, dtype="float32", stop=stop
    )
    answers = []
    for temperature in temperatures:
        n = 2 if temperature else 1
        mine = sampler.sample(dist.share(prompts, ranks), n, LIMIT, temperature, n * first)
        answers.append(
            {
                "prompts": [prompt for prompt in prompts for _ in range(n)],
                "samples": dist.gather(mine, ranks),
            }
        )
    sampler.close()
    return answers


def main(path: str, engine: str, tp: str, temperatures: str, *stop: str) -> None:
    _, ranks = dist.start_ranks(bf16=False, sp=1)
    asked = [float(temperature) for temperature in temperatures.split(",")]
    answers = ask(ranks, path, engine, int(tp), asked, *stop)
    if ranks.rank == 0:
        print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
