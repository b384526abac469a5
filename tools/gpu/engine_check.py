"""python engine_check.py: can this Python import vLLM, and do its kernels run on this card?

What assemble.sh runs for each release that was carried: versions, then one kernel of vLLM's library
and flash-attn 3 (prefill and one decoded token, from pages of 16 as the engine keeps them), against
PyTorch. Without a card only the imports. The exit status is 1 if vLLM cannot be imported."""

import importlib.metadata
import time

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention

PACKAGES = "transformers accelerate triton numpy numba liger-kernel tyro pydantic xgrammar"


def versions() -> None:
    began = time.time()
    card = "no card"
    if torch.cuda.is_available():
        driver = torch._C._cuda_getDriverVersion()
        card = f"{torch.cuda.get_device_name()}, driver's CUDA {driver}"
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {card}")
    import vllm
    from vllm import LLM, SamplingParams  # noqa: F401  what rollout.py imports
    from vllm.platforms import current_platform

    platform = type(current_platform).__name__
    seconds = time.time() - began
    print(f"vllm {vllm.__version__} on {platform}, imported in {seconds:.1f} s: {vllm.__path__[0]}")
    found = []
    for name in PACKAGES.split():
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} missing")
    print(", ".join(found))


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def norm_kernel() -> None:
    x = numbers(8, 256)
    out = torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, torch.ones_like(x[0]), 1e-6)
    error = (out.float() - rms_norm(x.float(), (256,), eps=1e-6)).abs().max().item()
    print(f"rms_norm is off by {error:.1e} (bf16: below 2e-2)")


def attention_kernel(size: int, queries: int) -> None:
    """4 heads, 2 of k and v, the last `queries` of 100 tokens."""
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

    keys, values = numbers(2, 8, 16, 2, size)
    q = numbers(queries, 4, size)

    def integers(*values: int) -> torch.Tensor:
        return torch.tensor(values, device="cuda", dtype=torch.int32)

    out = flash_attn_varlen_func(
        q,
        keys,
        values,
        queries,
        integers(0, queries),
        100,
        seqused_k=integers(100),
        causal=True,
        block_table=integers(*range(8))[None],
        softmax_scale=0.1,
        fa_version=3,
    )
    whole = []
    for pages in (keys, values):
        rows = pages.flatten(0, 1)[:100].repeat_interleave(2, 1)
        whole.append(rows.transpose(0, 1).float())
    mask = torch.ones(queries, 100, device="cuda", dtype=torch.bool).tril(100 - queries)
    want = scaled_dot_product_attention(q.transpose(0, 1).float(), *whole, mask, scale=0.1)
    error = ((out.float() - want.transpose(0, 1)).norm() / want.norm()).item()
    title = f"flash-attn 3, heads of {size}, {queries} queries"
    print(f"{title}: off by {error:.1e} of the whole (bf16: below 1e-2)")


def kernels() -> None:
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    import vllm.cumem_allocator  # noqa: F401  sleep mode
    from vllm.vllm_flash_attn import flash_attn_interface as interface

    supported = interface.is_fa_version_supported(3)
    print("flash-attn 3:", supported or interface.fa_version_unsupported_reason(3))
    norm_kernel()
    for size in (32, 64, 128):
        for queries in (100, 1):
            try:
                attention_kernel(size, queries)
            except Exception as error:
                text = f"{type(error).__name__}: {str(error)[:300]}"
                print(f"flash-attn 3, heads of {size}, {queries} queries: {text}")


versions()
if torch.cuda.is_available():
    kernels()
