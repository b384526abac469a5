"""Index t of every tensor is about token t: packed passes against a plain model that is given one
prefix at a time."""

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

import kernels
import ppo
import rollout
from infra import dist, models

TEMPERATURE = 0.7
ONE = dist.Ranks()
SHAPES = [(3, 4), (7, 1), (1, 6), (5, 2), (12, 9)]  # (prompt, response) lengths


@pytest.fixture(scope="module", autouse=True)
def attention():
    kernels.setup("qwen2", liger=False, progress=False, bf16=False)


@pytest.fixture(scope="module")
def accelerator():
    return dist.start_ranks(bf16=False, sp=1)[0]


def load_critic(path, accelerator):
    """A fresh value head is zero, and would agree with everything."""
    critic = models.load_critic(path, accelerator, checkpointing=True)
    torch.nn.init.normal_(critic.score.weight, generator=torch.Generator().manual_seed(2))
    return critic


@pytest.fixture(scope="module")
def policy(tiny, accelerator):
    return models.load_policy(tiny, kernels.LogprobHead, accelerator, checkpointing=True)


@pytest.fixture(scope="module")
def critic(tiny, accelerator):
    return load_critic(tiny, accelerator)


def make_batch(path: str, seed: int = 0) -> rollout.Rollout:
    """Random tokens; pad, EOS and id 0 stand in the middle of prompts and responses too."""
    tokenizer, rng = AutoTokenizer.from_pretrained(path), random.Random(seed)
    special = [0, tokenizer.pad_token_id, tokenizer.eos_token_id]

    def ids(n: int) -> list[int]:
        return [
            rng.choice(special) if rng.random() < 0.3 else rng.randrange(len(tokenizer))
            for _ in range(n)
        ]

    samples = [rollout.Sample(ids(n), [-1.0] * n, finished=False) for _, n in SHAPES]
    return rollout.collate([ids(n) for n, _ in SHAPES], samples)


def pack(batch: rollout.Rollout, rows) -> kernels.Packed:
    return kernels.pack(batch.ids, batch.mask, batch.lengths, list(rows))


def gradient(model) -> torch.Tensor:
    """All gradients in one vector; none are left behind."""
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return flat


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() <= 1e-5 * b.norm()) and b.norm() > 1e-3


@pytest.mark.parametrize("folder", ["tiny", "tiny_untied"])
def test_packed_logprobs_are_those_of_the_prefix_loop(folder, request, accelerator):
    """Guards a shift by one, a missing temperature, sequences that see each other, and prompt cells
    that are not 0."""
    path = request.getfixturevalue(folder)
    batch = make_batch(path)
    plain = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa").eval()
    p = pack(batch, [3, 0, 4, 2, 1])
    policy = models.load_policy(path, kernels.LogprobHead, accelerator, checkpointing=True)
    got = [
        kernels.unpack([(p.index, x)], batch.mask, ONE)
        for x in kernels.policy_forward(policy, p, TEMPERATURE)
    ]
    expected = [torch.zeros(batch.mask.shape), torch.zeros(batch.mask.shape)]
    with torch.no_grad():
        for b, t in batch.mask.nonzero().tolist():
            logits = plain(batch.ids[b : b + 1, :t]).logits[0, -1]
            logp = torch.log_softmax(logits / TEMPERATURE, dim=-1)
            expected[0][b, t], expected[1][b, t] = logp[batch.ids[b, t]], -(logp.exp() * logp).sum()
    for a, b in zip(got, expected):
        assert torch.allclose(a, b, atol=1e-4)
        assert (a[:, 0] == 0).all() and (a[~batch.mask] == 0).all() and (a[batch.mask] != 0).all()


def test_the_value_of_a_token_comes_from_the_prefix_before_it(tiny, critic):
    """Guards values shifted by one: V(t) may not know token t, which was the action."""
    plain = AutoModelForTokenClassification.from_pretrained(
        tiny, num_labels=1, attn_implementation="sdpa"
    ).eval()
    plain.load_state_dict(critic.state_dict())
    batch = make_batch(tiny)
    p = pack(batch, [1, 4, 0, 2, 3])
    values = kernels.unpack([(p.index, kernels.critic_forward(critic, p))], batch.mask, ONE)
    with torch.no_grad():
        for b, t in batch.mask.nonzero().tolist():
            expected = plain(batch.ids[b : b + 1, :t]).logits[0, -1, 0].item()
            assert values[b, t].item() == pytest.approx(expected, abs=1e-4)
    assert (values[~batch.mask] == 0).all()


def test_a_new_value_head_says_zero(tiny, accelerator):
    """Guards a critic whose first values are noise, or whose dropout makes two passes differ."""
    critic = models.load_critic(tiny, accelerator, checkpointing=True)
    assert (kernels.critic_forward(critic, pack(make_batch(tiny), range(5))) == 0).all()
    assert critic.training and not any(
        isinstance(m, torch.nn.Dropout) and m.p for m in critic.modules()
    )


def test_collate_masks_come_from_lengths(tiny):
    """Guards EOS missing from the mask, and masks made from ids: here pad equals EOS and stands
    everywhere."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.pad_token = tokenizer.eos_token
    eos = tokenizer.eos_token_id
    prompts = [[eos, 5, eos], [7], [0, 0]]
    samples = [
        rollout.Sample([8, eos], [-0.1, -0.2], True),
        rollout.Sample([eos, 9, eos, eos, 0], [-1.0, -2.0, -3.0, -4.0, -5.0], False),
        rollout.Sample([eos], [-6.0], True),
    ]
    batch = rollout.collate(prompts, samples)
    assert batch.lengths == [5, 6, 3]
    assert batch.mask.tolist() == [[0, 0, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0]]
    for b, (prompt, sample) in enumerate(zip(prompts, samples)):
        assert batch.ids[b, : batch.lengths[b]].tolist() == prompt + sample.ids
        assert batch.ids[b][batch.mask[b]].tolist() == sample.ids
        assert batch.engine_logprobs[b][batch.mask[b]].tolist() == pytest.approx(sample.logprobs)
    assert (batch.engine_logprobs[~batch.mask] == 0).all()


def test_eos_is_in_the_mask_if_and_only_if_the_model_stopped(tiny):
    """Guards a sampler or a mask without the terminal token: the decision to stop would get no
    gradient."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    eos = [tokenizer.eos_token_id, *range(40, 80)]  # many ends, so that random weights find one
    sampler = rollout.TorchSampler(tiny, eos, max_len=32, dtype="float32")
    prompts = [[5, 6, 7], [8], [9, 10]] * 8
    samples = sampler.sample(prompts, n=1, max_new_tokens=12, temperature=1.0, seed=0)
    batch = rollout.collate(prompts, samples)
    assert 4 < sum(s.finished for s in samples) < 24
    for b, sample in enumerate(samples):
        ends = [i in eos for i in batch.ids[b][batch.mask[b]].tolist()]
        assert sum(ends) == ends[-1] == sample.finished
        assert sample.finished or len(sample.ids) == 12


def test_the_engine_and_the_trainer_agree(tiny, policy):
    """Guards a temperature that only one of the two applies, and log-probs of another token than
    the sampled one."""
    sampler = rollout.TorchSampler(tiny, [1], max_len=64, dtype="float32")
    prompts = [[5, 6, 7], [8], [9] * 11]
    samples = sampler.sample(prompts, n=2, max_new_tokens=20, temperature=TEMPERATURE, seed=3)
    batch = rollout.collate([p for p in prompts for _ in range(2)], samples)
    p = pack(batch, range(6))
    logprobs, _ = kernels.policy_forward(policy, p, TEMPERATURE)
    logprobs = kernels.unpack([(p.index, logprobs)], batch.mask, ONE)
    assert (logprobs - batch.engine_logprobs).abs().max() < 1e-4


def test_any_budget_and_any_order_give_the_same_gradient(tiny, policy, critic):
    """Guards a denominator per micro-batch, and numbers that land on another token's advantage or
    return."""
    batch = make_batch(tiny)
    noise = torch.Generator().manual_seed(0)
    advantages, returns, shift = (torch.randn(batch.mask.shape, generator=noise) for _ in range(3))
    p = pack(batch, range(5))
    with torch.no_grad():
        logprobs, _ = kernels.policy_forward(policy, p, TEMPERATURE)
        old = kernels.unpack([(p.index, logprobs)], batch.mask, ONE) + 0.2 * shift

    def gradients(order, budget):
        args = ppo.Args(max_tokens_per_microbatch=budget)
        run = SimpleNamespace(ranks=ONE, progress=list)
        micro = ppo.microbatches(batch, list(order), args, run)
        found = sorted(i for p in micro for i in p.index.tolist())
        assert found == batch.mask.flatten().nonzero()[:, 0].tolist()
        for p in micro:
            logprobs, entropy = kernels.policy_forward(policy, p, TEMPERATURE)
            at = (x.view(-1)[p.index] for x in (old, advantages))
            loss = ppo.policy_loss(logprobs, *at, args)[0] - 0.01 * entropy
            (loss.sum() / batch.mask.sum()).backward()
            values = kernels.critic_forward(critic, p)
            wanted = returns.view(-1)[p.index]
            loss, _ = ppo.value_loss(values, torch.zeros_like(values), wanted, 0.0)
            (loss.sum() / batch.mask.sum()).backward()
        return len(micro), gradient(policy), gradient(critic)

    one, *expected = gradients(range(5), 1000)
    assert one == 1
    for order, budget, count in (
        ([4, 2, 0, 3, 1], 1000, 1),
        (range(5), 20, 3),
        ([2, 4, 1, 0, 3], 27, 2),
    ):
        micro, *got = gradients(order, budget)
        assert micro >= count
        assert all(close(a, b) for a, b in zip(got, expected))
