"""Models of Hugging Face folders, sharded by FSDP2: loading, gathering their weights, optimizer steps.

Owns: what is loaded in which precision and how it is sharded.
Refuses to know: packed rows, losses, rewards, files of checkpoints.
Left out on purpose: optimizers with 8-bit states (4 GB a card in the reference run, for one more package).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy
from torch.distributed.tensor import DTensor

from infra.dist import Meter


@dataclass
class Trained:
    """A model and what updates it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer


SAFE = {
    "use_safetensors": True,
    "trust_remote_code": False,
}  # a model folder runs no code: no pickles, no Python files


def load_policy(
    path: str,
    head: type[nn.Linear],
    accelerator,
    attention: str = "varlen",
    checkpointing: bool = False,
    offload: bool = False,
    trained: bool = True,
) -> nn.Module:
    """A causal language model in fp32, sharded; its lm_head becomes one of class `head`. trained=False: a reference."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation=attention, **SAFE
    )
    model.lm_head.__class__ = head  # same parameter, same tie to the embedding
    return shard(model.requires_grad_(trained), accelerator, checkpointing and trained, offload)


def load_critic(
    path: str,
    accelerator,
    attention: str = "varlen",
    checkpointing: bool = False,
    offload: bool = False,
) -> nn.Module:
    """A transformer with one number per token. A new value head starts at zero: first values are 0, not noise."""
    from transformers import AutoConfig, AutoModelForTokenClassification

    config = AutoConfig.from_pretrained(path, num_labels=1, trust_remote_code=False)
    config.classifier_dropout = 0.0
    model, info = AutoModelForTokenClassification.from_pretrained(
        path,
        config=config,
        dtype=torch.float32,
        attn_implementation=attention,
        output_loading_info=True,
        **SAFE,
    )
    if "score.weight" in info["missing_keys"]:
        nn.init.zeros_(model.score.weight)
        nn.init.zeros_(model.score.bias)
    return shard(model, accelerator, checkpointing, offload)


def shard(model: nn.Module, accelerator, checkpointing: bool, offload: bool) -> nn.Module:
    """offload: this model's shards, gradients and optimizer live in the machine's memory. Each layer comes to the card
    when it is gathered, and AdamW runs on the CPU: 16 bytes a parameter less, for seconds a step at 1.5B."""
    from accelerate.utils.fsdp_utils import (
        fsdp2_prepare_model,
    )  # prepare() takes no frozen model, this takes any

    model.config.architectures = [type(model).__name__]  # FSDP is about to change the name
    model.train()  # no dropout anywhere; checkpointing acts in this mode only
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if not accelerator.is_fsdp2:
        for p in (
            model.parameters()
        ):  # off the mapped file: in its odd places sums are rounded in another order
            p.data = p.data.clone()
        return accelerator.prepare_model(model)
    plugin = accelerator.state.fsdp_plugin
    plugin.transformer_cls_names_to_wrap = None  # else those of the first model, for every model
    plugin.cpu_offload = (
        CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy()
    )
    return fsdp2_prepare_model(accelerator, model)


def reshard(model: nn.Module) -> None:
    """After a forward without backward FSDP2 keeps the head gathered (0.5 GB at 1.5B), rounded to the compute dtype.
    Gives it back."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor on the device); collective. A tensor is good until the next one is asked for:
    one layer is alive at a time. A tied head comes once, as the embedding. The dtype that the model computes in is
    gathered a layer in one call, cast before it is sent; another (fp32 of a bf16 run, to be saved) tensor by tensor."""
    sent: set[str] = set()
    reshard(model)
    for prefix, unit in [
        (prefix, m) for prefix, m in model.named_modules() if isinstance(m, FSDPModule)
    ]:
        if all(name in sent for name, _ in model.named_parameters() if name.startswith(prefix)):
            continue  # norm, embedding and head come together, by the name of any of them
        unit.unshard()
        whole = {
            name: p
            for name, p in model.named_parameters()
            if not isinstance(p, DTensor) and name not in sent
        }
        if same := all(p.dtype == dtype for p in whole.values()):
            yield from ((name, p.detach()) for name, p in whole.items())
            sent |= whole.keys()
        unit.reshard()
        if not same:
            break
    yield from (
        (name, gathered(p.detach().to(dtype)))
        for name, p in model.named_parameters()
        if name not in sent
    )


def gathered(x: Tensor) -> Tensor:
    """The whole of a sharded tensor, on the device (offloaded ones go there first); collective."""
    return x.to(x.device_mesh.device_type).full_tensor() if isinstance(x, DTensor) else x


def optimizer_step(trained: Trained, lr: float, max_norm: float) -> Tensor:
    """Clips the gradient over all ranks and steps; returns its norm before clipping, (). When that is not finite, which
    all ranks see alike, nothing is changed. (Accelerate's clip_grad_norm_ breaks for a second model.)"""
    model, optimizer = trained.model, trained.optimizer
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if torch.isfinite(whole):
        nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    return whole


def suspects(model: nn.Module, norm: Tensor, meter: Meter) -> dict[str, Tensor]:
    """When the norm, equal on all ranks, is not finite: this rank's sums of losses, shards of gradients, the norm."""
    if torch.isfinite(norm):
        return {}
    grads = {
        f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None
    }
    local = {name: g.to_local() if isinstance(g, DTensor) else g for name, g in grads.items()}
    return {name: pair[0] for name, pair in meter.pairs.items()} | local | {"gradient norm": norm}
