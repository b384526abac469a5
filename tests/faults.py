"""python tests/faults.py FAULT OUT [flags of ppo.py]: the toy run of tests/toy.py (with --task:
another), with a fault. python tests/faults.py FAULT --replay FILE: the same for `tools/replay.py
FILE`. tests/launch.py starts both on ranks, too.

FAULT is NAME:STEP:RANK[:CALL], several of them with commas between, or `none`: at the first (or
CALL-th; with a plus: and every later) call of a function in one phase of that step, on that rank
(or every one: *), NaN is written, the process sleeps, gets a signal, or an error is raised. What an
optimizer step has seen is printed as `update STEP MODEL NORM`, the norm to the last bit. When a
rank is to hang, what each says on stderr is in OUT.rankN: stacks of two would mix.
"""

import os
import re
import signal
import sys
import time
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import toy  # first: ppo.py, with its guard for the name `kernels`
import torch

import kernels
import ppo
import rewards
import rollout
from infra import models, watchdog
from tools import replay

HANG = 600  # seconds
NAN = float("nan")


def nan_reward(result: list[Future], *_) -> list[Future]:
    (bad := Future()).set_result(result[0].result() | {"reward": NAN})
    return [bad, *result[1:]]


def nan_advantage(result, token_rewards, values, mask, *_):
    result[tuple(mask.nonzero()[0].tolist())] = NAN
    return result


def nan_answer(result, *_):
    """In what the critic or the policy says of a micro-batch: values, or log-probs."""
    (result if torch.is_tensor(result) else result[0])[0] = NAN
    return result


def nan_gradient(trained, *_) -> None:
    """In this rank's shard of one parameter."""
    grads = [p.grad for p in trained.model.parameters() if p.grad is not None]
    shards = [getattr(grad, "_local_tensor", grad) for grad in grads]
    next(shard for shard in shards if shard.numel()).view(-1)[0] = NAN


def nan_weights(sampler, *_) -> None:
    def write(model) -> None:
        with torch.no_grad():
            next(model.parameters()).fill_(NAN)

    sampler.llm.apply_model(write) if hasattr(sampler, "llm") else write(sampler.model)


def nan_weights_after(result, sampler, *_):
    nan_weights(sampler)


def hang(*_) -> None:
    time.sleep(HANG)


def hang_in_c(*_) -> None:
    """With the lock of the interpreter held: no thread of Python runs."""
    re.match("(a+)+$", 60 * "a" + "b")


def fail(*_) -> None:
    raise ValueError("planted error")


def tell(*_) -> None:
    raise ValueError(f"MY_SECRET is {os.environ['MY_SECRET']}")


def out_of_memory(*_) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB (planted)")


def allocate(*_) -> None:
    torch.empty(1 << 50, dtype=torch.uint8)


def terminate(*_) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt(*_) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def interrupt_twice(*_) -> None:
    interrupt()
    time.sleep(1.5)
    interrupt()


def hours_later(*_) -> None:
    watchdog.NOW.started -= 10 * 3600


def policy(trained, *_) -> bool:
    return hasattr(trained.model, "lm_head")


def critic(trained, *_) -> bool:
    return not policy(trained)


def any_call(*_) -> bool:
    return True


# name: (owner, function, phase, what is done before it, what is done to its result, of which calls)
BOTH = (rollout.TorchSampler, rollout.VLLMSampler)
FAULTS = {
    "reward": ([rewards], "submit", "reward", None, nan_reward, any_call),
    "advantage": ([ppo], "gae", "advantage", None, nan_advantage, any_call),
    "values": ([kernels], "critic_forward", "forward", None, nan_answer, any_call),
    "logprobs": ([kernels], "policy_forward", "forward", None, nan_answer, any_call),
    "policy-gradient": ([models], "optimizer_step", "update", nan_gradient, None, policy),
    "critic-gradient": ([models], "optimizer_step", "update", nan_gradient, None, critic),
    "synced-weights": (BOTH, "load", "sync", None, nan_weights_after, any_call),
    "engine-weights": (BOTH, "sample", "sample", nan_weights, None, any_call),
    "hang-sample": (BOTH, "sample", "sample", hang, None, any_call),
    "hang-update": ([models], "optimizer_step", "update", hang, None, any_call),
    "hang-microbatch": ([kernels], "policy_forward", "update", hang, None, any_call),
    "hang-in-c": ([kernels], "policy_forward", "update", hang_in_c, None, any_call),
    "raise": ([kernels], "critic_forward", "forward", fail, None, any_call),
    "tell": ([kernels], "critic_forward", "forward", tell, None, any_call),
    "cuda-memory": ([kernels], "critic_forward", "update", out_of_memory, None, any_call),
    "memory": ([kernels], "critic_forward", "forward", allocate, None, any_call),
    "engine": (BOTH, "sample", "sample", fail, None, any_call),
    "terminate": (BOTH, "sample", "sample", terminate, None, any_call),
    "interrupt": ([models], "optimizer_step", "update", interrupt, None, any_call),
    "interrupt-twice": ([models], "optimizer_step", "update", interrupt_twice, None, any_call),
    "hours-later": ([models], "optimizer_step", "update", hours_later, None, any_call),
}


@contextmanager
def planted(faults: str):
    before = []

    def wrap(owner, name: str, make) -> None:
        original = getattr(owner, name)
        before.append((owner, name, original))
        # a function, so that it becomes a method where its owner is a class
        setattr(owner, name, lambda *args, **more: make(original, *args, **more))

    def reported(function, trained, *args):
        norm = function(trained, *args)
        if watchdog.RANK == 0:
            name = "policy" if policy(trained) else "critic"
            print("update", watchdog.NOW.step, name, norm.item().hex(), flush=True)
        return norm

    wrap(models, "optimizer_step", reported)
    for fault in faults.split(","):
        if fault != "none":
            plant(fault, wrap)
    try:
        yield
    finally:
        for owner, name, function in reversed(before):
            setattr(owner, name, function)


def plant(fault: str, wrap) -> None:
    name, step, rank, call = [*fault.split(":"), "1"][:4]
    owners, function, phase, first, then, mine = FAULTS[name]
    nth = int(call.rstrip("+"))
    calls = [0]

    def faulty(function, *args, **more):
        here = watchdog.NOW.phase == phase and watchdog.NOW.step == int(step)
        here = here and rank in ("*", str(watchdog.RANK))
        here = here and mine(*args)
        calls[0] += here
        now = here and (calls[0] == nth or (call.endswith("+") and calls[0] > nth))
        if now and first:
            first(*args)
        result = function(*args, **more)
        changed = then(result, *args) if now and then else None
        return result if changed is None else changed

    for owner in owners:
        wrap(owner, function, faulty)


def run(fault: str, out: str, *flags: str) -> list[dict]:
    if watchdog.WORLD > 1 and fault.startswith("hang"):
        own = os.open(f"{out}.rank{watchdog.RANK}", os.O_WRONLY | os.O_CREAT)
        os.dup2(own, 2)
    with planted(fault):
        if "--task" in flags:
            return ppo.train(ppo.parse_args(["--out", out, *flags]))
        return toy.run(out, *flags)


def once_more(fault: str, file: str) -> int:
    """The update is of the step that bad_step_N is named by, as far as the fault is concerned."""
    watchdog.begin_step(int(Path(file).parent.name.removeprefix("bad_step_")))
    watchdog.enter("update")
    with planted(fault):
        return replay.main(Path(file))


if __name__ == "__main__":
    if sys.argv[2] == "--replay":
        sys.exit(once_more(sys.argv[1], sys.argv[3]))
    run(*sys.argv[1:])
