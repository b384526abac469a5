"""Will a run fit in memory? On GPUS cards of GB each, of which none is needed:

    python tools/plan.py GPUS GB [flags of ppo.py]      the same as python ppo.py --plan GPUS GB ...

Owns: the arithmetic of memory (sizes of models, what is alive at which moment, what to change when
it does not fit), from configurations and flags alone.
Refuses to know: how any of it is done. When the trainer or an engine keeps another tensor, its bytes
change here.
Left out on purpose: seconds; and models that are not made of Llama's parts.
"""

import os
import re
import sys
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

GB = 2**30
Sizes = dict[str, float]  # by what it is of


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
    critic: Shape | None = None
    reference: Shape | None = None
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
    items: Sizes  # bytes of what is alive

    @property
    def total(self) -> float:
        return sum(self.items.values())


@dataclass
class Plan:
    items: Sizes  # GB (2**30 bytes) of a rank, by name
    totals: Sizes  # GB at the fullest moment of sampling, updating and, on CPU, saving
    text: str  # a table with a verdict, for people


def model_shape(config, critic: bool) -> Shape | None:
    """Counted on the model itself, which is made without memory. None: not made of Llama's parts."""
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    made = AutoModelForTokenClassification if critic else AutoModelForCausalLM
    said = config.to_dict()
    for labels in ("id2label", "label2id"):  # as many as before
        said.pop(labels, None)
    config = type(config).from_dict(said | {"num_labels": 1})
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
        params=model.num_parameters(),
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


def key_value_bytes(job: Job) -> float:
    """Of a token in the KV cache of a rank."""
    width = max(job.policy.kv // job.tp, job.policy.head)
    return 2 * job.bytes_per_number * job.policy.layers * width


def engine_memory(job: Job) -> Sizes:
    """Bytes on a rank while it samples. vLLM on a card tries a full batch of prompts and max_seqs
    log-probs; the KV cache gets what these leave of its share of a card."""
    weights = job.bytes_per_number * job.policy.params / job.tp
    if job.engine == "torch":
        batch = job.sequences_of_engine
        # a sequence has logits, log-softmax and exp in fp32, exp and its cumsum in fp64
        work = 28 * batch * job.policy.vocab
        cache = batch * job.longest * key_value_bytes(job)
    elif job.bf16:
        tokens = 16384 if job.card_gb >= 70 else 8192
        width = job.policy.mlp // job.tp + job.policy.hidden
        prompts = tokens * 3 * job.bytes_per_number * width
        logprobs = 4 * 4 * job.max_seqs * job.policy.vocab
        work = max(prompts, logprobs)
        cache = max(0.0, job.gpu_memory * job.card_gb * GB - (weights + work))
    else:
        work = 0
        cache = 256 << 20  # kv_cache_mb of VLLMSampler
    return {"engine weights": weights, "engine in work": work, "KV cache": cache}


def cached_tokens(job: Job) -> float:
    """For which the KV cache of an engine has room."""
    return engine_memory(job)["KV cache"] / key_value_bytes(job)


# ------------------------------------------------------------------------------------ the trainer


def trainer_memory(job: Job) -> Sizes:
    """Bytes that the trainer holds on a rank at every moment.

    (B, T): ids 8 bytes, mask and last 1 each, 4 each for engine's and old log-probs, values,
    rewards, advantages, returns, two weights of the loss, 1 for the minibatch; with a reference its
    log-probs and the penalty. Overhead is assumed, not measured: CUDA context 0.5 GB, NCCL 0.5,
    workspaces and the engine's CUDA graphs 1."""
    items = {
        "overhead": 2 << 30 if job.bf16 else 0,
        "(B, T) tensors": job.sequences * job.longest * (51 if job.reference else 43),
    }
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


def gathered_head(job: Job) -> int:
    """FSDP2 keeps it gathered from a forward to its backward, or until `reshard`."""
    if job.sharded:
        return embedding_bytes(job)
    return 0


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
    hidden = shape.hidden
    if not job.bf16:
        return Activations(
            layer=6 * hidden + 3 * shape.q + 2 * shape.kv + 4 * shape.mlp,
            stream=hidden,
            ends=4 * hidden,
            work=2 * shape.mlp + 2 * hidden,
        )
    # Liger: no normalised input, no silu(gate), in place. torch's varlen: k and v repeated, one output
    on_card = Activations(
        layer=4 * hidden + 4 * shape.q + 3 * shape.mlp,
        stream=hidden,
        ends=3 * hidden,
        work=shape.mlp + 2 * hidden,
    )
    if not job.sharded:
        # autocast instead of FSDP: fp32 between layers, a bf16 copy for every linear
        on_card.layer += 5 * hidden
        on_card.stream += hidden
    return on_card


def update_moments(name: str, shape: Shape, job: Job, always: Sizes) -> Iterator[Moment]:
    """Of the backward of one model: in its head, if it is the policy, and in a layer."""
    size = activations(shape, job)
    # of a layer, from its forward to its backward; the rest is computed once more, for one at a time
    kept = size.stream if job.gradient_checkpointing else size.layer
    token_bytes = job.bytes_per_number * job.microbatch_tokens
    passes = always | {
        f"{name} gradients": 4 * shape.params * job.share_on_card(name),
        f"{name} activations": token_bytes * (shape.layers * kept + size.ends),
    }
    in_layer = passes | {f"{name} layer in backward": token_bytes * (size.work + size.layer - kept)}
    if job.sharded:  # this layer, the next, its buffer, a gradient; two fp32 gradients on their way
        in_layer[f"{name} gathered layers"] = (4 * job.bytes_per_number + 8) * shape.layer
    elif job.bf16:  # autocast's copies
        in_layer[f"{name} gathered layers"] = 2 * shape.params
    if name == "policy":
        head = {"policy gathered head": gathered_head(job)}
        in_head = passes | head | {"log-probs, head gradient": logprob_memory(job)}
        yield Moment("policy head", "updating", in_head)
        in_layer |= head | {"head gradient on its way": gathered_head(job)}
    yield Moment(f"{name} layers", "updating", in_layer)


# --------------------------------------------------------------------------------------- the plan


def memory_moments(job: Job) -> list[Moment]:
    """Every moment that can be the fullest on a rank."""
    always = trainer_memory(job)
    engine = engine_memory(job)
    # the canary: of four answers, cut at 64 tokens
    sync = 3 * min(logits_bytes(job), 4 * 4 * 64 * job.policy.vocab)
    if job.sharded:  # a tensor on its way to the engine (fp32: to a checkpoint), whole and in parts
        sync += 8 * job.policy.vocab * job.policy.hidden
    sampling = always | engine
    sampling |= {"policy gathered head": gathered_head(job), "sync, canary, save": sync}
    moments = [Moment("sampling", "sampling", sampling)]
    if not job.bf16:  # on CPU engines do not sleep; the cache of TorchSampler ends with its answers
        always |= engine
        del always["engine in work"]
        if job.engine == "torch":
            del always["KV cache"]
    for name, shape in job.trained.items():
        moments += update_moments(name, shape, job, always)
    if not job.bf16:  # what the background writes is copied first; a card's copy is not on the card
        for name, shape in job.trained.items():
            always[f"{name} checkpoint"] = 12 * shape.params / job.ranks
        moments.append(Moment("saving", "saving", always))
    return moments


def part_totals(job: Job) -> Sizes:
    """GB of a rank at the fullest moment of each part of a step."""
    totals = {}
    for moment in memory_moments(job):
        totals[moment.part] = max(moment.total / GB, totals.get(moment.part, 0.0))
    return totals


class NoPlan(Exception):
    """For models that are not made of Llama's parts."""


def make_job(policy, critic, reference, **flags) -> Job:
    """From Hugging Face configurations alone (critic and reference may be None), and the other
    fields of Job."""
    shapes = {}
    for name, config in {"policy": policy, "critic": critic, "reference": reference}.items():
        if config:
            shapes[name] = model_shape(config, critic=name == "critic")
            if not shapes[name]:
                raise NoPlan(
                    f"no plan for this architecture, {config.model_type}: "
                    "only for dense models that are made as Llama is"
                )
    return Job(**shapes, **flags)


def memory_plan(*configs, **flags) -> Plan:
    """Of a job, given as to make_job."""
    try:
        job = make_job(*configs, **flags)
    except NoPlan as error:
        return Plan({}, {}, str(error))
    moments = memory_moments(job)
    items = {}
    for moment in moments:
        items |= {name: size / GB for name, size in moment.items.items() if size}
    text = "\n".join([*table(job.ranks, moments, items), *verdict(job)])
    return Plan(items, part_totals(job), text)


def table(ranks: int, moments: list[Moment], items: Sizes) -> list[str]:
    """A column for each moment, a row for each item."""
    header = " " * 27 + "".join(f"{moment.name:>15}" for moment in moments)
    lines = [f"memory plan, GB on each of {ranks} ranks:", header]
    columns = [moment.items | {"total": moment.total} for moment in moments]
    for name in [*items, "total"]:
        line = f"  {name:25}"
        for column in columns:
            size = column.get(name)
            line += f"{size / GB:15.2f}" if size else " " * 15
        lines.append(line)
    return lines


CACHE_TOO_SMALL = (
    "the KV cache holds no sequence of full length: "
    "a larger --gpu_memory or --tp, or shorter answers"
)


def verdict(job: Job) -> list[str]:
    """Lines below the table: does it fit, and if not, what would help?"""
    tokens = cached_tokens(job)
    totals = part_totals(job)
    fullest = ", ".join(f"while {part} {gb:.1f} GB" for part, gb in totals.items())
    if job.bf16:
        fullest += f"; for each GPU {machine_need(job):.1f} GB of its machine's memory"
    wrong = []
    for part, gb in totals.items():
        if gb > job.card_gb:
            ways = " or ".join(advice(job, part)) or NOTHING_HELPS
            wrong.append(f"{gb:.1f} GB while {part}: {ways}")
    if tokens < job.longest:
        wrong.append(CACHE_TOO_SMALL)
    says = f"does not fit in {job.card_gb:g} GB"
    if not wrong:
        spare = job.card_gb - max(totals.values())
        says = f"fits in {job.card_gb:g} GB, {spare:.1f} GB to spare"
    return [
        f"KV cache: {tokens:,.0f} tokens, {tokens / job.longest:.1f} sequences of {job.longest}; "
        f"{job.sequences_of_engine} want to run",
        fullest,
        says,
        *wrong,
    ]


# ---------------------------------------------------------------------------------------- remedies


NOTHING_HELPS = "no flag is enough alone"


def advice(job: Job, part: str) -> list[str]:
    """Flags of which each brings the total of one part of a step down to the card on its own, in
    its mildest form; the mildest flag first."""
    found = []
    for start, field, values, flag in remedies(job):
        at = bisect_left(values, True, key=partial(fits, start, part, field))
        if at < len(values):
            value = values[at]
            if field == "offload":
                value = " ".join(value)
            found.append(flag.format(value))
    return found


def fits(job: Job, part: str, field: str, value) -> bool:
    """With this value in that field."""
    return part_totals(replace(job, **{field: value}))[part] <= job.card_gb


def remedies(job: Job):
    """(job, a field of it, what that could be instead, the flag that says so). The mildest value
    comes first, and each needs no more memory than the one before."""
    sharded = replace(job, sharded=True)
    shares = []  # of a card, with which a sequence of full length has room in the KV cache
    for percent in range(round(100 * job.gpu_memory), 0, -1):
        if cached_tokens(replace(job, gpu_memory=percent / 100)) >= job.longest:
            shares.append(percent / 100)
    yield job, "gpu_memory", shares, "--gpu_memory at most {}"
    yield job, "gradient_checkpointing", [True], "--gradient_checkpointing"
    budgets = range(job.max_tokens_per_microbatch, job.longest - 1, -1)
    yield job, "max_tokens_per_microbatch", budgets, "--max_tokens_per_microbatch at most {}"
    if job.bf16:
        models = [["critic"], ["critic", "policy"], ["critic", "policy", "reference"]]
        yield sharded, "offload", models, "--offload {}"
        more = range(job.ranks + job.tp, 513, job.tp)  # shared evenly by the ranks of an engine
        gpus = [ranks for ranks in more if job.prompts_per_step % ranks == 0]
        yield sharded, "ranks", gpus, "at least {} GPUs"
    yield job, "reference", [None], "--kl_coef 0"
    if job.critic:
        # in steps of a twentieth; only its number of parameters changes, not what its layers keep
        critics = []
        for twentieths in range(19, 0, -1):
            params = job.critic.params * twentieths // 20
            critics.append(replace(job.critic, params=params))
        yield job, "critic", critics, "a --critic_model of at most {.params:,} parameters"


# ------------------------------------------------------------------------ the machine's own memory

LIBRARIES = 1.0  # GB of a process before it has a model; assumed, not measured
# what a container or a batch system may limit: in /proc/self/cgroup, folder, file; versions 2 and 1
CGROUPS = {"": (".", "memory.max"), "memory": ("memory", "memory.limit_in_bytes")}


def machine_memory(proc=Path("/proc"), cgroups=Path("/sys/fs/cgroup")) -> float:
    """GB that all processes of this run may take together on this machine."""
    total = re.search(r"MemTotal: +(\d+) kB", Path(proc, "meminfo").read_text())
    sizes = [1024 * int(total[1])]
    for line in Path(proc, "self/cgroup").read_text().splitlines():
        _, kind, path = line.split(":", 2)
        if kind in CGROUPS:
            folder, name = CGROUPS[kind]
            inside = cgroups / folder / path.lstrip("/")
            for file in [inside / name, *(parent / name for parent in inside.parents)]:
                if file.exists() and file.read_text().strip().isdigit():  # else it is "max"
                    sizes.append(int(file.read_text()))
    return min(sizes) / GB


def machine_need(job: Job) -> float:
    """GB of its machine's memory that a rank needs at its fullest moment. On CPU that is all; beside
    a GPU the offloaded models with gradients and AdamW's states and the copy that a checkpoint is
    written from, or at the start a whole model that is loaded."""
    if not job.bf16:
        return LIBRARIES + max(part_totals(job).values())
    shapes = job.trained | ({"reference": job.reference} if job.reference else {})
    kept = 0
    for name, shape in shapes.items():
        if name in job.offload:
            share = 1 / (job.ranks // job.replicas)
            kept += (16 if name in job.trained else 4) * shape.params * share
    copy = sum(12 * shape.params / job.ranks for shape in job.trained.values())
    loaded = max(4 * shape.params for shape in shapes.values())
    return LIBRARIES + (kept + max(copy, loaded)) / GB


# -------------------------------------------------------------------------------------- of a run


def facts(policy, critic, args, ranks: int, card_gb: float | None, cuda: bool) -> dict:
    """What make_job wants to know of a run with ppo.py's Args. policy, critic: their
    configurations. card_gb: of each card; None: of this machine."""
    if not card_gb and cuda:
        card_gb = torch.cuda.get_device_properties(0).total_memory / GB
    if not card_gb:
        card_gb = machine_memory() / ranks_here(ranks) - LIBRARIES
    return {
        "policy": policy,
        "critic": critic if args.has_critic else None,
        "reference": policy if args.kl_coef else None,
        "ranks": ranks,
        "card_gb": card_gb,
        "bf16": cuda,
        "sharded": cuda or "RANK" in os.environ,
        "engine": args.engine,
        "gpu_memory": args.gpu_memory,
        "tp": args.tp,
        "max_seqs": 256,
        "gradient_checkpointing": args.gradient_checkpointing,
        "max_tokens_per_microbatch": args.max_tokens_per_microbatch,
        "prompts_per_step": args.prompts_per_step,
        "sequences": args.batch_size,
        "longest": args.max_prompt_tokens + args.max_new_tokens,
        "replicas": args.replicas,
        "offload": args.offload,
    }


def ranks_here(ranks: int) -> int:
    """Of the run's ranks, those on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", ranks))


def plan_of_run(*run, **where) -> str:
    """The plan in words; the run as for `facts`."""
    return memory_plan(**facts(*run, **where)).text


def line_of_run(policy, critic, args, ranks: int, cuda: bool) -> str:
    """For the start of a run: will it fit, in one line. It warns and stops nothing."""
    try:
        job = make_job(**facts(policy, critic, args, ranks, None, cuda))
        return fits_line(job, ranks_here(ranks), machine_memory(), args.eval_only)
    except NoPlan as error:
        return f"memory: {error}"
    except Exception as error:  # any model may come here, and a run can do without a plan
        why = " ".join(str(error).split())
        return f"memory: no plan: {type(error).__name__}: {why}"


def fits_line(job: Job, ranks: int, machine_gb: float, eval_only: bool = False) -> str:
    """`ranks` of the job share a machine with so much memory. `eval_only`: nothing is trained."""
    totals = part_totals(job)
    need = ranks * machine_need(job)
    if eval_only:
        engine = engine_memory(job) | {"overhead": trainer_memory(job)["overhead"]}
        totals = {"sampling": sum(engine.values()) / GB}
        need = ranks * (LIBRARIES if job.bf16 else LIBRARIES + totals["sampling"])
    ways = []
    for part, gb in totals.items():
        if gb > job.card_gb:
            mildest = [*advice(job, part), NOTHING_HELPS][0]
            ways.append(f"while {part}: {mildest}")
    if cached_tokens(job) < job.longest:
        ways.append(CACHE_TOO_SMALL)
    if job.bf16 and need > machine_gb:
        less = "fewer models in --offload" if job.offload else "one with more memory"
        ways.append(f"the machine: {less}")
    says = "fits"
    if ways:
        says = f"does not fit: {'; '.join(ways)}"
    parts = ", ".join(f"{gb:.2f} GB while {part}" for part, gb in totals.items())
    return (
        f"memory: {'a GPU' if job.bf16 else 'a process'} needs {parts}, of {job.card_gb:.2f} GB; "
        f"the machine {need:.2f} GB of {machine_gb:.2f} GB: {says}"
    )


def main(words: list[str]):
    """A command line of ppo.py that has `--plan GPUS GB` anywhere in it."""
    at = words.index("--plan")
    asked = words[at : at + 3]
    try:
        _, gpus, gb = asked
        ranks = int(gpus)
        card_gb = float(gb)
    except ValueError:
        sys.exit(f"{' '.join(asked)}: give GPUs and GB of each, as in --plan 4 80")
    import ppo  # for its flags and their checks; only this function needs them

    args = ppo.parse_args(words[:at] + words[at + 3 :])
    configs = ppo.check(args, ranks, only_plan=True)
    print(plan_of_run(*configs, args, ranks, card_gb, cuda=True))


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    main(["--plan", *sys.argv[1:]])
