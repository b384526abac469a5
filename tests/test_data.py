"""Countdown problems, encoding and the order of rows."""

import functools
import random
from fractions import Fraction

import pytest
from transformers import AutoTokenizer

import data
import rewards


def solve(numbers: list[int], target: int) -> str | None:
    """An expression over all the numbers with that value, by trying every one."""

    def search(items: list[tuple[Fraction, str]]) -> str | None:
        if len(items) == 1:
            return items[0][1] if items[0][0] == target else None
        for i, (a, x) in enumerate(items):
            for j, (b, y) in enumerate(items):
                rest = [item for k, item in enumerate(items) if k not in (i, j)]
                made = [(a + b, f"({x}+{y})"), (a * b, f"({x}*{y})")] if i < j else []
                made += (
                    [(a - b, f"({x}-{y})")] + ([(a / b, f"({x}/{y})")] if b else [])
                    if i != j
                    else []
                )
                for new in made:
                    if found := search([*rest, new]):
                        return found
        return None

    return search([(Fraction(n), str(n)) for n in numbers])


gym_problems = functools.cache(data.gym_problems)  # a process each time


@functools.cache
def rows(task: str, split: str) -> list[dict]:
    return data.TASKS[task](split, 0, "base")


GENERATED = [(task, split) for task in ("countdown", "countdown3") for split in ("train", "test")]


@pytest.mark.parametrize("task, split", GENERATED)
def test_countdown_problems_have_a_solution(task, split):
    """Guards problems that nobody can solve: they would score 0 for ever and look like a hard task."""
    for row in random.Random(0).sample(rows(task, split), 12):
        expression = solve(**row["answer"])
        value, used = rewards.evaluate(expression)
        assert value == row["answer"]["target"] and sorted(used) == sorted(row["answer"]["numbers"])


@pytest.mark.parametrize("task, split", GENERATED)
def test_countdown_rows_are_as_documented(task, split):
    """Guards numbers and targets out of range, duplicate problems and duplicate ids, and a task without a reward."""
    problems = rows(task, split)
    assert {row["task"] for row in problems} <= rewards.REWARDS.keys()
    sizes, most = ((3,), 20) if task == "countdown3" else ((3, 4), 99)
    for row in problems:
        numbers, target = row["answer"]["numbers"], row["answer"]["target"]
        assert len(numbers) in sizes and all(1 <= n <= most for n in numbers)
        assert 1 <= target <= 100 and type(target) is int
    assert {len(row["answer"]["numbers"]) for row in problems} == set(sizes)
    assert (
        len(problems)
        == {"train": {"countdown": 20_000, "countdown3": 10_000}[task], "test": 1024}[split]
    )
    assert len({row["id"] for row in problems}) == len(problems)
    assert len(
        {(*sorted(row["answer"]["numbers"]), -row["answer"]["target"]) for row in problems}
    ) == len(problems)


def test_train_and_test_share_no_set_of_numbers():
    """Guards leaks into the held-out rows, in another order, under another seed or in the other task too."""
    sets = {split: set() for split in ("train", "test")}
    for task, split in GENERATED:
        sets[split] |= {tuple(sorted(row["answer"]["numbers"])) for row in rows(task, split)}
    other = data.countdown("train", seed=1, template="base", train=500)
    sets["train"] |= {tuple(sorted(row["answer"]["numbers"])) for row in other}
    assert not sets["train"] & sets["test"]


def test_rows_are_functions_of_the_seed():
    """Guards rows that differ from rank to rank or run to run, and a seed that nobody reads."""
    one, again, other = (data.countdown("train", seed, "base", train=200) for seed in (3, 3, 4))
    assert one == again and one != other


def test_templates_say_numbers_and_target():
    """Guards a prompt that lacks what the reward asks for."""
    for template in ("base", "chat"):
        for row in data.countdown("train", 0, template, train=50):
            text = row["prompt"] if template == "base" else row["prompt"][0]["content"]
            assert (
                ", ".join(map(str, row["answer"]["numbers"])) in text
                and str(row["answer"]["target"]) in text
            )
            assert "<answer>" in text and "{" not in text
            assert template == "base" or [m["role"] for m in row["prompt"]] == ["user"]


@pytest.mark.parametrize("name", ["isomorphic_strings", "list_functions"])
def test_reasoning_gym_asks_the_same_everywhere(name):
    """Guards ranks that train on different problems: some tasks of the package depend on the order of sets, or on the
    global random state."""
    assert gym_problems(name, 0, 256) == data.gym_problems(name, 0, 256)


def test_reasoning_gym_splits(monkeypatch):
    """Guards a training row that is asked in the test split too, and test rows that know the seed."""
    monkeypatch.setattr(data, "gym_problems", gym_problems)
    train, test = (data.gym("isomorphic_strings", s, 5, "chat") for s in ("train", "test"))
    asked, held = ({row["prompt"][0]["content"] for row in split} for split in (train, test))
    assert len(held) == len(gym_problems("isomorphic_strings", 0, 256)) > 200
    assert len(asked) > 1000 and not asked & held


def test_load_of_generated_rows(tiny):
    """Guards an evaluation on fewer or other rows than asked for, and rows without ids."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    found = data.load(data.Source(task="countdown3", max_prompt_tokens=64), tokenizer, eval_rows=5)
    assert [row["id"] for row in found.test["countdown3"]] == [
        row["id"] for row in rows("countdown3", "test")[:5]
    ]
    assert len(found.train["countdown3"]) == 10_000 and found.report == ""
    for row in found.train["countdown3"][:20]:
        assert tokenizer.decode(row["ids"]) == row["prompt"]


def test_encode_applies_the_chat_template_once(tiny):
    """Guards chat prompts without their generation prompt, and special tokens added to a base prompt."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    base, chat = (
        data.countdown("train", 0, template, train=1)[0]["prompt"] for template in ("base", "chat")
    )
    ids = data.encode([base, chat, base], tokenizer)
    expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert [tokenizer.decode(i) for i in ids] == [base, expected, base]
    assert (
        ids[1]
        == tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
    )
    assert expected != tokenizer.apply_chat_template(chat, tokenize=False)


def test_generated_rows_that_are_too_long_stop_the_run(tiny):
    """Guards prompts that are cut or dropped in silence, and an off-by-one at the limit."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    longest = max(
        len(ids)
        for ids in data.encode([r["prompt"] for r in rows("countdown3", "train")], tokenizer)
    )
    data.load(data.Source(task="countdown3", max_prompt_tokens=longest), tokenizer)
    with pytest.raises(ValueError, match=f"countdown-t.*{longest} tokens.*{longest - 1}"):
        data.load(data.Source(task="countdown3", max_prompt_tokens=longest - 1), tokenizer)


@pytest.mark.parametrize("count, size", [(12, 4), (10, 4), (3, 8)])
def test_batch_visits_every_row_once_an_epoch(count, size):
    """Guards rows that repeat or are never seen, when the batch does not divide the epoch or is larger too."""
    items = {"one": [{"id": i} for i in range(count)]}
    stream = [
        row["id"] for step in range(3 * count) for row in data.batch(items, step, size, seed=1)
    ]
    epochs = [stream[i : i + count] for i in range(0, 3 * count * size, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1 or count == 1  # epochs have different orders
    assert [row["id"] for row in data.batch(items, 0, size, seed=2)] != stream[:size]


def test_batch_is_a_function_of_the_step():
    """Guards a resume that repeats or skips a batch: step 7 is the same, whatever was asked before."""
    items = {"one": [{"id": i} for i in range(10)]}
    random.seed(1)
    straight = [data.batch(items, step, 4, seed=5) for step in range(9)]
    random.seed(2)
    data.order.cache_clear()  # a run that goes on has none
    assert [data.batch(items, step, 4, seed=5) for step in (8, 7, 0)] == [
        straight[8],
        straight[7],
        straight[0],
    ]
    assert [row["id"] for row in items["one"]] == list(
        range(10)
    )  # the caller's list is not shuffled
