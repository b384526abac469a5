"""How good is this text for this row? One pure function per task, and `score` over a batch.

Owns: finding the answer in a response, judging it, and saying why (`status`).
Refuses to know: tokens, models, torch, where the row came from.
Left out on purpose: `eval` and every other way to run model text. Rewards are the part of RL that gets attacked;
an answer is parsed into a tree, the tree is checked against a whitelist, and only then is it computed.

The contract with data.py is the row: {"task", "prompt", "answer", "id", ...}. A response is hostile text, a row is
ours: bad text never raises, and a bad row always does (KeyError) instead of scoring 0 for ever.
"""
import ast
from fractions import Fraction

MAX_EXPRESSION = 200  # characters; six numbers and a lot of parentheses fit in 60. Bounds the parser's time and depth.
OPERATORS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,  # of Fractions: exact
}


def last_answer(text: str) -> str | None:
    """What is between the last </answer> and the <answer> before it, newlines allowed; None without. Linear time."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return None if start < 0 else text[start + len("<answer>") : end]


def evaluate(expression: str) -> tuple[Fraction | None, list[int]] | None:
    """(value, integers used) of an expression over + - * / and parentheses, exactly; None when it is anything else.

    The value is None when it divides by zero. Only binary operators and plain integers pass, so `**`, `//`, `1.5`,
    a leading minus, names, calls and attributes are all "anything else", and numbers cannot grow: the length limit
    allows about 100 digits in all.
    """
    if len(expression) > MAX_EXPRESSION or set(expression) - set("0123456789+-*/() \t\r\n"):
        return None
    try:
        tree = ast.parse(" ".join(expression.split()), mode="eval").body  # newlines allowed, "1 5" is not 15
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: how the parser says "too deep"
        return None
    used: list[int] = []

    def value(node: ast.expr) -> Fraction | None:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            left, right = value(node.left), value(node.right)
            if left is None or right is None or (isinstance(node.op, ast.Div) and right == 0):
                return None
            return OPERATORS[type(node.op)](left, right)
        raise SyntaxError("not arithmetic over integers")

    try:
        return value(tree), used
    except SyntaxError:
        return None


def countdown(text: str, row: dict) -> dict:
    """1.0 when the last answer uses every given number exactly once and reaches the target; 0.1 when it is at least
    an arithmetic expression; else 0. The 0.1 teaches the format and is kept small because it can be had for nothing.
    """
    numbers, target = sorted(row["answer"]["numbers"]), row["answer"]["target"]
    answer = last_answer(text)
    if answer is None:
        return {"reward": 0.0, "correct": 0.0, "status": "no_answer", "format": 0.0}
    result = evaluate(answer)
    if result is None:
        return {"reward": 0.0, "correct": 0.0, "status": "wrong", "format": 0.0}
    if sorted(result[1]) == numbers and result[0] == target:
        return {"reward": 1.0, "correct": 1.0, "status": "ok", "format": 1.0}
    return {"reward": 0.1, "correct": 0.0, "status": "wrong", "format": 1.0}


def score(texts: list[str], rows: list[dict], finished: list[bool] | None = None) -> list[dict]:
    """One result per text: {"reward": float, "correct": 0.0 or 1.0, "status": str, ...parts that are logged}.

    `finished[i]` is False when response i was cut at its length limit. Such a response scores 0: it did not choose
    to stop, and rewarding it teaches rambling (Open-Reasoner-Zero, arXiv:2503.24290, section 2).
    """
    unknown = {row["task"] for row in rows} - set(REWARDS)
    if unknown:
        raise ValueError(f"no reward for task {sorted(unknown)}: REWARDS in rewards.py knows {sorted(REWARDS)}")
    if len(texts) != len(rows):
        raise ValueError(f"{len(texts)} texts for {len(rows)} rows: give one row for each text")
    results = [REWARDS[row["task"]](text, row) for text, row in zip(texts, rows)]
    for result, done in zip(results, finished or [True] * len(results)):
        if not done and result["status"] != "infra":
            result.update(reward=0.0, correct=0.0, status="no_answer")
    return results


def summary(scored: list[dict]) -> dict[str, float]:
    """Means of "reward" and of every other number in the results; our own failures ("infra") are left out."""
    sound = [r for r in scored if r["status"] != "infra"]
    statuses = [r["status"] for r in scored]
    row = {f"reward/{status}_frac": statuses.count(status) / len(scored) for status in ("infra", "timeout")}
    for part in sorted({part for r in sound for part in r} - {"status"}):
        values = [r[part] for r in sound if part in r]
        row["reward/mean" if part == "reward" else f"reward/{part}"] = sum(values) / len(values)
    return row


REWARDS = {"countdown": countdown}  # task -> reward of one response

if __name__ == "__main__":  # python rewards.py: what the reward says of a few typical and hostile answers
    example = {"task": "countdown", "answer": {"numbers": [3, 5, 7], "target": 22}}
    for answer in ("3*5+7", "(3 * 5)\n+ 7", "3*7-5", "3*5+7=22", "2**3", "9**9**9", "3.5*7", "().real", "(" * 9**4):
        result = countdown(f"<answer>{answer}</answer>", example)
        print(f"{result['reward']:.1f} {result['status']:9s} {answer[:40]!r}")
