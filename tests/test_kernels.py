"""Each fast path against its plain specification: values and gradients."""

import itertools
import os

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForTokenClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForTokenClassification,
)

import kernels
from infra import clock, flops, models
from infra.dist import Ranks, start_ranks

# ----------------------------------------------------------------------------- log-prob and entropy


def head_inputs(K: int, D: int, V: int, dtype=torch.float32):
    noise = torch.Generator().manual_seed(K)
    hidden = torch.randn(K, D, generator=noise, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, generator=noise, dtype=dtype).mul(0.5).requires_grad_()
    return hidden, weight, torch.randint(V, (K,), generator=noise)


@pytest.mark.parametrize("size", [None, 1, 40, 100, 1000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("K, D, V", [(1, 3, 5), (13, 7, 31), (33, 16, 257), (2, 1, 2)])
def test_chunked_logprobs_are_the_reference(K, D, V, temperature, size):
    """Guards a missing temperature (in the value or in the gradient alone), rows or columns lost at
    the end of a piece, and targets that get their gradient in a neighbouring piece too."""
    hidden, weight, targets = head_inputs(K, D, V)
    # of the two outputs in the loss: every gradient is another one
    weights = torch.linspace(-1, 2, 2 * K).view(2, K)
    results = []
    for f in (kernels.token_logprobs_ref, kernels.token_logprobs):
        if size and f is kernels.token_logprobs:
            out = kernels._ChunkedLogprob.apply(hidden, weight, targets, temperature, size)
        else:
            out = f(hidden, weight, targets, temperature)
        gradients = torch.autograd.grad((torch.stack(out) * weights).sum(), (hidden, weight))
        results.append([*out, *gradients])
    for expected, got in zip(*results):
        assert got.dtype == expected.dtype and torch.allclose(got, expected, atol=1e-4, rtol=1e-4)


def test_entropy_of_a_peaked_distribution_is_exact():
    """Guards cancellation: with logits near 50 and entropy near 1e-4 nats, an error of 1e-4 is all
    of it."""
    hidden, weight, targets = head_inputs(64, 128, 5000)
    # still rounds the logits
    wide = kernels.token_logprobs_ref(hidden.double(), weight.double() * 2, targets, 1.0)
    entropy = kernels.token_logprobs(hidden, weight * 2, targets, 1.0)[1]
    assert (entropy - wide[1]).abs().max() < 2e-5


def test_no_response_tokens_give_no_logprobs():
    """Guards a crash, or a gradient that is None, on a rank whose micro-batch is empty: FSDP would
    hang."""
    hidden, weight, targets = head_inputs(0, 3, 5)
    logprob, entropy = kernels.token_logprobs(hidden, weight, targets, 1.0)
    assert logprob.shape == entropy.shape == (0,)
    (logprob + entropy).sum().backward()
    assert hidden.grad.shape == (0, 3) and (weight.grad == 0).all()


@pytest.mark.parametrize("which", [0, 1])
def test_gradcheck(which):
    """Guards the hand-written derivatives of log-prob (0) and entropy (1) against finite
    differences."""
    hidden, weight, targets = head_inputs(5, 3, 7, torch.float64)

    def run(hidden, weight):
        return kernels._ChunkedLogprob.apply(hidden, weight, targets, 0.7, 2)[which]

    assert torch.autograd.gradcheck(run, (hidden, weight))


def test_nothing_as_large_as_the_logits_is_kept():
    """Guards (K, V) tensors saved for the backward pass: they are what the pieces are for."""
    hidden, weight, targets = head_inputs(64, 4, 100)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.numel()) or x, lambda x: x
    ):
        kernels.token_logprobs(hidden, weight, targets, 1.0)
    assert saved and max(saved) <= max(hidden.numel(), weight.numel())


def test_the_head_stays_tied_and_is_a_linear_layer_without_targets(tiny, tiny_untied):
    """Guards a head that loses its tie to the embedding (its gradient too), or an untied one that
    gets tied."""
    kernels.setup("qwen2", liger=False, progress=False, bf16=False)
    accelerator, _ = start_ranks(bf16=False, sp=1)
    for folder, tied in ((tiny, True), (tiny_untied, False)):
        policy = models.load_policy(folder, kernels.LogprobHead, accelerator)
        head, embedding = policy.lm_head, policy.model.embed_tokens.weight
        assert (head.weight is embedding) == tied
        assert ("lm_head.weight" in dict(models.full_weights(policy, torch.float32))) != tied
        hidden, targets = torch.randn(1, 3, embedding.shape[1]), torch.tensor([5, 6, 7])
        logits = head(hidden)
        assert torch.equal(logits, hidden @ head.weight.T)
        head.targets, head.temperature = targets, 0.5
        logprobs, entropy = head(hidden)[0].unbind(-1)
        logp = torch.log_softmax(logits[0] / 0.5, -1)
        assert torch.allclose(logprobs, logp[range(3), targets], atol=1e-4)
        assert torch.allclose(entropy, -(logp.exp() * logp).sum(-1), atol=1e-4)
        logprobs.sum().backward()
        assert (embedding.grad is not None) == tied


# -------------------------------------------------------------------------------------- packed rows


@pytest.mark.parametrize(
    "lengths", [[1], [1, 1, 1], [7], [90, 1, 3, 2, 61, 7, 1], [5, 5, 5], [1, 64], [64, 1]]
)
def test_varlen_attention_is_sdpa_on_each_sequence(lengths):
    """Guards sequences that see each other or the future, padding that is seen, and kv heads dealt
    out wrongly."""
    noise = torch.Generator().manual_seed(0)
    total, scale = sum(lengths), 0.3
    q, k, v = (
        torch.randn(total, heads, 8, generator=noise, requires_grad=True) for heads in (4, 2, 2)
    )
    weights = torch.randn(total, 4, 8, generator=noise)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    parts = []
    for a, b in itertools.pairwise(bounds.tolist()):
        one = [
            x[a:b].transpose(0, 1)
            for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
        ]
        parts.append(
            scaled_dot_product_attention(*one, is_causal=True, scale=scale).transpose(0, 1)
        )
    results = []
    for out in (torch.cat(parts), kernels.varlen_attention(q, k, v, bounds, max(lengths), scale)):
        results.append([out, *torch.autograd.grad((out * weights).sum(), (q, k, v))])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results))


def ragged() -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """ids, mask and lengths of five sequences; what is fed of them, 39 tokens, needs spare slots
    for sp = 2 and 4."""
    prompts, lengths = [3, 1, 6, 9, 2], [8, 2, 7, 15, 12]
    column = torch.arange(15)
    mask = (column >= torch.tensor(prompts)[:, None]) & (column < torch.tensor(lengths)[:, None])
    ids = torch.randint(1, 50, mask.shape, generator=torch.Generator().manual_seed(0))
    return ids, mask, lengths


@pytest.mark.parametrize("sp", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [4, 0], [1], []])
def test_the_slices_of_a_packed_row_make_the_whole(rows, sp):
    """Guards spare slots that are trained on, tokens lost between two slices, targets that are not
    the next token."""
    ids, mask, lengths = ragged()
    parts = [kernels.pack(ids, mask, lengths, rows, rank, sp) for rank in range(sp)]
    assert len({p.ids.shape for p in parts}) == 1 and parts[0].ids.numel() > 0
    whole, positions = (
        torch.cat(x, dim=1)[0] for x in ([p.ids for p in parts], [p.position_ids for p in parts])
    )
    bounds, fed = parts[0].cu_seqlens.tolist(), [lengths[b] - 1 for b in rows]
    assert bounds[-1] == len(whole) == max(1, -(-sum(fed) // sp)) * sp
    assert parts[0].max_seqlen == max(b - a for a, b in itertools.pairwise(bounds))
    for b, a, n in zip(rows, bounds, fed):
        assert torch.equal(whole[a : a + n], ids[b, :n])
        assert torch.equal(positions[a : a + n], torch.arange(n))
    index = torch.cat([p.index for p in parts])
    chosen = torch.zeros_like(mask)
    chosen[rows] = mask[rows]
    assert sorted(index.tolist()) == chosen.flatten().nonzero()[:, 0].tolist()
    for p in parts:
        assert torch.equal(p.targets, ids.flatten()[p.index])
        # the slot that predicts t has read t - 1
        assert torch.equal(p.ids[0, p.keep], ids.flatten()[p.index - 1])


def test_unpack_is_the_way_back():
    """Guards values that land on another token, and cells that keep an old value."""
    ids, mask, lengths = ragged()
    parts = [kernels.pack(ids, mask, lengths, rows) for rows in ([3, 1], [], [4, 0, 2])]
    out = kernels.unpack([(p.index, p.targets.float()) for p in parts], mask, Ranks())
    assert out.dtype == torch.float32 and torch.equal(out, ids * mask.float())


# -------------------------------------------------------------------------------- clocks and memory


@pytest.mark.parametrize("critic", [False, True])
def test_flops_are_those_of_torchs_counter(critic):
    """Guards the MFU: every product of matrices that torch counts in plain transformers, the head
    on responses alone; but for attention above the diagonal, which that counts and nobody needs."""
    kv_heads, width, layers = 2, 6 * 16, 2  # heads of 16, wider together than the model
    config = Qwen3Config(
        vocab_size=700,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=kv_heads,
        head_dim=16,
        num_labels=1,
        attn_implementation="eager",
    )
    model = (Qwen3ForTokenClassification if critic else Qwen3ForCausalLM)(config)
    fed, responses = [40, 7, 23], [11, 3, 20]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for n, k in zip(fed, responses):
            model(torch.arange(n)[None], **({} if critic else {"logits_to_keep": k}))
    above = 2 * layers * width * sum(n * n for n in fed)
    found = flops.forward_flops(model, fed, sum(responses))
    # within what norms, biases and one number a token take
    assert found == pytest.approx(counter.get_total_flops() - above, rel=0.02)


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs /proc/self/clear_refs"
)
def test_memory_of_each_phase():
    """Guards peaks that are charged to a later phase, and phases in two parts. The best of three:
    the kernel may take pages of this process back meanwhile."""
    for _ in range(3):
        times: dict[str, float] = {}
        phases = [("reward", 1), ("forward", 300), ("reward", 1), ("sync", 150), ("report", 1)]
        for phase, megabytes in phases:
            with clock.timed(times, phase):
                torch.ones(megabytes << 18).sum()
        peaks = {
            key.removeprefix("perf/peak_gb_"): gb for key, gb in times.items() if "peak" in key
        }
        assert set(peaks) == {"reward", "forward", "sync", "report"}
        assert times["time/step"] == pytest.approx(sum(times[f"time/{phase}"] for phase in peaks))
        large = peaks["forward"] - peaks["reward"]
        small = peaks["sync"] - peaks["report"]
        if 0.25 < large < 0.35 and 0.1 < small < 0.2:
            break
    assert 0.25 < large < 0.35
    assert 0.1 < small < 0.2


class Made(TorchDispatchMode):
    """The numbers of elements of all tensors that operations make while it is on."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.sizes.append(x.numel())
        return out


def long_response(tokens: int, policy, critic) -> list[int]:
    """What a forward and an update of both models make on one response of so many tokens."""
    ids = torch.randint(64, (1, tokens + 100), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(tokens + 100)[None] >= 100
    p = kernels.pack(ids, mask, [tokens + 100], [0])
    assert len(p.keep) == tokens
    with Made() as made:
        with torch.no_grad():
            kernels.policy_forward(policy, p, 1.0)
            kernels.critic_forward(critic, p)
        logprobs, entropy = kernels.policy_forward(policy, p, 1.0)
        (logprobs + entropy).mean().backward()
        kernels.critic_forward(critic, p).mean().backward()
    return made.sizes


def test_memory_grows_linearly_with_the_response():
    """Guards anything of T x T, forward, recomputed and backward: a mask, scores of a head, a T-long
    tensor for each token. Counted, as a peak of memory would show it at lengths alone that take
    minutes."""
    kernels.setup("qwen2", liger=False, progress=False, bf16=False)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=20_000,
        num_labels=1,
    )
    config._attn_implementation = "varlen"
    policy, critic = Qwen2ForCausalLM(config), Qwen2ForTokenClassification(config)
    policy.lm_head.__class__ = kernels.LogprobHead
    accelerator, _ = start_ranks(bf16=False, sp=1)
    policy, critic = (
        models.shard(model, accelerator, checkpointing=True, offload=False)
        for model in (policy, critic)
    )
    one, two = (long_response(tokens, policy, critic) for tokens in (1000, 2000))
    assert len(one) == len(two) > 100
    assert max(two) < 2.1 * max(one) and sum(two) < 2.1 * sum(one)
    assert max(one) < 1000 * 1000 / 4  # of T x T, a quarter


def test_ligers_logprobs_mean_the_same():
    """Guards the call of Liger's kernel for Hopper (the order of its arguments, the sign, nats), by
    its portable twin."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as function

    hidden, weight, targets = head_inputs(33, 16, 257)
    nll, entropy = function.apply(hidden, weight, targets, 0.7, -100, 1, True)
    for got, expected in zip((-nll, entropy), kernels.token_logprobs(hidden, weight, targets, 0.7)):
        assert torch.allclose(got, expected, atol=1e-4)
    if not torch.cuda.is_available():
        assert kernels.find_liger_logprobs() == "chunked" and kernels.LIGER_LOGPROB is None
