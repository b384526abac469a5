"""The two engines, and vLLM on one rank and on two: same weights, same answers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from planted import Bug, plant
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent


WAYS = {  # name -> engine, temperature, ranks, tp
    "vllm greedy": ("vllm", 0.0, 1, 1),
    "torch greedy": ("torch", 0.0, 1, 1),
    "vllm drawn": ("vllm", 0.7, 1, 1),
    "torch drawn": ("torch", 0.7, 1, 1),
    "two ranks, one engine": ("vllm", 0.0, 2, 2),
    "two ranks, two engines": ("vllm", 0.7, 2, 1),
}


def ask(
    model: str, engine: str, temperature: float, ranks: int, tp: int, *stop: str
) -> subprocess.Popen:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [
        sys.executable,
        *(launch if ranks > 1 else []),
        "tests/sample.py",
        model,
        engine,
        tp,
        temperature,
        *stop,
    ]
    return subprocess.Popen(
        map(str, command), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def answers(tiny) -> dict[str, dict]:
    """What every way of asking answered; two processes at a time."""
    found = {}
    for names in (list(WAYS)[:2], list(WAYS)[2:4], list(WAYS)[4:5], list(WAYS)[5:]):
        for name, process in [(name, ask(tiny, *WAYS[name])) for name in names]:
            found[name] = answered(process)
    return found


def answered(process: subprocess.Popen) -> dict:
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-3000:]
    return json.loads(next(line for line in out.splitlines() if line.startswith('{"prompts"')))


def ids(drawn: dict) -> list[list[int]]:
    return [sample[0] for sample in drawn["samples"]]


def check_logprobs(model: str, drawn: dict, temperature: float) -> None:
    """Each sample's log-probs are the model's own, in plain transformers; it ends with EOS if and only if finished."""
    reference = AutoModelForCausalLM.from_pretrained(model)
    for i, (response, logprobs, finished) in enumerate(drawn["samples"]):
        prompt = drawn["prompts"][i]
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + response])).logits[
                0, len(prompt) - 1 : -1
            ] / (temperature or 1)
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(logprobs), expected, atol=1e-4)
        assert finished == (response[-1] == reference.config.eos_token_id)
        assert reference.config.eos_token_id not in response[:-1]
        assert finished or len(response) == 40


def test_vllm_and_torch_agree_when_greedy(tiny, answers):
    """Guards the KV cache, left padding and positions of TorchSampler, and the whole way into vLLM."""
    check_logprobs(tiny, answers["vllm greedy"], 0.0)
    check_logprobs(tiny, answers["torch greedy"], 0.0)
    assert ids(answers["torch greedy"]) == ids(answers["vllm greedy"])


def test_tensor_parallel_answers_are_the_same(answers):
    """Guards --tp: one engine over two ranks, each of which asks about its own prompts."""
    assert ids(answers["two ranks, one engine"]) == ids(answers["vllm greedy"])


def test_sampling_depends_on_the_seed_alone(tiny, answers):
    """Guards seeds: the two samples of a prompt differ, and two ranks with an engine each draw what one rank draws."""
    check_logprobs(tiny, answers["vllm drawn"], 0.7)
    check_logprobs(tiny, answers["torch drawn"], 0.7)
    drawn = ids(answers["vllm drawn"])
    assert all(a != b for a, b in zip(drawn[::2], drawn[1::2]))
    assert ids(answers["two ranks, two engines"]) == drawn


def test_stop_texts_end_a_response(tiny, answers):
    """Guards --stop in both engines: a response ends with the token that completes the text, the text stays in it, and
    nothing else changes."""
    tokenizer, whole = AutoTokenizer.from_pretrained(tiny), ids(answers["vllm greedy"])
    texts = [tokenizer.decode(response) for response in whole]
    pairs = sorted({text[i : i + 2] for text in texts for i in range(5, len(text) - 10)})
    stop = next(pair for pair in pairs if pair.isascii() and pair.isprintable() and " " not in pair)
    expected = []
    for response, (_, _, finished) in zip(whole, answers["vllm greedy"]["samples"]):
        ends = (t for t in range(1, len(response) + 1) if stop in tokenizer.decode(response[:t]))
        end = next(ends, None)
        expected.append((response[:end], finished or end is not None))
    assert any(len(cut) < len(response) for (cut, _), response in zip(expected, whole))
    for process in [
        ask(tiny, engine, 0.0, 1, 1, stop, "not to be found") for engine in ("vllm", "torch")
    ]:
        assert [
            (response, finished) for response, _, finished in answered(process)["samples"]
        ] == expected


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


def test_the_canary_stops_a_wrong_engine(tmp_path, tiny):
    """Guards the guard: with a weight that never reaches vLLM, or another temperature there, the run stops itself."""
    flags = [
        "--model",
        tiny,
        "--out",
        "run",
        "--task",
        "countdown3",
        "--steps",
        "9",
        "--prompts_per_step",
        "4",
        "--max_prompt_tokens",
        "64",
        "--max_new_tokens",
        "16",
        "--max_tokens_per_microbatch",
        "400",
        "--lr",
        "1e-2",
        "--temperature",
        "0.7",
        "--entropy_coef",
        "0.1",
    ]
    running = []
    for bug in (STALE, COLD):
        folder = tmp_path / bug.name
        folder.mkdir()
        plant(bug, folder)
        command = [sys.executable, "ppo.py", *flags]
        running.append(
            subprocess.Popen(
                command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    for run in running:
        _, errors = run.communicate(timeout=200)
        assert run.returncode != 0 and "canary" in errors and "stale or wrong weights" in errors
