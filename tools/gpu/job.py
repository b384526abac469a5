"""torchrun --standalone --nproc_per_node 1 tools/gpu/job.py [flags of ppo.py]: a run, with a stopwatch.

It is ppo.py's own `train`. Each call of the engine leaves a row in $STAGE_LOG: seconds, GB free on the
card before and after, and of samples how many tokens, their mean -log-prob (which must be the
policy's entropy, if the engine draws from the distribution whose log-probs it reports), and how many
answers to one prompt are equal. Nothing of the project is changed, but for

    STAGE_EAGER=1   no torch.compile and no CUDA graphs
    STAGE_STALE=1   one weight never reaches the engine after the first time: the canary must end the run
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ppo  # noqa: E402  first: its guard for the name `kernels`
import torch  # noqa: E402

import rollout  # noqa: E402


class Stopwatch:
    """Of the calls of the engine; a call inside another one is not counted twice."""

    def __init__(self, path: str):
        self.path = path
        self.inner = 0.0  # seconds of the calls inside the present one

    def call(self, name: str, function, describe):
        """What the function returns; describe(that) is more to be told of it."""
        outer = self.inner
        self.inner = 0.0
        before = free_gb()
        began = time.perf_counter()
        result = function()
        after = free_gb()
        seconds = time.perf_counter() - began
        row = {"call": name, "s": seconds - self.inner}
        row |= {"free_gb_before": before, "free_gb_after": after}
        self.inner = outer + seconds
        with open(self.path, "a") as file:
            file.write(json.dumps(row | describe(result)) + "\n")
        return result


def free_gb() -> float:
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0] / 2**30


def nothing(result) -> dict:
    return {}


class Watched(rollout.VLLMSampler):
    """The engine, with a stopwatch around each of its methods."""

    def __init__(self, *args, **named):
        self.watch = Stopwatch(os.environ["STAGE_LOG"])
        self.loads = 0
        start = super().__init__
        self.watch.call("start", lambda: start(*args, **named), self.facts)

    def facts(self, result) -> dict:
        import vllm

        config = self.llm.llm_engine.vllm_config
        return {
            "vllm": vllm.__version__,
            "runner": str(getattr(config, "use_v2_model_runner", "?")),
            "mode": str(config.compilation_config.mode),
            "graphs": str(config.compilation_config.cudagraph_mode),
            "blocks": config.cache_config.num_gpu_blocks,
            "async": config.scheduler_config.async_scheduling,
        }

    def sample(self, prompts, n, *args, **named):
        def drawn(samples: list[rollout.Sample]) -> dict:
            tokens = sum(len(sample.ids) for sample in samples)
            nll = -sum(sum(sample.logprobs) for sample in samples) / max(1, tokens)
            twins = 0
            for first in range(0, len(samples), n):
                answers = [tuple(sample.ids) for sample in samples[first : first + n]]
                twins += len(answers) - len(set(answers))
            row = {"answers": len(samples), "n": n, "tokens": tokens}
            return row | {"nll": nll, "equal_answers": twins}

        sample = super().sample
        return self.watch.call("sample", lambda: sample(prompts, n, *args, **named), drawn)

    def load(self, named_tensors) -> None:
        self.loads += 1
        if os.environ.get("STAGE_STALE") and self.loads > 1:
            named_tensors = (pair for pair in named_tensors if "layers.1.mlp.down" not in pair[0])
        load = super().load
        self.watch.call("load", lambda: load(named_tensors), nothing)

    def sleep(self) -> None:
        if self.awake:
            self.watch.call("sleep", super().sleep, nothing)

    def wake(self) -> None:
        if not self.awake:
            self.watch.call("wake", super().wake, nothing)


def without_compiling() -> None:
    """vLLM's switch for it is no argument of ours."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    plain = LLM.__init__

    def eager(self, *args, **named):
        plain(self, *args, **named | {"enforce_eager": True})

    LLM.__init__ = eager


rollout.VLLMSampler = Watched
if os.environ.get("STAGE_EAGER"):
    without_compiling()
ppo.train(ppo.parse_args(sys.argv[1:]))
