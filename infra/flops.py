"""How much of the machine a step has used: floating-point operations, and their share of the
roofline (MFU).

Owns: the operations that a model's passes need, and what a card could do at most.
Refuses to know: how the passes are done. Recomputation is work of the machine, not of the model.
"""

import time
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

# dense bf16 FLOP/s of data sheets, by how a card's name begins; the first that fits
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
}


@dataclass
class Roofline:
    """What one rank could do at most."""

    flops: float  # a second
    text: str  # the same in words, with where the number is from


@cache
def roofline() -> Roofline:
    """Of the data sheet; of a card that is not in PEAKS, of a CPU or of a part of a card (MIG), the
    best of five matmuls, which take a second on a CPU."""
    if not torch.cuda.is_available():
        return measured_roofline("CPU", torch.randn(1024, 1024))
    card = torch.cuda.get_device_name()
    for name, peak in PEAKS.items():
        if card.startswith(f"NVIDIA {name}") and "MIG" not in card:
            return Roofline(peak, f"{peak / 1e12:.0f} TFLOP/s ({card}, data sheet)")
    return measured_roofline(card, torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16))


def measured_roofline(card: str, x: torch.Tensor) -> Roofline:
    """By products of the square matrix x with itself."""
    laps = []
    for _ in range(5):
        begun = time.perf_counter()
        (x @ x)[0, 0].item()  # waits for the GPU
        laps.append(time.perf_counter() - begun)
    peak = 2 * len(x) ** 3 / min(laps)
    return Roofline(peak, f"{peak / 1e12:.2g} TFLOP/s ({card}, best of five matmuls)")


def forward_flops(model: nn.Module, fed: list[int], responses: int) -> float:
    """Floating-point operations of one forward pass over sequences of `fed` tokens, all ranks
    together; a backward pass has twice as many.

    2 for each token and parameter that multiplies it; causal attention has 2 products of L^2 / 2
    pairs, 2 for each pair and channel; a policy's head sees `responses` tokens only. Recomputation
    does not count."""
    config = model.config
    body = 0
    for name, parameter in model.named_parameters():
        if "embed_tokens" not in name and "lm_head" not in name:
            body += parameter.numel()
    head = 0
    if hasattr(model, "lm_head"):
        head = config.vocab_size * config.hidden_size * responses
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_dim
    pairs = sum(length * length for length in fed)
    return 2 * (body * sum(fed) + head + config.num_hidden_layers * width * pairs)


def utilisation(
    times: list[dict], passes: dict[nn.Module, int], fed: list[int], responses: int
) -> dict:
    """Metrics of one step. `times`: seconds and memory of its phases, of all ranks; `passes`: how
    often each model saw the batch in the update phase.

    Tokens a second, of the step and of its update phase; what part of a rank's roofline the update
    reached (MFU); memory of each phase, of the fullest rank."""
    mine = times[0]
    update = 0.0  # FLOPs: a pass is a forward, and a backward of twice as many
    for model, count in passes.items():
        update += 3 * count * forward_flops(model, fed, responses)
    rate = update / mine["time/update"] / len(times)
    memory = {}
    for name in mine:
        if name.startswith("perf/"):
            memory[name] = max(of_rank[name] for of_rank in times)
    return memory | {
        "perf/peak_gb": max(memory.values()),
        "perf/tflops": rate / 1e12,
        "perf/mfu": rate / roofline().flops,
        "perf/tokens_per_s": (sum(fed) + len(fed)) / mine["time/step"],
        "perf/train_tokens_per_s": max(passes.values()) * sum(fed) / mine["time/update"],
    }
