"""Will a run fit in memory? On GPUS cards of GB each, of which none is needed:

    python tools/plan.py GPUS GB [flags of ppo.py]      the same as python ppo.py --plan GPUS GB ...

Owns: the arithmetic of memory (sizes of models, what is alive at which moment, what to change when
it does not fit), from configurations and flags alone.
Refuses to know: how any of it is done. When the trainer or an engine keeps another tensor, its bytes
change here.
Left out on purpose: seconds; and models that are not made of Llama's parts.
"""

import os
import sys
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

GB = 2**30


@dataclass
class Shape:
    """Sizes of a model, in elements."""

    params: int  # all parameters, a tied head once
    layer: int  # parameters of one layer
    layers: int
    hidden: int
    q: int  # all query heads of a token
    kv: int  # all key heads of a token
    mlp: int
    vocab: int
    head: int  # one head of attention


@dataclass
class Job:
    """What the memory of a run depends on."""

    policy: Shape
    critic: Shape | None
    reference: Shape | None
    ranks: int
    card_gb: float  # of each rank
    bf16: bool  # on CUDA; else in fp32 on CPU: ppo.py knows no other pair
    sharded: bool  # by FSDP2
    engine: str
    gpu_memory: float
    tp: int
    max_seqs: int  # at once in an engine
    gradient_checkpointing: bool
    max_tokens_per_microbatch: int
    prompts_per_step: int
    sequences: int  # of a step, all ranks
    longest: int  # tokens of a prompt and its response
    replicas: int = 1
    offload: Sequence[str] = ()

    @property
    def trained(self) -> dict[str, Shape]:
        if self.critic:
            return {"policy": self.policy, "critic": self.critic}
        return {"policy": self.policy}

    @property
    def bytes_per_number(self) -> int:
        """In compute; weights are kept in fp32."""
        return 2 if self.bf16 else 4

    @property
    def microbatch_tokens(self) -> int:
        """Of a rank that has sequences of full length only."""
        return min(self.max_tokens_per_microbatch, -(-self.sequences // self.ranks) * self.longest)

    @property
    def sequences_of_engine(self) -> int:
        """That want to run at once in one engine."""
        return min(self.max_seqs, -(-self.sequences // (self.ranks // self.tp)))

    def share_on_card(self, model: str) -> float:
        """What part of a model, of its gradients and of its optimizer's states a card holds."""
        if model in self.offload and self.bf16:
            return 0.0
        if self.sharded:
            return 1 / (self.ranks // self.replicas)
        return 1.0


@dataclass
class Moment:
    """One that can be the fullest on a rank."""

    name: str
    part: str  # of a step: sampling, updating or saving
    items: dict[str, float]  # bytes of what is alive

    @property
    def total(self) -> float:
        return sum(self.items.values())


@dataclass
class Plan:
    items: dict[str, float]  # GB (2**30 bytes) of a rank, by name
    totals: dict[str, float]  # GB at the fullest moment of sampling, updating and, on CPU, saving
    text: str  # a table with a verdict, for people


def model_shape(config, critic: bool) -> Shape | None:
    """Counted on the model itself, which is made without memory. None: not made of Llama's parts."""
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    made = AutoModelForTokenClassification if critic else AutoModelForCausalLM
    config = type(config).from_dict(config.to_dict() | {"num_labels": 1})
    with torch.device("meta"):
        model = made.from_config(config)
    layer = {}
    for name, parameter in model.named_parameters():
        if ".layers.0." in name:
            layer[name.split(".layers.0.")[1]] = parameter
    if not {"self_attn.q_proj.weight", "mlp.gate_proj.weight"} <= layer.keys():
        return None
    q = len(layer["self_attn.q_proj.weight"])
    return Shape(
        params=sum(parameter.numel() for parameter in model.parameters()),
        layer=sum(parameter.numel() for parameter in layer.values()),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        q=q,
        kv=len(layer["self_attn.k_proj.weight"]),
        mlp=len(layer["mlp.gate_proj.weight"]),
        vocab=config.vocab_size,
        head=q // config.num_attention_heads,
    )


# ------------------------------------------------------------------------------------- the engine


@dataclass
class EngineMemory:
    """Bytes on a rank while it samples."""

    weights: float
    work: float
    cache: float


def key_value_bytes(job: Job) -> float:
    """Of a token in the KV cache of a rank."""
    width = max(job.policy.kv // job.tp, job.policy.head)
    return 2 * job.bytes_per_number * job.policy.layers * width


def torch_sampler_memory(job: Job) -> EngineMemory:
    batch = job.sequences_of_engine
    weights = job.bytes_per_number * job.policy.params / job.tp
    # a sequence has logits, log-softmax and exp in fp32, exp and its cumsum in fp64
    work = 28 * batch * job.policy.vocab
    return EngineMemory(weights, work, batch * job.longest * key_value_bytes(job))


def vllm_memory(job: Job) -> EngineMemory:
    """vLLM tries a full batch of prompts and max_seqs log-probs; the KV cache gets what these leave
    of its share of a card."""
    weights = job.bytes_per_number * job.policy.params / job.tp
    if not job.bf16:
        return EngineMemory(weights, 0, 256 << 20)  # kv_cache_mb of VLLMSampler
    tokens = 16384 if job.card_gb >= 70 else 8192
    width = job.policy.mlp // job.tp + job.policy.hidden
    prompts = tokens * 3 * job.bytes_per_number * width
    logprobs = 4 * 4 * job.max_seqs * job.policy.vocab
    work = max(prompts, logprobs)
    left = job.gpu_memory * job.card_gb * GB - (weights + work)
    return EngineMemory(weights, work, max(0.0, left))


def engine_memory(job: Job) -> EngineMemory:
    if job.engine == "torch":
        return torch_sampler_memory(job)
    return vllm_memory(job)


def cached_tokens(job: Job) -> float:
    """For which the KV cache of an engine has room."""
    return engine_memory(job).cache / key_value_bytes(job)


# ------------------------------------------------------------------------------------ the trainer


def trainer_memory(job: Job) -> dict[str, float]:
    """Bytes that the trainer holds on a rank at every moment.

    (B, T): ids 8 bytes, mask and last 1 each, 4 each for engine's and old log-probs, values,
    rewards, advantages, returns, two weights of the loss, 1 for the minibatch; with a reference its
    log-probs and the penalty. Overhead is assumed, not measured: CUDA context 0.5 GB, NCCL 0.5,
    workspaces and the engine's CUDA graphs 1."""
    items = {}
    if job.bf16:
        items["overhead"] = 2 << 30
    bytes_of_token = 51 if job.reference else 43
    items["(B, T) tensors"] = job.sequences * job.longest * bytes_of_token
    for name, shape in job.trained.items():  # fp32: 4 bytes, and AdamW has two states
        parameters = shape.params * job.share_on_card(name)
        items[f"{name} weights"] = 4 * parameters
        items[f"{name} Adam states"] = 8 * parameters
    if job.reference:
        items["reference weights"] = 4 * job.reference.params * job.share_on_card("reference")
    return items


def embedding_bytes(job: Job) -> int:
    """The policy's embedding (or its head) in compute."""
    return job.bytes_per_number * job.policy.vocab * job.policy.hidden


def gathered_head(job: Job) -> dict[str, float]:
    """FSDP2 keeps it gathered from a forward to its backward, or until `reshard`."""
    if job.sharded:
        return {"policy gathered head": embedding_bytes(job)}
    return {}


def logits_bytes(job: Job) -> int:
    """One piece of the fp32 logits of a micro-batch: LogprobHead never has all of them."""
    piece = 128 << 20 if job.bf16 else 16 << 20
    return min(piece, 4 * job.microbatch_tokens * job.policy.vocab)


def logprob_memory(job: Job) -> float:
    """Bytes of log-probs with their backward."""
    tokens = job.microbatch_tokens
    piece = logits_bytes(job)
    pieces = 2  # when one piece is all
    if piece < 4 * tokens * job.policy.vocab:
        pieces = 3  # forward and backward
    # the gradient of the hidden states is summed in fp32
    hidden = (job.bytes_per_number + 4) * tokens * job.policy.hidden
    return pieces * piece + hidden + embedding_bytes(job)


@dataclass
class Activations:
    """Elements a token that a model keeps for its backward."""

    layer: int  # in a layer, when it is not checkpointed
    stream: int  # between layers: all that checkpointing keeps
    ends: int  # the last norm and the rows for the head
    work: int  # gradients on top, at worst two in the MLP


def activations(shape: Shape, job: Job) -> Activations:
    """On CPU the two norms of a layer keep input, normalised input and output, attention q, k, v,
    output and the input of o_proj, the MLP gate, silu(gate), up and their product."""
    if not job.bf16:
        return Activations(
            layer=6 * shape.hidden + 3 * shape.q + 2 * shape.kv + 4 * shape.mlp,
            stream=shape.hidden,
            ends=4 * shape.hidden,
            work=2 * shape.mlp + 2 * shape.hidden,
        )
    # Liger: no normalised input, no silu(gate), in place. torch's varlen: k and v repeated, one output
    on_card = Activations(
        layer=4 * shape.hidden + 4 * shape.q + 3 * shape.mlp,
        stream=shape.hidden,
        ends=3 * shape.hidden,
        work=shape.mlp + 2 * shape.hidden,
    )
    if job.sharded:
        return on_card
    # autocast instead of FSDP: fp32 between layers, a bf16 copy for every linear
    return replace(on_card, layer=on_card.layer + 5 * shape.hidden, stream=2 * shape.hidden)


def update_moments(name: str, shape: Shape, job: Job, always: dict[str, float]) -> list[Moment]:
    """Of the backward of one model: in its head, if it is the policy, and in a layer."""
    size = activations(shape, job)
    kept = size.layer  # of a layer, from its forward to its backward
    again = 0  # of one layer at a time, computed once more
    if job.gradient_checkpointing:
        kept = size.stream
        again = size.layer - size.stream
    token_bytes = job.bytes_per_number * job.microbatch_tokens
    passes = dict(always)
    passes[f"{name} gradients"] = 4 * shape.params * job.share_on_card(name)
    passes[f"{name} activations"] = token_bytes * (shape.layers * kept + size.ends)
    in_layer = dict(passes)
    in_layer[f"{name} layer in backward"] = token_bytes * (size.work + again)
    if job.sharded:  # this layer, the next, its buffer, a gradient; two fp32 gradients on their way
        in_layer[f"{name} gathered layers"] = (4 * job.bytes_per_number + 8) * shape.layer
    elif job.bf16:  # autocast's copies
        in_layer[f"{name} gathered layers"] = 2 * shape.params
    moments = []
    if name == "policy":
        logprobs = {"log-probs, head gradient": logprob_memory(job)}
        in_head = passes | gathered_head(job) | logprobs
        moments.append(Moment("policy head", "updating", in_head))
        in_layer |= gathered_head(job)
        if job.sharded:
            in_layer["head gradient on its way"] = embedding_bytes(job)
    moments.append(Moment(f"{name} layers", "updating", in_layer))
    return moments


# --------------------------------------------------------------------------------------- the plan


def memory_moments(job: Job) -> list[Moment]:
    """Every moment that can be the fullest on a rank."""
    always = trainer_memory(job)
    engine = engine_memory(job)
    sampling = dict(always)
    sampling["engine weights"] = engine.weights
    sampling["engine in work"] = engine.work
    sampling["KV cache"] = engine.cache
    sampling |= gathered_head(job)
    # the canary: of four answers, cut at 64 tokens
    sync = 3 * min(logits_bytes(job), 4 * 4 * 64 * job.policy.vocab)
    if job.sharded:  # a tensor on its way to the engine (fp32: to a checkpoint), whole and in parts
        sync += 8 * job.policy.vocab * job.policy.hidden
    sampling["sync, canary, save"] = sync
    moments = [Moment("sampling", "sampling", sampling)]
    if not job.bf16:  # on CPU engines do not sleep; the cache of TorchSampler ends with its answers
        always["engine weights"] = engine.weights
        if job.engine != "torch":
            always["KV cache"] = engine.cache
    for name, shape in job.trained.items():
        moments += update_moments(name, shape, job, always)
    if not job.bf16:  # what the background writes is copied first; a card's copy is not on the card
        saving = dict(always)
        for name, shape in job.trained.items():
            saving[f"{name} checkpoint"] = 12 * shape.params / job.ranks
        moments.append(Moment("saving", "saving", saving))
    return moments


def part_totals(job: Job) -> dict[str, float]:
    """GB of a rank at the fullest moment of each part of a step."""
    totals = {}
    for moment in memory_moments(job):
        totals[moment.part] = max(moment.total / GB, totals.get(moment.part, 0.0))
    return totals


def memory_plan(policy, critic, reference, **flags) -> Plan:
    """From Hugging Face configurations alone (critic and reference may be None), and the other
    fields of Job."""
    shapes = {}
    for name, config in {"policy": policy, "critic": critic, "reference": reference}.items():
        shapes[name] = None
        if config:
            shapes[name] = model_shape(config, critic=name == "critic")
            if not shapes[name]:
                text = "it knows dense models that are made as Llama is"
                return Plan({}, {}, f"no memory plan for {policy.model_type}: {text}")
    job = Job(**shapes, **flags)
    items = {}
    for moment in memory_moments(job):
        for name, size in moment.items.items():
            if size:
                items[name] = size / GB
    text = "\n".join([table(job, list(items)), *verdict(job)])
    return Plan(items, part_totals(job), text)


def table(job: Job, names: list[str]) -> str:
    """A column for each moment, a row for each item."""
    moments = memory_moments(job)
    lines = [f"memory plan, GB on each of {job.ranks} ranks:"]
    lines.append(" " * 27 + "".join(f"{moment.name:>15}" for moment in moments))
    for name in names:
        lines.append(table_row(name, [moment.items.get(name, 0) for moment in moments]))
    lines.append(table_row("total", [moment.total for moment in moments]))
    return "\n".join(lines)


def table_row(name: str, sizes: list[float]) -> str:
    row = f"  {name:25}"
    for size in sizes:
        row += f"{size / GB:15.2f}" if size else " " * 15
    return row


def verdict(job: Job) -> list[str]:
    """Lines below the table: does it fit, and if not, what would help?"""
    tokens = cached_tokens(job)
    totals = part_totals(job)
    fullest = ", ".join(f"while {part} {gb:.1f} GB" for part, gb in totals.items())
    if job.bf16:
        copy = 12 * sum(shape.params for shape in job.trained.values()) / job.ranks / GB
        fullest += f"; a checkpoint on its way to the disk: {copy:.1f} GB of the machine's memory"
    lines = [
        f"KV cache: {tokens:,.0f} tokens, {tokens / job.longest:.1f} sequences of {job.longest}; "
        f"{job.sequences_of_engine} want to run",
        fullest,
    ]
    wrong = []
    for part, gb in totals.items():
        if gb > job.card_gb:
            wrong.append(f"{gb:.1f} GB while {part}: {advice(job, part)}")
    if tokens < job.longest:
        wrong.append(
            "the KV cache holds no sequence of full length: "
            "a larger --gpu_memory or --tp, or shorter answers"
        )
    if wrong:
        return [*lines, f"does not fit in {job.card_gb:g} GB", *wrong]
    spare = job.card_gb - max(totals.values())
    return [*lines, f"fits in {job.card_gb:g} GB, {spare:.1f} GB to spare"]


# ---------------------------------------------------------------------------------------- remedies
# Each brings the total of one part of a step down to the card on its own, in its mildest form, and
# says so as a flag; or says nothing: it cannot.


def advice(job: Job, part: str) -> str:
    found = [remedy(job, part) for remedy in REMEDIES]
    return " or ".join(filter(None, found)) or "no flag is enough alone"


def fits(job: Job, part: str) -> bool:
    return part_totals(job)[part] <= job.card_gb


def lower_gpu_memory(job: Job, part: str) -> str:
    if job.bf16:
        for percent in range(round(100 * job.gpu_memory), 0, -1):
            changed = replace(job, gpu_memory=percent / 100)
            if cached_tokens(changed) >= job.longest and fits(changed, part):
                return f"--gpu_memory at most {changed.gpu_memory}"
    return ""


def checkpoint_layers(job: Job, part: str) -> str:
    if fits(replace(job, gradient_checkpointing=True), part):
        return "--gradient_checkpointing"
    return ""


def smaller_microbatches(job: Job, part: str) -> str:
    def enough(budget: int) -> bool:
        return fits(replace(job, max_tokens_per_microbatch=budget), part)

    budgets = range(job.max_tokens_per_microbatch, job.longest - 1, -1)
    at = bisect_left(budgets, True, key=enough)
    if at < len(budgets):
        return f"--max_tokens_per_microbatch at most {budgets[at]}"
    return ""


def offload_models(job: Job, part: str) -> str:
    if job.bf16:
        for models in (["critic"], ["critic", "policy"], ["critic", "policy", "reference"]):
            if fits(replace(job, offload=models, sharded=True), part):
                return f"--offload {' '.join(models)}"
    return ""


def more_gpus(job: Job, part: str) -> str:
    """A number that shares engines and prompts evenly."""
    for ranks in range(job.ranks + 1, 513):
        if ranks % job.tp == 0 and job.prompts_per_step % ranks == 0:
            if fits(replace(job, ranks=ranks, sharded=True), part):
                return f"at least {ranks} GPUs"
    return ""


def drop_reference(job: Job, part: str) -> str:
    if fits(replace(job, reference=None), part):
        return "--kl_coef 0"
    return ""


def smaller_critic(job: Job, part: str) -> str:
    """In steps of a twentieth; only its number of parameters changes, not what its layers keep."""
    if job.critic:
        for twentieths in range(19, 0, -1):
            params = job.critic.params * twentieths // 20
            if fits(replace(job, critic=replace(job.critic, params=params)), part):
                return f"a --critic_model of at most {params:,} parameters"
    return ""


REMEDIES = (
    lower_gpu_memory,
    checkpoint_layers,
    smaller_microbatches,
    offload_models,
    more_gpus,
    drop_reference,
    smaller_critic,
)


# ------------------------------------------------------------------------------------- of a run


def plan_of_run(policy, critic, args, ranks: int, card_gb: float | None, cuda: bool) -> str:
    """memory_plan in words, of a run with ppo.py's Args. policy, critic: their configurations.
    card_gb: of each card; None: of this machine."""
    if not card_gb and torch.cuda.is_available():
        card_gb = torch.cuda.get_device_properties(0).total_memory / GB
    if not card_gb:
        card_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB / ranks
    plan = memory_plan(
        policy,
        critic if args.has_critic else None,
        policy if args.kl_coef else None,
        ranks=ranks,
        card_gb=card_gb,
        bf16=cuda,
        sharded=cuda or "RANK" in os.environ,
        engine=args.engine,
        gpu_memory=args.gpu_memory,
        tp=args.tp,
        max_seqs=256,
        gradient_checkpointing=args.gradient_checkpointing,
        max_tokens_per_microbatch=args.max_tokens_per_microbatch,
        prompts_per_step=args.prompts_per_step,
        sequences=args.batch_size,
        longest=args.max_prompt_tokens + args.max_new_tokens,
        replicas=args.replicas,
        offload=args.offload,
    )
    return plan.text


def main(words: list[str]) -> None:
    """A command line of ppo.py that has `--plan GPUS GB` anywhere in it."""
    at = words.index("--plan")
    try:
        ranks = int(words[at + 1])
        card_gb = float(words[at + 2])
    except (IndexError, ValueError):
        asked = " ".join(words[at : at + 3])
        sys.exit(f"{asked}: give GPUs and GB of each, as in --plan 4 80")
    import ppo  # for its flags and their checks; only this function needs them

    args = ppo.parse_args(words[:at] + words[at + 3 :])
    configs = ppo.check(args, ranks, only_plan=True)
    print(plan_of_run(*configs, args, ranks, card_gb, cuda=True))


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    main(["--plan", *sys.argv[1:]])
