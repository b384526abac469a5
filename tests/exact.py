"""The plain way to train, and every way that kernels.py and infra/ have to do the same;
tests/test_exact.py compares them.

    torchrun --nproc_per_node N tests/exact.py FOLDER
    TRITON_INTERPRET=1 python tests/exact.py FOLDER

The first: the ways of N ranks. The second: Liger's patches. Both want the folder of `make_folders`
and leave their numbers in it, a file for each rank.
"""

import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo  # noqa: E402, I001  (first: the guard for the name `kernels`)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
)

import kernels  # noqa: E402
import rollout  # noqa: E402
from infra import dist, models  # noqa: E402

LOADERS = {"policy": AutoModelForCausalLM, "critic": AutoModelForTokenClassification}
# 4 heads for 2 kv heads: with sp 4 ranks outnumber the kv heads. Qwen3 has 12 for 3, which 2 ranks
# cannot share out; its heads are wider than hidden size over heads. No size of a first dimension but
# the heads' is a multiple of 4, so shards are uneven.
SIZES = {
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 54,
    "num_hidden_layers": 2,
    "num_labels": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}
CASES = {
    "qwen2-tied-policy": {"tie_word_embeddings": True},
    "qwen2-critic": {},
    "qwen3-tied-policy": {
        "tie_word_embeddings": True,
        "num_attention_heads": 12,
        "num_key_value_heads": 3,
        "head_dim": 6,
    },
    "llama-untied-policy": {"tie_word_embeddings": False},
    "llama-critic": {},
}
# of 4 ranks: what they are to show is about groups of ranks, and not about architectures
CASES_OF_4 = ["qwen2-tied-policy", "llama-critic"]
ARCHITECTURES = ["qwen2-tied-policy", "qwen3-tied-policy", "llama-untied-policy"]
TEMPERATURE = 0.7


def make_folders(root: Path, cases: dict[str, dict] = CASES) -> None:
    """Every parameter is far from where models start: norms not at 1, biases and heads not at 0."""
    for seed, (case, changed) in enumerate(cases.items()):
        noise = torch.Generator().manual_seed(seed)
        config = AutoConfig.for_model(case.split("-")[0], **(SIZES | changed))
        model = LOADERS[case.split("-")[-1]].from_config(config)
        with torch.no_grad():
            for p in model.parameters():
                moved = 0.15 * torch.randn(p.shape, generator=noise)
                p.mul_(0.1 if p.dim() == 2 else 1.0).add_(moved)
        model.save_pretrained(root / case)


# ---------------------------------------------------------------------------------- what is trained

PROMPTS = [1, 1, 5, 9, 3, 12, 7]
LENGTHS = [2, 2, 20, 25, 26, 25, 37]  # two of the shortest there are, and a long one
BUDGET = 40  # tokens of a packed row, whatever the number of ranks that share it
# no two of the second fit in one row: two or four rows leave one empty
UPDATES = [[0, 1, 2, 3, 4, 5, 6], [3, 4, 5]]
# Adam divides the gradient by its own size: with the usual eps the first step is lr times the sign
# of the gradient, so a rounding error in an entry near 0 becomes 2 * lr, and an lr that keeps this
# below 1e-5 hides every other fault as well. With eps at the size of the gradient a step is smooth
# in it: an error of 1e-7 moves a weight by 1e-6 at most.
ADAM = {"betas": (0.9, 0.95), "weight_decay": 0.0, "eps": 1e-3}
LRS, MAX_NORM = [1e-2, 5e-3], 0.5


def make_batch() -> rollout.Rollout:
    rng = random.Random(0)
    tokens = [[rng.randrange(SIZES["vocab_size"]) for _ in range(n)] for n in LENGTHS]
    samples = [
        rollout.Sample(ids[p:], [0.0] * len(ids[p:]), True) for ids, p in zip(tokens, PROMPTS)
    ]
    batch = rollout.collate([ids[:p] for ids, p in zip(tokens, PROMPTS)], samples)
    # a sample whose reward failed on our side: it is fed, and nothing of it counts
    batch.mask[2] = False
    return batch


def make_loss(batch: rollout.Rollout, case: str):
    """(outputs, index) -> loss of each token: all of them different, in log-prob and entropy, or in
    the value."""
    noise = torch.Generator().manual_seed(7)
    a, b = torch.randn(2, batch.mask.numel(), generator=noise)
    if "critic" in case:
        return lambda outputs, index: 0.5 * (outputs[0] - a[index]) ** 2
    return lambda outputs, index: a[index] * outputs[0] - 0.3 * (1 + b[index]) * outputs[1]


class Result(NamedTuple):
    # (B, T) each: before training, then in each update, log-probs and entropies, or values
    outputs: list[Tensor]
    gradients: list[dict[str, Tensor]]  # of each update, before clipping
    norms: list[float]
    weights: dict[str, Tensor]  # after all updates
    made: dict  # what the way has really switched on


# ------------------------------------------------------------------------------------ the plain way


def plain(root: Path, case: str) -> Result:
    """transformers and torch alone: one sequence at a time, nothing packed, padded, sharded or
    patched."""
    config = AutoConfig.from_pretrained(root / case)
    options = {"config": config, "dtype": torch.float32, "attn_implementation": "sdpa"}
    model = LOADERS[case.split("-")[-1]].from_pretrained(root / case, **options).eval()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    batch, result = make_batch(), Result([], [], [], {}, {})
    loss, width = make_loss(batch, case), batch.ids.shape[1]

    def forward(b: int) -> list[Tensor]:
        """What the model says of the tokens 1.. of one sequence."""
        out = model(input_ids=batch.ids[b : b + 1, : LENGTHS[b]]).logits[0, :-1]
        if "critic" in case:
            return [out[:, 0]]
        logp = torch.log_softmax(out / TEMPERATURE, -1)
        logprobs = logp.gather(-1, batch.ids[b, 1 : LENGTHS[b], None])[:, 0]
        return [logprobs, -(logp.exp() * logp).sum(-1)]

    def collect(rows: list[int], backward: bool) -> None:
        found = torch.zeros(1 if "critic" in case else 2, *batch.mask.shape)
        for b in rows:
            outputs, chosen = forward(b), batch.mask[b, 1 : LENGTHS[b]]
            index = b * width + 1 + chosen.nonzero()[:, 0]
            outputs = [x[chosen] for x in outputs]
            found.view(len(found), -1)[:, index] = torch.stack(outputs).detach()
            if backward:
                (loss(outputs, index).sum() / batch.mask[rows].sum()).backward()
        result.outputs.extend(found)

    with torch.no_grad():
        collect(UPDATES[0], backward=False)
    for rows, lr in zip(UPDATES, LRS):
        collect(rows, backward=True)
        result.gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        result.norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    return result._replace(weights={name: p.detach() for name, p in model.named_parameters()})


# ------------------------------------------------------------------------------- all the other ways


class Way(NamedTuple):
    name: str
    world: int
    sp: int = 1
    replicas: int = 1
    checkpointing: bool = False
    offload: bool = False
    attention: str = "varlen"
    pieces: bool = False


WAYS = [
    Way("varlen", 1),
    Way("checkpointing", 1, checkpointing=True),
    Way("pieces", 1, pieces=True),
    Way("sdpa", 1, attention="sdpa"),
    Way("eager", 1, attention="eager"),
    Way("fsdp-2", 2),
    Way("sp-2-of-2", 2, sp=2),
    Way("offload-2", 2, offload=True),
    Way("sp-4-of-4", 4, sp=4),
    Way("hsdp-2x2", 4, replicas=2),
    Way("everything", 4, sp=2, replicas=2, checkpointing=True, offload=True),
]


def run(root: Path, way: Way, case: str, accelerator, ranks: dist.Ranks) -> Result:
    """The functions of kernels.py and infra/ in the order of ppo.train: a forward of the whole
    batch without gradient, the updates, and the new weights for the engine."""
    kernels.setup(
        case.split("-")[0], liger=False, progress=False, bf16=False, attention=way.attention
    )
    how = {"attention": way.attention, "checkpointing": way.checkpointing, "offload": way.offload}
    if "critic" in case:
        model = models.load_critic(str(root / case), accelerator, **how)
    else:
        model = models.load_policy(str(root / case), kernels.LogprobHead, accelerator, **how)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM, fused=True)  # as in ppo.py
    batch, result = make_batch(), Result([], [], [], {}, {})
    loss, args = make_loss(batch, case), ppo.Args(max_tokens_per_microbatch=BUDGET // ranks.sp)
    of_run = SimpleNamespace(ranks=ranks, progress=list)

    def forward(p: kernels.Packed) -> list[Tensor]:
        if "critic" in case:
            return [kernels.critic_forward(model, p, ranks.sp_group)]
        return list(kernels.policy_forward(model, p, TEMPERATURE, ranks.sp_group))

    def collect(rows: list[int], backward: bool) -> None:
        parts = []
        for p in ppo.microbatches(batch, rows, args, of_run):
            outputs = forward(p)
            if backward:
                (loss(outputs, p.index).sum() * (ranks.world / batch.mask[rows].sum())).backward()
            parts.append([(p.index, x) for x in outputs])
        result.outputs.extend(kernels.unpack(list(part), batch.mask, ranks) for part in zip(*parts))

    with torch.no_grad():
        collect(UPDATES[0], backward=False)
    for rows, lr in zip(UPDATES, LRS):
        collect(rows, backward=True)
        gradients = {name: gathered(p.grad) for name, p in model.named_parameters()}
        result.gradients.append(gradients)
        norm = models.optimizer_step(models.Trained(model, optimizer), lr=lr, max_norm=MAX_NORM)
        result.norms.append(norm.item())
    p, row = next(model.parameters()), ppo.microbatches(batch, UPDATES[0], args, of_run)[0]
    result.made["mesh"] = tuple(p.device_mesh.shape) if isinstance(p, DTensor) else ()
    result.made["slices"] = row.cu_seqlens[-1].item() // row.ids.numel()
    result.made["checkpointing"] = model.is_gradient_checkpointing
    result.made["attention"] = model.config._attn_implementation
    result.made["offload"] = offloads(model)
    weights = {name: p.clone() for name, p in models.full_weights(model, torch.float32)}
    return result._replace(weights=weights)


def gathered(gradient: Tensor) -> Tensor:
    """A whole one, that stays."""
    if isinstance(gradient, DTensor):
        return gradient.full_tensor()
    return gradient.clone()


def offloads(model) -> set[bool]:
    """Whether the units of a model live on the CPU."""
    found = set()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            group = module._get_fsdp_state()._fsdp_param_group
            if group:
                found.add(isinstance(group.offload_policy, CPUOffloadPolicy))
    return found or {False}


def logprobs_in_pieces(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float):
    """Five rows forward, about three columns backward; in other ways one piece holds everything."""
    size = 5 * SIZES["vocab_size"]
    return kernels._ChunkedLogprob.apply(hidden, weight, targets, temperature, size)


def run_ways(root: Path, world: int) -> dict[tuple[str, str], Result]:
    """This rank's results of all ways that need `world` ranks."""
    from accelerate.state import AcceleratorState

    results = {}
    for way in (way for way in WAYS if way.world == world):
        AcceleratorState._reset_state(reset_partial_state=True)
        # once for all cases: a critic may be of another architecture than the policy
        accelerator, ranks = dist.start_ranks(False, way.sp, way.replicas)
        whole = kernels.token_logprobs
        if way.pieces:
            kernels.token_logprobs = logprobs_in_pieces
        for case in CASES_OF_4 if world == 4 else CASES:
            results[way.name, case] = run(root, way, case, accelerator, ranks)
        kernels.token_logprobs = whole
    return results


# -------------------------------------------------------------------------------------------- Liger


class Patched(NamedTuple):
    said: str  # by kernels.apply_liger
    classes: list[str]  # of the model's modules
    logits: list[Tensor]  # unpatched, patched
    gradients: list[dict[str, Tensor]]


def run_liger(root: Path, case: str) -> Patched:
    """Two short sequences, one at a time through the plain model, then packed in one row through
    the patched one."""
    lengths, vocabulary = [5, 9], SIZES["vocab_size"]
    ids = torch.randint(vocabulary, (2, 9), generator=torch.Generator().manual_seed(3))
    p = kernels.pack(ids, torch.ones_like(ids, dtype=torch.bool), lengths, [0, 1])
    weights = torch.randn(p.ids.shape[1], vocabulary, generator=torch.Generator().manual_seed(4))

    def finish(model, logits: Tensor) -> None:
        (logits * weights).sum().backward()
        result.logits.append(logits.detach())
        result.gradients.append({name: x.grad for name, x in model.named_parameters()})

    result = Patched("", [], [], [])
    model = AutoModelForCausalLM.from_pretrained(
        root / case, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    alone = [model(input_ids=row[None, : n - 1]).logits[0] for row, n in zip(ids, lengths)]
    finish(model, torch.cat(alone))
    result.classes.extend(type(module).__name__ for module in model.modules())
    assert not any("Liger" in name for name in result.classes)
    result.classes.clear()

    said = kernels.setup(case.split("-")[0], liger=True, progress=False, bf16=False)["Liger"]
    accelerator, _ = dist.start_ranks(False, 1)
    model = models.load_policy(str(root / case), kernels.LogprobHead, accelerator)
    finish(model, kernels.packed_forward(model, p, None))
    result.classes.extend(type(module).__name__ for module in model.modules())
    return result._replace(said=said)


def complete_the_interpreter() -> None:
    """Triton's interpreter leaves float arguments of a kernel as Python's, without the methods that
    Liger calls on them, and knows no libdevice.rsqrt."""
    import liger_kernel.ops.rms_norm
    import numpy as np
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    convert = interpreter._implicit_cvt

    def with_floats(x):
        if not isinstance(x, float):
            return convert(x)
        handle = interpreter.TensorHandle(np.array([x], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    interpreter._implicit_cvt = with_floats
    liger_kernel.ops.rms_norm.rsqrt = lambda x: tl.math.rsqrt(x)


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    if "RANK" in os.environ:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        found = {key: tuple(x) for key, x in run_ways(root, world).items()}
        torch.save(found, root / f"{world}-{rank}.pt")
        torch.distributed.destroy_process_group()
    else:
        complete_the_interpreter()
        patched = {case: tuple(run_liger(root, case)) for case in ARCHITECTURES}
        torch.save(patched, root / "liger.pt")
