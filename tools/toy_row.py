"""python tools/toy_row.py [STEPS]: one response of tests/toy.py after STEPS steps (default 12), token
by token, as a Markdown table. docs/algorithm.md shows it. A few seconds on a CPU, the same numbers
every time on one machine.
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import toy  # noqa: E402, I001  (first: it imports ppo, the guard for the name `kernels`)

import ppo  # noqa: E402


def table(batch: ppo.Batch, b: int, tokenizer) -> str:
    lines = [
        "| t | token | mask | log-prob | value V | reward r | return R | R - V | advantage A |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    last = batch.mask[b].nonzero().max().item()
    for t in range(batch.lengths[b]):
        cells = [f"{t}", f"`{tokenizer.decode(batch.ids[b, t])}`", f"{int(batch.mask[b, t])}"]
        if batch.mask[b, t]:
            value = batch.old_values[b, t].item()
            reward = batch.scores[b].item() if t == last else 0
            target = batch.returns[b, t].item()
            numbers = (batch.old_logprobs[b, t].item(), value, reward, target, target - value)
            cells += [f"{number:.3f}" for number in (*numbers, batch.advantages[b, t].item())]
        else:
            cells += [""] * 6
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(steps: int):
    batches = []
    plain = ppo.batch_records

    def keep(batch, step, tokenizer):
        batches.append((batch, tokenizer))
        return plain(batch, step, tokenizer)

    ppo.batch_records = keep
    with tempfile.TemporaryDirectory() as folder:
        toy.run(f"{folder}/toy", "--steps", f"{steps}")
    batch, tokenizer = batches[-1]
    for reward in (0.5, 1.0):  # the first response with a prompt of two digits and this reward
        for b, row in enumerate(batch.rows):
            if len(row["prompt"]) == 3 and batch.scores[b] == reward:
                said = batch.texts[b]
                print(f"\nprompt {row['prompt']!r}, response {said!r}, reward {reward}\n")
                print(table(batch, b, tokenizer))
                break


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 12)
