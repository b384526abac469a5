"""python tools/score.py FILE: what the rewards say about responses of yours.

FILE has a JSON object in each line: "task", "answer" (as in a row of data.py), "response" or "text",
perhaps "id" and "finished". Exit code 1 where a line lacks something or its answer cannot be used.
Owns: reading that file and showing verdicts. Refuses to know: how a verdict is reached.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tyro

import rewards


def response_of(row: dict) -> str | None:
    return row.get("response", row.get("text"))


def read(file: str, task: str) -> list[dict]:
    """The rows of the file; `task` is that of lines without one."""
    rows = []
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{file}, line {number}"
            row = {"task": task or None, "id": f"line {number}"}
            try:
                row |= json.loads(line)
            except (ValueError, TypeError):
                sys.exit(f"{place}: no JSON object")
            needed = {
                "task": row["task"],
                "answer": row.get("answer"),
                "response": response_of(row),
            }
            if "status" in row:  # a run's samples.jsonl: that is what was found in the response
                needed["answer"] = None
            absent = [name for name, value in needed.items() if value is None]
            if absent:
                sys.exit(f'{place}: there is no "' + '", no "'.join(absent) + '"')
            rows.append(row)
    if not rows:
        sys.exit(f"{file} has no lines")
    return rows


def show(row: dict, result: dict) -> None:
    answer = result.get("answer", "")
    found = repr(answer) if answer else ""
    line = f"{row['task']:12s} {result['status']:10s} {result['reward']:<7.3g} {found:24.24s}"
    print(line, row["id"])


def main(
    file: tyro.conf.Positional[str],
    task: str = "",
    out: str = "",
    rules: rewards.Rules = rewards.DEFAULT,
) -> None:
    """Judges the lines of FILE, a JSONL file: "task" (else TASK), "answer", "response" or "text",
    perhaps "id", "finished". OUT gets them with their verdicts."""
    rows = read(file, task)
    try:
        print(rewards.start({row["task"] for row in rows}, rules))
    except ValueError as error:  # a task without a reward
        sys.exit(f"{file}: {error}")
    print(f"{'task':12s} {'status':10s} reward  {'answer found':24s} line")
    texts = [response_of(row) for row in rows]
    finished = [row.get("finished", True) for row in rows]
    results = []
    for row, future in zip(rows, rewards.submit(texts, rows, finished, rules)):
        error = future.exception()
        if error:
            sys.exit(f"{file}, {row['id']}: its answer cannot be used: {error!r}")
        results.append(future.result())
        show(row, results[-1])
    means = []
    for key, value in rewards.summary(results).items():
        if value or key == "reward/correct":
            means.append(f"{key.removeprefix('reward/')} {value:.3g}")
    print(f"{len(rows)} responses: {', '.join(means)}")
    if out:
        lines = [json.dumps(row | {"verdict": result}) for row, result in zip(rows, results)]
        Path(out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True)
