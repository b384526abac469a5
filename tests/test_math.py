"""The pure functions of ppo.py, and the Meter, against hand-made numbers and brute force."""

import math

import numpy as np
import pytest
import torch

import ppo
from infra import dist

LENGTHS = [
    (2, 5),
    (6, 1),
    (1, 9),
    (4, 0),
    (3, 4),
]  # (prompt, response); no response: a sample left out of the loss
WIDTH = 11


def ragged() -> dict[str, torch.Tensor]:
    """Masks that start and end at different columns, and noise in every cell, masked or not."""
    mask = torch.zeros(len(LENGTHS), WIDTH, dtype=torch.bool)
    for row, (prompt, response) in enumerate(LENGTHS):
        mask[row, prompt : prompt + response] = True
    noise = torch.Generator().manual_seed(0)
    names = ("token_rewards", "values", "advantages")
    return {
        name: torch.randn(mask.shape, generator=noise, dtype=torch.float64) for name in names
    } | {"mask": mask}


@pytest.mark.parametrize(
    "gamma, lam", [(0.9, 0.8), (1.0, 0.95), (0.97, 1.0), (1.0, 1.0), (0.9, 0.0)]
)
def test_gae_is_the_double_sum(gamma, lam):
    """Guards the recursion of GAE: wrong discount, a value from a masked cell, or a last token that bootstraps."""
    x = ragged()
    advantages = ppo.gae(x["token_rewards"], x["values"], x["mask"], gamma, lam)
    for b in range(len(LENGTHS)):
        tokens = x["mask"][b].nonzero()[:, 0].tolist()
        reward, value = (
            [x[name][b, t].item() for t in tokens] for name in ("token_rewards", "values")
        )
        value.append(0.0)
        for i, t in enumerate(tokens):
            deltas = [reward[j] + gamma * value[j + 1] - value[j] for j in range(i, len(tokens))]
            expected = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas))
            assert advantages[b, t].item() == pytest.approx(expected)


@pytest.mark.parametrize("garbage", [0.0, 1e9, math.nan])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_returns_are_the_rest_of_the_rewards(gamma, garbage):
    """Guards returns = advantages + values of the critic's own lambda: at lambda 1 they are discounted sums of rewards,
    without any value, whatever the policy's lambda; the score on the last token; and zeros outside the mask."""
    x = ragged()
    mask = x["mask"]
    scores = torch.arange(1.0, len(LENGTHS) + 1, dtype=torch.float64)
    values = torch.where(mask, x["values"], garbage)
    batch = ppo.Batch([], [], [], ids=mask, mask=mask, engine_logprobs=values, lengths=[])
    batch.scores, batch.old_values = scores, values
    ppo.add_advantages(batch, ppo.Args(gamma=gamma, lam=0.5, critic_lam=1.0))
    for b, (prompt, response) in enumerate(LENGTHS):
        expected = torch.zeros(WIDTH, dtype=torch.float64)
        for t in range(response):
            expected[prompt + t] = scores[b] * gamma ** (response - 1 - t)
        assert torch.allclose(batch.returns[b], expected)


def test_an_advantage_without_a_formula_is_told():
    """Guards a new name for --advantage that would take another one's formula."""
    x = ragged()
    batch = ppo.Batch(
        [], [], [], ids=x["mask"], mask=x["mask"], engine_logprobs=x["values"], lengths=[]
    )
    batch.scores = batch.old_values = x["values"][:, 0]
    args = ppo.Args(advantage="median")
    assert args.has_critic
    with pytest.raises(
        ValueError, match="advantage='median' has no formula: add one to add_advantages"
    ):
        ppo.add_advantages(batch, args)


def test_whiten_is_numpy_over_the_masked_entries():
    """Guards whitening over padding, over each row alone, or with the wrong variance."""
    x = ragged()
    out = ppo.whiten(x["advantages"], x["mask"])
    kept = x["advantages"].numpy()[x["mask"].numpy()]
    assert np.allclose(out[x["mask"]].numpy(), (kept - kept.mean()) / kept.std())
    assert abs(out[x["mask"]].mean()) < 1e-9 and out[x["mask"]].var(
        unbiased=False
    ).item() == pytest.approx(1, abs=1e-6)


def test_whiten_survives_equal_advantages_and_an_empty_mask():
    """Guards a division by zero when all advantages are equal, or every sample was left out."""
    mask = torch.tensor([[False, True, True]])
    assert ppo.whiten(torch.full((1, 3), 7.0), mask).tolist() == [[0, 0, 0]]
    assert ppo.whiten(torch.full((1, 3), 7.0), torch.zeros_like(mask)).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("garbage", [1e9, -1e9, math.inf, math.nan])
def test_garbage_outside_the_mask_changes_nothing(garbage):
    """Guards GAE or whitening without the mask, and results that are not 0 outside it."""

    def results(x):
        advantages = ppo.gae(x["token_rewards"], x["values"], x["mask"], 0.9, 0.8)
        return advantages, ppo.whiten(advantages, x["mask"]), ppo.whiten(x["advantages"], x["mask"])

    clean = ragged()
    mask = clean["mask"]
    dirty = {
        name: torch.where(mask, t, garbage) if name != "mask" else t for name, t in clean.items()
    }
    for expected, got in zip(results(clean), results(dirty)):
        assert torch.equal(expected, got)
        assert (got[~mask] == 0).all()


def test_inputs_are_left_as_they_were():
    """Guards a write into an argument, seen by whoever reads the tensor next."""
    x, before = ragged(), ragged()
    a, b, c = (x[name] for name in ("token_rewards", "values", "advantages"))
    ppo.gae(a, b, x["mask"], 0.9, 0.8)
    ppo.whiten(c, x["mask"])
    ppo.policy_loss(a, b, c, ppo.PPOFlags(clip_high=0.28))
    ppo.value_loss(a, b, c, 0.2)
    for kind in ("k1", "k2", "k3"):
        ppo.kl_estimate(a, b, kind)
    assert all(torch.equal(x[name], before[name]) for name in x)


def test_kl_estimates_by_hand():
    """Guards the sign of the KL (positive where the policy is likelier than the reference) and each formula."""
    policy, ref = (
        torch.tensor([-1.0, -3.0, -2.0]),
        torch.tensor([-1.5, -1.0, -2.0]),
    )  # log-ratios 0.5, -2, 0
    assert ppo.kl_estimate(policy, ref, "k1").tolist() == [0.5, -2.0, 0.0]
    assert ppo.kl_estimate(policy, ref, "k2").tolist() == [0.125, 2.0, 0.0]
    assert ppo.kl_estimate(policy, ref, "k3").tolist() == pytest.approx(
        [math.exp(-0.5) - 0.5, math.exp(2) - 3, 0]
    )
    with pytest.raises(KeyError, match="k4"):
        ppo.kl_estimate(policy, ref, "k4")


def test_kl_estimates_have_the_true_kl_as_mean():
    """Guards the direction: samples of the policy must estimate KL(policy || reference), not the reverse."""
    noise = torch.Generator().manual_seed(0)
    logits = torch.randn(10, generator=noise, dtype=torch.float64)
    policy = torch.log_softmax(logits, 0)
    tokens = torch.multinomial(policy.exp(), 200_000, replacement=True, generator=noise)

    def means(ref):
        return {
            kind: ppo.kl_estimate(policy[tokens], ref[tokens], kind).mean().item()
            for kind in ("k1", "k2", "k3")
        }

    far = torch.log_softmax(torch.randn(10, generator=noise, dtype=torch.float64), 0)
    true, reverse = ((p.exp() * (p - q)).sum().item() for p, q in ((policy, far), (far, policy)))
    assert abs(true - reverse) > 0.1 * true  # or the test could not tell them apart
    assert means(far)["k1"] == pytest.approx(true, rel=0.02) and means(far)["k3"] == pytest.approx(
        true, rel=0.02
    )
    near = torch.log_softmax(
        logits + 0.1 * torch.randn(10, generator=noise, dtype=torch.float64), 0
    )
    true = (policy.exp() * (policy - near)).sum().item()
    assert means(near)["k2"] == pytest.approx(true, rel=0.1) and means(near)["k3"] == pytest.approx(
        true, rel=0.1
    )
    assert (ppo.kl_estimate(policy[tokens], far[tokens], "k3") >= 0).all()


def test_policy_loss_four_textbook_cases():
    """Guards minimum for maximum, an inverted ratio, a flipped advantage, and clip_low mixed up with clip_high."""
    log_ratio, advantages = (
        torch.tensor([0.5, 0.5, -0.5, -0.5]),
        torch.tensor([1.0, -1.0, 1.0, -1.0]),
    )
    old = torch.full((4,), -2.0)
    loss, low, high = ppo.policy_loss(old + log_ratio, old, advantages, ppo.PPOFlags(clip_high=0.3))
    assert loss.tolist() == pytest.approx([-1.3, math.exp(0.5), -math.exp(-0.5), 0.8])
    assert low.tolist() == [False, False, False, True] and high.tolist() == [
        True,
        False,
        False,
        False,
    ]


def test_policy_gradient_pushes_good_tokens_up():
    """Guards the sign of the advantage: one step down the loss must raise the log-prob of what was good, at the first
    pass over a batch (ratio 1) too, and a clipped token must get no gradient."""
    logprobs = torch.tensor([-1.0, -1.0, -0.5, -1.5], requires_grad=True)
    advantages = torch.tensor([2.0, -3.0, 1.0, -1.0])
    loss, _, _ = ppo.policy_loss(logprobs, torch.full((4,), -1.0), advantages, ppo.PPOFlags())
    loss.sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([-2.0, 3.0, 0.0, 0.0])


def test_value_loss_by_hand():
    """Guards the half, the clip around the old value (not the return), and minimum for maximum."""
    values, old, returns = (
        torch.tensor([1.0, 1.0, 0.1]),
        torch.zeros(3),
        torch.tensor([3.0, 0.1, 1.0]),
    )
    loss, clipped = ppo.value_loss(values, old, returns, 0.0)
    assert loss.tolist() == pytest.approx([2.0, 0.405, 0.405]) and clipped.tolist() == [
        False,
        False,
        False,
    ]
    loss, clipped = ppo.value_loss(
        values, old, returns, 0.2
    )  # the clipped values are 0.2, 0.2, 0.1
    assert loss.tolist() == pytest.approx([0.5 * 2.8**2, 0.405, 0.405]) and clipped.tolist() == [
        True,
        False,
        False,
    ]


def test_meter_weighs_every_entry_alike():
    """Guards means of means: micro-batches of different sizes, an empty one among them."""
    meter = dist.Meter()
    for x in (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([]), torch.tensor([[14.0]])):
        meter.add("", a=x)
    meter.add("", b=torch.tensor([True, False, False, False]))
    meter.add("", empty=torch.tensor([]))
    assert meter.means(dist.Ranks()) == {"a": 5.0, "b": 0.25, "empty": 0.0}
