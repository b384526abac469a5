"""FLOPs and MFU."""

import time
from collections import namedtuple
from functools import cache

import torch
from torch import nn

# sizes of a model in elements: all parameters (a tied head once), those of one layer; kv: of k alone; head: of one head
Shape = namedtuple("Shape", "params layer layers hidden q kv mlp vocab head")
# dense bf16 FLOP/s of data sheets, by how a card's name begins; the first that fits
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
}


@cache
def roofline() -> tuple[float, str]:
    """What one rank could do at most, in FLOP/s; and in words, with where that number is from."""
    cuda = torch.cuda.is_available()
    card = torch.cuda.get_device_name() if cuda else "CPU"
    for name, peak in PEAKS.items():
        if card.startswith(f"NVIDIA {name}") and "MIG" not in card:
            return peak, f"{peak / 1e12:.0f} TFLOP/s ({card}, data sheet)"
    n, laps = 8192 if cuda else 1024, []
    x = torch.randn(
        n, n, device="cuda" if cuda else "cpu", dtype=torch.bfloat16 if cuda else torch.float32
    )
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
    body = sum(
        size for name, size in sizes.items() if "embed_tokens" not in name and "lm_head" not in name
    )
    head = c.vocab_size * c.hidden_size * responses if hasattr(model, "lm_head") else 0
    width = c.num_attention_heads * (
        getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    )
    return 2 * (body * sum(fed) + head + c.num_hidden_layers * width * sum(n * n for n in fed))


def utilisation(
    times: list[dict], passes: dict[nn.Module, int], fed: list[int], responses: int
) -> dict[str, float]:
    """`times` of all ranks. Tokens a second: of the step, and of its update phase, in which each model saw the batch so
    many times. What part of a rank's roofline the update reached (MFU). Memory of each phase, of the fullest rank."""
    mine = times[0]
    rate = (
        3
        * sum(n * forward_flops(m, fed, responses) for m, n in passes.items())
        / mine["time/update"]
        / len(times)
    )
    row = {name: max(t[name] for t in times) for name in mine if name.startswith("perf/")}
    row |= {
        "perf/peak_gb": max(row.values()),
        "perf/tflops": rate / 1e12,
        "perf/mfu": rate / roofline()[0],
    }
    row |= {"perf/tokens_per_s": (sum(fed) + len(fed)) / mine["time/step"]}
    return row | {"perf/train_tokens_per_s": max(passes.values()) * sum(fed) / mine["time/update"]}
