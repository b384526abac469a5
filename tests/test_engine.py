"""The two engines, and vLLM on one rank and on two: same weights, same answers."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from planted import Bug, plant
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent


def answers(model: str, engine: str, temperature: float, ranks: int = 1, tp: int = 1) -> dict:
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", "29621"]
    launch = launch if ranks > 1 else []
    command = [sys.executable, *launch, "tests/sample.py", model, engine, str(tp), str(temperature)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert said.returncode == 0, said.stderr[-3000:]
    return json.loads(next(line for line in said.stdout.splitlines() if line.startswith('{"prompts"')))


def check_logprobs(model: str, drawn: dict, temperature: float) -> None:
    """Each sample's log-probs are the model's own, in plain transformers; it ends with EOS if and only if finished."""
    reference = AutoModelForCausalLM.from_pretrained(model)
    for i, (ids, logprobs, finished) in enumerate(drawn["samples"]):
        prompt = drawn["prompts"][i]
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / (temperature or 1)
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(logprobs), expected, atol=1e-4)
        assert finished == (ids[-1] == reference.config.eos_token_id)
        assert reference.config.eos_token_id not in ids[:-1]
        assert finished or len(ids) == 40


@pytest.fixture(scope="module")
def greedy(tiny) -> dict:
    return answers(tiny, "vllm", 0.0)


def test_vllm_and_torch_agree_when_greedy(tiny, greedy):
    """Guards the KV cache, left padding and positions of TorchSampler, and the whole way into vLLM."""
    check_logprobs(tiny, greedy, 0.0)
    other = answers(tiny, "torch", 0.0)
    assert [s[0] for s in other["samples"]] == [s[0] for s in greedy["samples"]]
    check_logprobs(tiny, other, 0.0)


def test_tensor_parallel_answers_are_the_same(tiny, greedy):
    """Guards --tp: one engine over two ranks, each of which asks about its own prompts."""
    assert [s[0] for s in answers(tiny, "vllm", 0.0, ranks=2, tp=2)["samples"]] == [s[0] for s in greedy["samples"]]


def test_sampling_depends_on_the_seed_alone(tiny):
    """Guards seeds: the two samples of a prompt differ, and two ranks with an engine each draw what one rank draws."""
    one = answers(tiny, "vllm", 0.7)
    check_logprobs(tiny, one, 0.7)
    assert all(a[0] != b[0] for a, b in zip(one["samples"][::2], one["samples"][1::2]))
    assert [s[0] for s in answers(tiny, "vllm", 0.7, ranks=2)["samples"]] == [s[0] for s in one["samples"]]
    check_logprobs(tiny, answers(tiny, "torch", 0.7), 0.7)


STALE = Bug("one-weight-not-synced", "kernels.py", "for name, p in model.named_parameters():",
            "for name, p in [x for x in model.named_parameters() if 'layers.1.mlp.down' not in x[0]]:", ())  # fmt: skip
COLD = Bug("engine-at-temperature-1", "rollout.py", "temperature=temperature, max_tok", "temperature=1.0, max_tok", ())


@pytest.mark.parametrize("bug", [STALE, COLD], ids=lambda bug: bug.name)
def test_the_canary_stops_a_wrong_engine(tmp_path, tiny, bug):
    """Guards the guard: with a weight that never reaches vLLM, or another temperature there, the run stops itself."""
    plant(bug, tmp_path)
    flags = ["--model", tiny, "--out", "run", "--task", "countdown3", "--steps", "9", "--prompts_per_step", "4",
             "--max_prompt_tokens", "64", "--max_new_tokens", "16", "--max_tokens_per_microbatch", "400",
             "--lr", "1e-2", "--temperature", "0.7", "--entropy_coef", "0.1"]  # fmt: skip
    said = subprocess.run([sys.executable, "ppo.py", *flags], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert said.returncode != 0
    assert "canary" in said.stderr and "stale or wrong weights" in said.stderr
