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


def read(file, task):
    rows = []
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{file}, line {number}"
            # what a line may lack
            row = {"task": task or None, "id": f"line {number}"}
            try:
                row |= json.loads(line)
            except (ValueError, TypeError):
                sys.exit(f"{place}: no JSON object")
            known = {"response": row.get("text")} | row
            if "status" in row:  # a run's samples.jsonl: that is what was found in the response
                known["answer"] = None
            needed = ("task", "answer", "response")
            absent = '", no "'.join(name for name in needed if known.get(name) is None)
            if absent:
                sys.exit(f'{place}: there is no "{absent}"')
            rows.append(row)
    if not rows:
        sys.exit(f"{file} has no lines")
    return rows


def main(
    file: tyro.conf.Positional[str],
    task: str = "",
    out: str = "",
    rules: rewards.Rules = rewards.DEFAULT,
):
    """What the rewards say about responses of yours: a line each, and their means.

    Args:
        file: JSONL file; its lines have "task", "answer", "response" or "text", maybe "finished".
        task: of the lines that do not name theirs, such as math.
        out: JSONL file that gets the lines with their verdicts.
    """
    rows = read(file, task)
    try:
        print(rewards.start({row["task"] for row in rows}, rules))
    except ValueError as error:  # a task without a reward
        sys.exit(f"{file}: {error}")
    print("task         status     reward  answer found             line")
    futures = rewards.submit(
        [row.get("response", row.get("text")) for row in rows],
        rows,
        [row.get("finished", True) for row in rows],
        rules,
    )
    for row, future in zip(rows, futures):
        try:
            result = future.result()
        except Exception as error:
            sys.exit(f"{file}, {row['id']}: its answer cannot be used: {error!r}")
        row["verdict"] = result
        found = repr(result["answer"]) if result.get("answer") else ""
        said = f"{result['status']:10s} {result['reward']:<7.3g} {found:24.24s}"
        print(f"{row['task']:12s} {said} {row['id']}")
    results = [row["verdict"] for row in rows]
    means = [
        f"{key.removeprefix('reward/')} {value:.3g}"
        for key, value in rewards.summary(results).items()
        if value or key == "reward/correct"
    ]
    print(f"{len(rows)} responses: {', '.join(means)}")
    if out:
        Path(out).write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True)
