"""Models of Hugging Face folders, sharded by FSDP2: loading, gathering their weights, optimizer
steps.

Owns: what is loaded in which precision and how it is sharded.
Refuses to know: packed rows, losses, rewards, files of checkpoints.
Left out on purpose: which optimizer it is (`make_optimizer` in ppo.py), and optimizers with 8-bit
states (4 GB a card in the reference run, for one more package).
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


# a model folder runs no code: no pickles, no Python files
SAFE = {"use_safetensors": True, "trust_remote_code": False}


def load_policy(
    path: str,
    head: type[nn.Linear],
    accelerator,
    attention: str = "varlen",
    checkpointing: bool = False,
    offload: bool = False,
    trained: bool = True,
) -> nn.Module:
    """A causal language model in fp32, sharded; its lm_head becomes one of class `head`.
    trained=False: a reference."""
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
    """A transformer with one number per token. A new value head starts at zero: first values are 0,
    not noise."""
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
        for p in model.score.parameters():
            nn.init.zeros_(p)
    return shard(model, accelerator, checkpointing, offload)


def shard(model: nn.Module, accelerator, checkpointing: bool, offload: bool) -> nn.Module:
    """offload: this model's shards, gradients and optimizer live in the machine's memory. Each
    layer comes to the card when it is gathered, and AdamW runs on the CPU: 16 bytes a parameter
    less, for seconds a step at 1.5B."""
    # prepare() takes no frozen model, this takes any
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    model.config.architectures = [type(model).__name__]  # FSDP is about to change the name
    model.train()  # no dropout anywhere; checkpointing acts in this mode only
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if not accelerator.is_fsdp2:
        for p in model.parameters():
            # off the mapped file: in its odd places sums are rounded in another order
            p.data = p.data.clone()
        return accelerator.prepare_model(model)
    plugin = accelerator.state.fsdp_plugin
    plugin.transformer_cls_names_to_wrap = None  # else those of the first model, for every model
    plugin.cpu_offload = OffloadPolicy()  # none
    if offload:
        plugin.cpu_offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    return fsdp2_prepare_model(accelerator, model)


def reshard(model: nn.Module):
    """After a forward without backward FSDP2 keeps the head gathered (0.5 GB at 1.5B), rounded to
    the compute dtype. Gives it back."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_weights(model: nn.Module, dtype: torch.dtype) -> Iterator:
    """(Hugging Face name, whole tensor on the device); collective. A tensor is good until the next
    one is asked for: one layer is alive at a time. A tied head comes once, as the embedding. The
    dtype that the model computes in is gathered a layer in one call, cast before it is sent;
    another (fp32 of a bf16 run, to be saved) tensor by tensor."""
    sent = set()
    reshard(model)
    for prefix, unit in list(model.named_modules()):
        if not isinstance(unit, FSDPModule):
            continue
        inside = {name for name, _ in model.named_parameters() if name.startswith(prefix)}
        if inside <= sent:
            continue  # norm, embedding and head come together, by the name of any of them
        unit.unshard()
        whole = {
            name: p.detach()
            for name, p in model.named_parameters()
            if name not in sent and not isinstance(p, DTensor)
        }
        if any(tensor.dtype != dtype for tensor in whole.values()):
            unit.reshard()
            break  # as it will be with all other units
        yield from whole.items()
        sent |= whole.keys()
        unit.reshard()
    for name, p in model.named_parameters():
        if name not in sent:
            yield name, gathered(p.detach().to(dtype))


def gathered(x: Tensor) -> Tensor:
    """The whole of a sharded tensor, on the device (offloaded ones go there first); collective."""
    if isinstance(x, DTensor):
        return x.to(x.device_mesh.device_type).full_tensor()
    return x


def optimizer_step(trained: Trained, lr: float, max_norm: float) -> Tensor:
    """Clips the gradient over all ranks and steps; returns its norm before clipping, (). When that
    is not finite, which all ranks see alike, nothing is changed. (Accelerate's clip_grad_norm_
    breaks for a second model.)"""
    parameters = list(trained.model.parameters())
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if torch.isfinite(whole):
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        for group in trained.optimizer.param_groups:
            group["lr"] = lr
        trained.optimizer.step()
        trained.optimizer.zero_grad()
    return whole


def suspects(model: nn.Module, norm: Tensor, meter: Meter) -> dict[str, Tensor | None]:
    """When the norm, equal on all ranks, is not finite: this rank's sums of losses, shards of
    gradients, the norm."""
    if torch.isfinite(norm):
        return {}
    found = {name: pair[0] for name, pair in meter.pairs.items()}
    for name, p in model.named_parameters():
        gradient = p.grad
        if isinstance(gradient, DTensor):
            gradient = gradient.to_local()
        found[f"gradient of {name}"] = gradient
    return found | {"gradient norm": norm}
