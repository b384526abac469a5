"""What a step costs. Before it: will it fit in memory? After it: how much of the machine did it use?

Owns: the arithmetic of memory (sizes of models, what is alive at which moment, what to change when it does not fit),
from configurations and flags alone; FLOPs, and the share of the roofline that they reached (MFU).
Refuses to know: how any of it is done. When kernels.py or rollout.py keeps another tensor, its bytes change here.
"""
import os
import sys
import time
from bisect import bisect_left
from collections import namedtuple
from functools import cache

import torch
from torch import nn

# sizes of a model in elements: all parameters (a tied head once), those of one layer; kv: of k alone; head: of one head
Shape = namedtuple("Shape", "params layer layers hidden q kv mlp vocab head")


def model_shape(config, critic: bool) -> Shape | None:
    """Counted on the model itself, which is made without memory."""
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    config = type(config).from_dict(config.to_dict() | {"num_labels": 1})
    with torch.device("meta"):
        model = (AutoModelForTokenClassification if critic else AutoModelForCausalLM).from_config(config)
    first = {name.split(".layers.0.")[1]: p for name, p in model.named_parameters() if ".layers.0." in name}
    if not {"self_attn.q_proj.weight", "mlp.gate_proj.weight"} <= first.keys():
        return None  # not made of Llama's parts
    q, kv, mlp = (len(first[f"{name}_proj.weight"]) for name in ("self_attn.q", "self_attn.k", "mlp.gate"))
    counts = [sum(p.numel() for p in some) for some in (model.parameters(), first.values())]
    sizes = config.num_hidden_layers, config.hidden_size, q, kv, mlp, config.vocab_size
    return Shape(*counts, *sizes, q // config.num_attention_heads)


def memory_items(
    policy: Shape, critic: Shape | None, reference: Shape | None, *, ranks: int, card_gb: float, bf16: bool,
    gradient_checkpointing: bool, max_tokens_per_microbatch: int, sequences: int, longest: int, tp: int,
    gpu_memory: float, max_seqs: int, engine: str, sharded: bool, replicas: int = 1, offload: tuple = (), **_,
) -> tuple[dict[str, dict[str, float]], float]:
    """For each moment that can be the fullest, the bytes of what is alive on a rank; and the tokens that the KV cache
    holds. bf16 stands for CUDA, fp32 for CPU (`setup` knows no other pair), where engines do not sleep."""
    c, n = 2 if bf16 else 4, ranks // replicas if sharded else 1  # bytes of a number in compute; parts of a model
    here = {m: 0 if m in offload and bf16 else 1 / n for m in ("policy", "critic", "reference")}  # the part on a card
    tokens = min(max_tokens_per_microbatch, -(-sequences // ranks) * longest)
    trained = {"policy": policy} | ({"critic": critic} if critic else {})
    embedding = policy.vocab * policy.hidden

    key_value = 2 * c * policy.layers * max(policy.kv // tp, policy.head)  # bytes a token
    batch = min(max_seqs, -(-sequences // (ranks // tp)))
    served = weights = {"engine weights": c * policy.params / tp}
    if engine == "torch":  # a sequence has logits, log-softmax and exp in fp32, exp and its cumsum in fp64
        served = weights | {"engine in work": 28 * batch * policy.vocab, "KV cache": batch * longest * key_value}
    elif not bf16:
        served = weights = weights | {"KV cache": 256 << 20}  # kv_cache_mb of VLLMSampler
    else:  # vLLM tries a full batch of prompts and max_seqs log-probs; the KV cache gets what these leave of its share
        prompts = (16384 if card_gb >= 70 else 8192) * 3 * c * (policy.mlp // tp + policy.hidden)
        served = weights | {"engine in work": max(prompts, 4 * 4 * max_seqs * policy.vocab)}
        served |= {"KV cache": max(0.0, gpu_memory * card_gb * 2**30 - sum(served.values()))}

    # Held by the trainer at every moment. (B, T): ids 8 bytes, mask and last 1 each, 4 each for engine's and old
    # log-probs, values, rewards, advantages, returns, two weights of the loss, 1 for the minibatch; with a reference
    # its log-probs and the penalty. Overhead is assumed, not measured: CUDA context 0.5 GB, NCCL 0.5, workspaces and
    # the engine's CUDA graphs 1.
    always = {"overhead": (2 << 30) * bf16, "(B, T) tensors": sequences * longest * (51 if reference else 43)}
    for name, s in trained.items():  # fp32, as are the gradients: 4 bytes, and AdamW has two states
        always |= {f"{name} weights": 4 * s.params * here[name], f"{name} Adam states": 8 * s.params * here[name]}
    always |= {"reference weights": 4 * reference.params * here["reference"]} if reference else {}
    gathered = {"policy gathered head": c * embedding * sharded}
    # pieces of fp32 logits: 3 in _ChunkedLogprob, forward and backward, 2 when one piece is all
    piece, whole = (128 if bf16 else 16) << 20, 4 * tokens * policy.vocab
    chunk, alive = min(piece, whole), 3 if whole > piece else 2
    canary = 3 * min(chunk, 4 * 4 * 64 * policy.vocab)  # of four answers, cut at 64 tokens
    # a tensor on its way to the engine (or, in fp32, to a checkpoint) is there whole and in parts
    moments = {"sampling": always | served | gathered | {"sync, canary, save": 8 * embedding * sharded + canary}}
    always |= {} if bf16 else weights

    for name, s in trained.items():
        # Elements a token that the backward of a layer needs, on CPU: its two norms keep input, normalised input and
        # output, attention q, k, v, output and the input of o_proj, the MLP gate, silu(gate), up and their product.
        # `ends`: the last norm and the rows for the head. `work`: gradients on top, at worst two in the MLP.
        layer, ends, work = 6 * s.hidden + 3 * s.q + 2 * s.kv + 4 * s.mlp, 4 * s.hidden, 2 * s.mlp + 2 * s.hidden
        stream = s.hidden  # between layers, all that checkpointing keeps
        if bf16:  # Liger: no normalised input, no silu(gate), in place. torch's varlen: k and v repeated, one output
            layer, ends, work = 4 * s.hidden + 4 * s.q + 3 * s.mlp, 3 * s.hidden, s.mlp + 2 * s.hidden
        if bf16 and not sharded:  # autocast instead of FSDP: fp32 between layers, a bf16 copy for every linear
            layer, stream = layer + 5 * s.hidden, 2 * s.hidden
        kept = s.layers * (stream if gradient_checkpointing else layer) + ends
        again = layer - stream if gradient_checkpointing else 0
        gradients = {f"{name} gradients": 4 * s.params * here[name]}
        passes = always | gradients | {f"{name} activations": c * tokens * kept}
        in_layer = {f"{name} layer in backward": c * tokens * (work + again)}
        # FSDP: this layer, the next, its buffer, a gradient; two fp32 gradients on their way. Autocast: bf16 copies
        in_layer[f"{name} gathered layers"] = (4 * c + 8) * s.layer if sharded else 2 * s.params * bf16
        if name == "policy":  # the gradient of the hidden states is summed in fp32
            head = alive * chunk + (c + 4) * tokens * policy.hidden + c * embedding
            moments["policy head"] = passes | gathered | {"log-probs, head gradient": head}
            in_layer |= gathered | {"head gradient on its way": c * embedding * sharded}
        moments[f"{name} layers"] = passes | in_layer
    if not bf16:  # what the background writes is copied first; the copy of a card's tensors is not on the card
        moments["saving"] = always | {f"{name} checkpoint": 12 * s.params / ranks for name, s in trained.items()}
    return moments, served["KV cache"] / key_value


def memory_plan(policy, critic, reference, **flags) -> tuple[dict[str, float], str]:
    """From Hugging Face configurations alone (critic and reference may be None) and flags as in memory_items: GB
    (2**30) a rank of every item, with the totals "while sampling", "while updating" and, on CPU, "while saving"; and a
    table with a verdict, for people."""
    models = {"policy": policy, "critic": critic, "reference": reference}
    given = {name: config and model_shape(config, name == "critic") for name, config in models.items()} | flags
    if any(config and not given[name] for name, config in models.items()):
        return {}, f"no memory plan for {policy.model_type}: it knows dense models that are made as Llama is"
    card, ranks, tp, longest = (flags[name] for name in ("card_gb", "ranks", "tp", "longest"))

    def part(moment: str) -> str:
        return moment if moment in ("sampling", "saving") else "updating"

    def needs(what: str, changed: dict) -> float:
        sharded = {"sharded": flags["sharded"] or bool({"ranks", "offload"} & changed.keys())}
        moments = memory_items(**given | sharded | changed)[0]
        return max(sum(alive.values()) for m, alive in moments.items() if part(m) == what) / 2**30

    def remedies(what: str) -> str:
        """Each flag that brings this total down to the card on its own, with the mildest value that does."""
        prompts = flags.get("prompts_per_step", flags["sequences"])
        models = ["critic", "critic policy", "critic policy reference"] if flags["bf16"] else []
        critic = given["critic"]
        shares = [g / 100 for g in range(round(100 * flags["gpu_memory"]), 0, -1)]
        shares = [g for g in shares if flags["bf16"] and memory_items(**given | {"gpu_memory": g})[1] >= longest]
        budgets = range(flags["max_tokens_per_microbatch"], longest - 1, -1)
        ways = {  # values from mild to strong
            "--gpu_memory at most {}": ("gpu_memory", shares),
            "--gradient_checkpointing": ("gradient_checkpointing", [True]),
            "--max_tokens_per_microbatch at most {}": ("max_tokens_per_microbatch", budgets),
            "--offload {}": ("offload", models),
            "at least {} GPUs": ("ranks", [n for n in range(ranks + 1, 513) if n % tp == prompts % n == 0]),
            "--kl_coef 0": ("reference", [None]),
            "a --critic_model of at most {.params:,} parameters": (
                "critic", [critic._replace(params=critic.params * k // 20) for k in range(19, 0, -1)] if critic else []
            ),
        }  # fmt: skip
        enough = []
        for text, (name, values) in ways.items():
            at = bisect_left(values, True, key=lambda value: needs(what, {name: value}) <= card)
            enough += [text.format(value) for value in values[at : at + 1]]
        return " or ".join(enough) or "no flag is enough alone"

    moments, kv_tokens = memory_items(**given)
    items = {name: size / 2**30 for alive in moments.values() for name, size in alive.items() if size}
    text = f"memory plan, GB on each of {ranks} ranks:\n{'':27}" + "".join(f"{moment:>15}" for moment in moments)
    for name in [*items, "total"]:
        cells = [alive.get(name, 0) if name in items else sum(alive.values()) for alive in moments.values()]
        text += f"\n  {name:25}" + "".join(f"{cell / 2**30:15.2f}" if cell else " " * 15 for cell in cells)
    totals = {what: needs(what, {}) for what in dict.fromkeys(map(part, moments))}
    want = min(flags["max_seqs"], -(-flags["sequences"] // (ranks // tp)))
    text += f"\nKV cache: {kv_tokens:,.0f} tokens, {kv_tokens / longest:.1f} sequences of {longest}; {want} want to run"
    text += "\n" + ", ".join(f"while {what} {gb:.1f} GB" for what, gb in totals.items())
    if flags["bf16"]:
        copy = 12 * sum(given[name].params for name in ("policy", "critic") if given[name]) / ranks / 2**30
        text += f"; a checkpoint on its way to the disk: {copy:.1f} GB of the machine's memory"
    wrong = [f"{gb:.1f} GB while {what}: {remedies(what)}" for what, gb in totals.items() if gb > card]
    if kv_tokens < longest:
        wrong.append("the KV cache holds no sequence of full length: a larger --gpu_memory or --tp, or shorter answers")
    spare = f"fits in {card:g} GB, {card - max(totals.values()):.1f} GB to spare"
    text += "\n" + ("\n".join([f"does not fit in {card:g} GB", *wrong]) if wrong else spare)
    return items | {f"while {what}": gb for what, gb in totals.items()}, text


def planned(words: list[str]) -> tuple[int, float, list[str]]:
    """GPUs and GB of each, from the --plan of a command line, and the rest of that."""
    at = words.index("--plan")
    try:
        return int(words[at + 1]), float(words[at + 2]), words[:at] + words[at + 3 :]
    except (IndexError, ValueError):
        sys.exit(f"{' '.join(words[at : at + 3])}: give GPUs and GB of each, as in --plan 4 80")


def plan(policy, critic, flags: dict, ranks: int, gb: float | None, cuda: bool) -> str:
    """memory_plan in words, of a run with the `flags` of ppo.py. gb of a card; None: of this machine."""
    critic, reference = critic if flags["advantage"] == "gae" else None, policy if flags["kl_coef"] else None
    if not gb and torch.cuda.is_available():
        gb = torch.cuda.get_device_properties(0).total_memory / 2**30
    given = flags | {"ranks": ranks, "bf16": cuda, "max_seqs": 256, "sharded": cuda or "RANK" in os.environ}
    given["card_gb"] = gb or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 / ranks
    given["sequences"] = given["prompts_per_step"] * given["samples_per_prompt"]
    given["longest"] = given["max_prompt_tokens"] + given["max_new_tokens"]
    return memory_plan(policy, critic, reference, **given)[1]


# --------------------------------------------------------------------------------------------------------- FLOPs, MFU

# dense bf16 FLOP/s of data sheets, by how a card's name begins; the first that fits
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


@cache
def roofline() -> tuple[float, str]:
    """What one rank could do at most, in FLOP/s; and in words, with where that number is from."""
    cuda = torch.cuda.is_available()
    card = torch.cuda.get_device_name() if cuda else "CPU"
    for name, peak in PEAKS.items():
        if card.startswith(f"NVIDIA {name}") and "MIG" not in card:
            return peak, f"{peak / 1e12:.0f} TFLOP/s ({card}, data sheet)"
    n, laps = 8192 if cuda else 1024, []
    x = torch.randn(n, n, device="cuda" if cuda else "cpu", dtype=torch.bfloat16 if cuda else torch.float32)
    for _ in range(5):
        begun = time.perf_counter()
        (x @ x)[0, 0].item()  # waits for the GPU
        laps.append(time.perf_counter() - begun)
    peak = 2 * n**3 / min(laps)
    return peak, f"{peak / 1e12:.2g} TFLOP/s ({card}, best of five matmuls)"


def forward_flops(model: nn.Module, fed: list[int], responses: int) -> float:
    """Floating-point operations of one forward pass over sequences of `fed` tokens, all ranks together; a backward pass
    has twice as many. 2 for each token and parameter that multiplies it; causal attention has 2 products of L^2 / 2
    pairs, 2 for each pair and channel; a policy's head sees `responses` tokens only. Recomputation does not count."""
    c, sizes = model.config, {name: p.numel() for name, p in model.named_parameters()}
    body = sum(size for name, size in sizes.items() if "embed_tokens" not in name and "lm_head" not in name)
    head = c.vocab_size * c.hidden_size * responses if hasattr(model, "lm_head") else 0
    width = c.num_attention_heads * (getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads)
    return 2 * (body * sum(fed) + head + c.num_hidden_layers * width * sum(n * n for n in fed))


def utilisation(times: list[dict], passes: dict[nn.Module, int], fed: list[int], responses: int) -> dict[str, float]:
    """`times` of all ranks. Tokens a second: of the step, and of its update phase, in which each model saw the batch so
    many times. What part of a rank's roofline the update reached (MFU). Memory of each phase, of the fullest rank."""
    mine = times[0]
    rate = 3 * sum(n * forward_flops(m, fed, responses) for m, n in passes.items()) / mine["time/update"] / len(times)
    row = {name: max(t[name] for t in times) for name in mine if name.startswith("perf/")}
    row |= {"perf/peak_gb": max(row.values()), "perf/tflops": rate / 1e12, "perf/mfu": rate / roofline()[0]}
    row |= {"perf/tokens_per_s": (sum(fed) + len(fed)) / mine["time/step"]}
    return row | {"perf/train_tokens_per_s": max(passes.values()) * sum(fed) / mine["time/update"]}
