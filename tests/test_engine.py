"""The two engines, and vLLM on one rank and on two: same weights, same answers."""

import functools
import json

import launch
import pytest
import sample
import torch
from planted import Bug, plant
from transformers import AutoModelForCausalLM, AutoTokenizer

from infra.dist import Ranks

GREEDY, DRAWN = 0, 0.7  # temperatures


class Answers:
    """What every way of asking answered, each asked when a test first wants it."""

    def __init__(self, model: str):
        self.model = model

    def torch(self, *stop: str) -> dict:
        answers = sample.ask(Ranks(), self.model, "torch", 1, [GREEDY, DRAWN], *stop)
        return dict(zip((GREEDY, DRAWN), answers))

    @functools.cached_property
    def plain(self) -> dict:
        return self.torch()

    @functools.cached_property
    def two_engines(self) -> dict:
        """vLLM on two ranks with an engine each."""
        return self.vllm(2, 1)

    @functools.cached_property
    def one_engine(self) -> dict:
        """vLLM on two ranks that share it."""
        return self.vllm(2, 2)

    def vllm(self, ranks: int, tp: int, *stop: str) -> dict:
        asked = [self.model, "vllm", tp, f"{GREEDY},{DRAWN}", *stop]
        said = launch.run("tests/sample.py", *asked, ranks=ranks).good().said
        answers = next(line for line in said.splitlines() if line.startswith('[{"prompts"'))
        return dict(zip((GREEDY, DRAWN), json.loads(answers)))


@pytest.fixture(scope="module")
def answers(tiny) -> Answers:
    return Answers(tiny)


def ids(drawn: dict) -> list[list[int]]:
    return [response for response, _, _ in drawn["samples"]]


def check_logprobs(model: str, answers: dict) -> None:
    """Each sample's log-probs are the model's own, in plain transformers; it ends with EOS if and only if finished."""
    reference = AutoModelForCausalLM.from_pretrained(model)
    eos = reference.config.eos_token_id
    for temperature, drawn in answers.items():
        for prompt, (response, logprobs, finished) in zip(drawn["prompts"], drawn["samples"]):
            with torch.no_grad():
                logits = reference(torch.tensor([prompt + response])).logits[0]
            logits = logits[len(prompt) - 1 : -1] / (temperature or 1)
            chosen = torch.tensor(response)[:, None]
            expected = torch.log_softmax(logits, -1).gather(1, chosen)[:, 0]
            assert torch.allclose(torch.tensor(logprobs), expected, atol=1e-4)
            assert finished == (response[-1] == eos)
            assert eos not in response[:-1]
            assert finished or len(response) == sample.LIMIT


def test_vllm_and_torch_agree_when_greedy(tiny, answers):
    """Guards the KV cache, left padding and positions of TorchSampler, and the whole way into vLLM."""
    check_logprobs(tiny, answers.plain)
    check_logprobs(tiny, answers.two_engines)
    assert ids(answers.plain[GREEDY]) == ids(answers.two_engines[GREEDY])


def test_tensor_parallel_answers_are_the_same(answers):
    """Guards --tp: one engine over two ranks, each of which asks about its own prompts."""
    for temperature, expected in answers.two_engines.items():
        assert ids(answers.one_engine[temperature]) == ids(expected)


def test_a_drawn_answer_is_another_one(answers):
    """Guards seeds: the two samples of a prompt differ, and those of the same prompt at another place; greedy ones do
    not. (That they depend on nothing else: next test.)"""
    for drawn in (answers.plain, answers.two_engines):
        samples = ids(drawn[DRAWN])
        assert all(a != b for a, b in zip(samples[::2], samples[1::2]))
        assert samples[0] != samples[-2] and samples[1] != samples[-1]
        assert ids(drawn[GREEDY])[0] == ids(drawn[GREEDY])[-1]


def stop_for(drawn: dict, tokenizer) -> str:
    """Two characters that the first half of a response has."""
    texts = [tokenizer.decode(response[: sample.LIMIT // 2]) for response in ids(drawn)]
    pairs = sorted({text[i : i + 2] for text in texts for i in range(5, len(text) - 1)})
    return next(pair for pair in pairs if pair.isascii() and pair.isprintable() and " " not in pair)


def test_stop_texts_end_a_response(tiny, answers):
    """Guards --stop in both engines: a response ends with the token that completes the text, the text stays in it. And
    seeds: nothing else changes, though here one rank asks, and other responses end earlier."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    wholes = (answers.plain, answers.two_engines)
    stops = {stop_for(drawn, tokenizer) for whole in wholes for drawn in whole.values()}

    def cut(drawn: dict) -> list:
        """(response, finished) of what was drawn without a stop text."""
        expected = []
        for response, _, finished in drawn["samples"]:
            texts = [tokenizer.decode(response[: t + 1]) for t in range(len(response))]
            ended = [any(stop in text for stop in stops) for text in texts]
            if any(ended):
                response, finished = response[: ended.index(True) + 1], True
            expected.append((response, finished))
        changed = [short != whole for (short, _), whole in zip(expected, ids(drawn))]
        assert any(changed) and not all(changed)
        return expected

    asked = ("not to be found", *stops)
    for whole, stopped in zip(wholes, (answers.torch(*asked), answers.vllm(1, 1, *asked))):
        for temperature, drawn in whole.items():
            samples = stopped[temperature]["samples"]
            assert [(response, ended) for response, _, ended in samples] == cut(drawn)


STALE = Bug(
    "one-weight-not-synced",
    "infra/models.py",
    "        if name not in sent:\n            yield",
    "        if name not in sent and 'layers.1.mlp.down' not in name:\n            yield",
    (),
)
COLD = Bug(
    "engine-at-temperature-1",
    "rollout.py",
    "temperature=temperature,\n                max_tok",
    "temperature=1.0,\n                max_tok",
    (),
)


CANARY = """--task countdown3 --steps 9 --prompts_per_step 4 --max_prompt_tokens 64 --max_new_tokens 16
    --max_tokens_per_microbatch 400 --lr 1e-2 --temperature 0.7 --entropy_coef 0.1""".split()


@pytest.mark.parametrize("bug", [STALE, COLD], ids=lambda bug: bug.name)
def test_the_canary_stops_a_wrong_engine(tmp_path, tiny, bug):
    """Guards the guard: with a weight that never reaches vLLM, or another temperature there, the run stops itself."""
    plant(bug, tmp_path)
    ended = launch.run("ppo.py", *CANARY, "--model", tiny, "--out", "run", cwd=tmp_path)
    assert ended.code not in (0, None)
    assert "canary" in ended.said and "stale or wrong weights" in ended.said
