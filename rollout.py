"""Token ids in, sampled token ids and their log-probs out; weights in; memory given back.

Owns: two engines with the same four methods, sample / load / sleep / wake, and no base class.
VLLMSampler is vLLM in the trainer's own process. TorchSampler is plain PyTorch with a KV cache: for
teaching, for debugging, and as a second opinion in the tests. Refuses to know: rewards, losses,
datasets, text. Ids are never decoded and re-encoded on the way to the trainer. Left out on purpose:
top_p and top_k. They change the distribution sampled from, and with it every ratio in the loss."""

import gc
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from infra.dist import Ranks, everywhere, gather, share


class Sample(NamedTuple):
    ids: list[
        int
    ]  # the response; ends with an EOS id, or completes a stop text, if and only if `finished`
    logprobs: list[
        float
    ]  # of each id under the engine's weights at the sampling temperature (at 1 when greedy)
    finished: bool  # the model chose to stop; False: cut at max_new_tokens


MOST_TOKENS = 2048  # of a response in samples.jsonl, one by one


class Rollout(NamedTuple):
    """The samples of one step as tensors; index t of each is about token t."""

    ids: Tensor  # (B, T) long: prompt + response, right-padded with 0
    mask: Tensor  # (B, T) bool: the policy chose this token; EOS included. Made from lengths, never from ids
    sampler_logprobs: Tensor  # (B, T) fp32, 0 outside the mask
    lengths: list[int]  # B, prompt + response


def collate(
    prompts: list[list[int]], samples: list[Sample], device: torch.device | str = "cpu"
) -> Rollout:
    """One row for each (prompt, sample) pair."""
    lengths = [len(p) + len(s.ids) for p, s in zip(prompts, samples, strict=True)]
    width = max(lengths)
    fill = [width - length for length in lengths]
    ids = [p + s.ids + [0] * f for p, s, f in zip(prompts, samples, fill)]
    mask = [
        [False] * len(p) + [True] * len(s.ids) + [False] * f
        for p, s, f in zip(prompts, samples, fill)
    ]
    logprobs = [[0.0] * len(p) + s.logprobs + [0.0] * f for p, s, f in zip(prompts, samples, fill)]
    return Rollout(*(torch.tensor(x, device=device) for x in (ids, mask, logprobs)), lengths)


def summary(samples: list[Sample], seconds: float) -> dict[str, float]:
    lengths = [len(s.ids) for s in samples]
    return {
        "rollout/length_mean": sum(lengths) / len(lengths),
        "rollout/length_max": max(lengths),
        "rollout/truncated_frac": sum(not s.finished for s in samples) / len(samples),
        "rollout/tokens_per_s": sum(lengths) / seconds,
    }


def mismatch(trainer: Tensor, engine: Tensor, cap: float) -> dict[str, float]:
    """How far the engine's log-probs of its samples are from the trainer's, both (K,); `cap`
    truncates the ratio."""
    gap = trainer - engine
    return {
        "mismatch/logp_abs_mean": gap.abs().mean().item(),
        "mismatch/logp_abs_max": gap.abs().max().item(),
        "mismatch/kl": (gap.exp() - 1 - gap)
        .mean()
        .item(),  # KL(engine || trainer), the k3 estimate
        "mismatch/ratio_max": gap.max().exp().item(),
        "mismatch/clipped_frac": (gap.exp() > cap).float().mean().item() if cap else 0.0,
    }


def records(
    step: int,
    rows: list[dict],
    samples: list[Sample],
    texts: list[str],
    scored: list[dict],
    count: int | None = None,
    decode: Callable | None = None,
    **numbers: Tensor,
) -> list[dict]:
    """Rows of samples.jsonl: all, or `count` of them. With `decode`: the texts of each response's
    last MOST_TOKENS, and their `numbers`, (B, T) as in Rollout."""
    every = math.ceil(len(rows) / (count or len(rows)))
    out = []
    for b in range(0, len(rows), every):
        record = {
            "step": step,
            "id": rows[b]["id"],
            "prompt": rows[b]["prompt"],
            "response": texts[b],
            "finished": samples[b].finished,
        }
        if decode:
            ids = samples[b].ids[-MOST_TOKENS:]
            end = len(rows[b]["ids"]) + len(samples[b].ids)
            record["tokens"] = [decode([token]) for token in ids]
            for name, x in numbers.items():
                values = x[b, end - len(ids) : end].tolist()
                record[name] = [round(value, 4) for value in values]
        out.append(record | scored[b])
    return out


def show(samples: list[dict]) -> str:
    """Rows of samples.jsonl, for people: what was asked, said and judged; lists of tokens stay in
    the file."""
    lines = []
    for sample in samples:
        judged = []
        for name, value in sample.items():
            if name not in ("prompt", "response", "id") and not isinstance(value, list):
                judged.append(f"{name} {value}")
        lines.append(f"    prompt   {str(sample['prompt'])[-200:]!r}")
        lines.append(f"    response {sample['response']!r}")
        lines.append(f"    judged   {', '.join(judged)}")
    return "\n".join(lines)


def stream(seed: int, step: int, purpose: int) -> int:
    """First of a million sampling seeds that belong to (seed, step, purpose) alone; purpose < 8."""
    return ((seed * 8 + purpose) * 1_000_000 + step) * 1_000_000


def eos_ids(path: str, tokenizer) -> list[int]:
    """Every id that ends a response: the tokenizer's and those of generation_config.json (chat
    models have several)."""
    from transformers import GenerationConfig

    try:
        more = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # the folder has none
        more = None
    more = more if isinstance(more, list) else [more]
    return sorted({i for i in [tokenizer.eos_token_id, *more] if i is not None})


class VLLMSampler:
    """One engine a rank, or one a group of `tp` consecutive ranks. Build it after torch.distributed
    is up.

    `max_len` bounds prompt + response, `max_seqs` what is decoded at once; `gpu_memory` is the
    share of the card for weights and KV cache while awake, `kv_cache_mb` the KV cache on CPU.
    `eos_ids` and the texts `stop` end a response."""

    def __init__(
        self,
        path: str,
        eos_ids: list[int],
        max_len: int,
        max_seqs: int = 256,
        dtype: str = "auto",
        tp: int = 1,
        gpu_memory: float = 0.6,
        kv_cache_mb: int = 256,
        seed: int = 0,
        stop: tuple[str, ...] = (),
    ):
        cuda = torch.cuda.is_available()
        torchrun = dist.is_initialized()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine core lives in this process
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        local_world = os.environ.get("LOCAL_WORLD_SIZE")  # vLLM on CPU overwrites it
        if not cuda:
            _prepare_cpu()
        from vllm import LLM

        special = (
            {"gpu_memory_utilization": gpu_memory}
            if cuda
            else {"kv_cache_memory_bytes": kv_cache_mb << 20}
        )
        if not cuda:  # a prompt fed in two parts makes a seeded request fail there ("Generator does not use offset")
            special |= {
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(4096, max_len),
            }
        try:
            self.llm = LLM(
                path,
                skip_tokenizer_init=not stop,
                load_format="safetensors",  # never a pickle
                dtype=dtype,
                tensor_parallel_size=tp,
                distributed_executor_backend="external_launcher" if torchrun else None,
                enable_sleep_mode=cuda,
                enforce_eager=not cuda,  # CUDA graphs there; on CPU compiling takes a minute and gains nothing
                max_model_len=max_len,
                max_num_seqs=max_seqs,
                seed=seed,  # note: reseeds this process; equal on all ranks
                logprobs_mode="processed_logprobs",  # after temperature, as the trainer computes them
                use_tqdm_on_load=False,
                **special,
            )
        except Exception as error:
            free, total = (x / 2**30 for x in torch.cuda.mem_get_info()) if cuda else (0.0, 0.0)
            text = f"of {total:.1f} GB {free:.1f} are free, --gpu_memory asks for {gpu_memory * total:.1f}: lower it"
            text = text if cuda else "lower --max_new_tokens"
            raise RuntimeError(f"the engine did not start ({text}): {error}") from error
        if local_world is not None:
            os.environ["LOCAL_WORLD_SIZE"] = local_world
        self.eos_ids, self.stop, self.max_len, self.awake = eos_ids, list(stop), max_len, True
        self.rank, self.group = 0, None
        if tp > 1:
            self.rank = dist.get_rank() % tp
            for first in range(
                0, dist.get_world_size(), tp
            ):  # new_group is collective: every rank makes every group
                group = dist.new_group(list(range(first, first + tp)))
                if first <= dist.get_rank() < first + tp:
                    self.group = group

    def sample(
        self,
        prompts: list[list[int]],
        n: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        progress=False,
    ) -> list[Sample]:
        """n samples of every prompt, neighbours together. Sample j of prompt i has seed `seed + i *
        n + j`, so the answer does not depend on what else is in the batch, on the rank, or on
        anybody's random state."""
        from vllm import SamplingParams

        self.wake()
        requests = [(ids, seed + i * n) for i, ids in enumerate(prompts)]
        mine = slice(0, len(requests))
        if (
            self.group is not None
        ):  # ranks of one engine must ask for the same things in the same order
            asked: list = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(asked, requests, group=self.group)
            before = sum(len(a) for a in asked[: self.rank])
            mine = slice(before, before + len(requests))
            requests = [r for a in asked for r in a]
        params = [
            SamplingParams(
                n=n,
                temperature=temperature,
                max_tokens=min(max_new_tokens, self.max_len - len(ids)),
                seed=s,
                stop_token_ids=self.eos_ids,
                ignore_eos=True,
                logprobs=0,
                flat_logprobs=True,
                stop=self.stop,
                include_stop_str_in_output=True,
                detokenize=bool(self.stop),
                skip_special_tokens=False,
            )
            for ids, s in requests
        ]
        self.llm.reset_prefix_cache()  # so that a call depends on nothing before it
        inputs = [{"prompt_token_ids": ids} for ids, _ in requests]
        outputs = (
            self.llm.generate(inputs, params, use_tqdm=progress) if inputs else []
        )  # more ranks than prompts
        return [
            Sample(list(c.token_ids), list(c.logprobs.logprobs), c.finish_reason == "stop")
            for out in outputs[mine]
            for c in out.outputs
        ]

    def load(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """New weights under their Hugging Face names, one at a time from a generator (collective
        for tp > 1: every rank iterates). vLLM fuses q/k/v, slices for its rank, casts and copies in
        place."""
        self.wake()
        self.llm.apply_model(lambda model: model.load_weights(named_tensors))
        self.llm.reset_prefix_cache()

    def sleep(self) -> None:
        """Gives weights and KV cache back to the card. Level 2 keeps no copy: `load` must come
        before `sample`."""
        if self.awake and torch.cuda.is_available():
            self.llm.sleep(level=2)
            self.awake = False

    def wake(self) -> None:
        if not self.awake:
            gc.collect()
            torch.cuda.empty_cache()  # the trainer's cached blocks are in the way
            self.llm.wake_up()
            self.awake = True

    def close(self) -> None:
        """Ends the engine and, with it, torch.distributed: the last call of a run."""
        self.llm.llm_engine.engine_core.shutdown()


@dataclass
class Request:
    """What the samplers are asked for, on all ranks alike. `limit` tokens each; (step, purpose)
    choose the seeds."""

    prompts: list[list[int]]
    n: int
    limit: int
    temperature: float
    step: int
    purpose: int


class Engine:
    """The samplers of all ranks, which are asked together. When one fails, every rank makes a new
    one, with the weights that `rescue(what failed)` gives, and asks again, once.

    A sampler is anything with sample, load, sleep and wake. `close` is called where there is
    one."""

    def __init__(
        self,
        make: Callable,
        rescue: Callable,
        ranks: Ranks,
        seed: int,
        progress: bool = False,
    ):
        self.make = make
        self.rescue = rescue
        self.ranks = ranks
        self.seed = seed
        self.progress = progress
        self.sampler = make()

    def ask(self, request: Request) -> list[Sample]:
        """n samples of each prompt, on all ranks; each rank asks for its share. They are functions
        of (seed, step, purpose) and a prompt's place alone."""
        for attempt in (1, 2):
            samples, error = [], ""
            try:
                samples = self._ask_share(request)
            except Exception as fault:
                error = f"rank {self.ranks.rank}: {type(fault).__name__}: {fault} "
            errors = "".join(everywhere(error, self.ranks))
            if not errors:
                return gather(samples, self.ranks)
            if attempt == 1:
                weights = self.rescue(errors)
                self.sampler = None  # its memory is needed
                self.sampler = self.make()
                self.sampler.load(weights)
        raise RuntimeError(
            f"an engine failed twice on the same prompts; what was trained is saved. {errors}"
        )

    def _ask_share(self, request: Request) -> list[Sample]:
        first = self.ranks.rank * len(request.prompts) // self.ranks.world
        seed = stream(self.seed, request.step, request.purpose) + first * request.n
        return self.sampler.sample(
            share(request.prompts, self.ranks),
            request.n,
            request.limit,
            request.temperature,
            seed,
            self.progress,
        )

    def load(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        self.sampler.load(named_tensors)

    def sleep(self) -> None:
        self.sampler.sleep()

    def close(self) -> None:
        """The last call of a run."""
        close = getattr(self.sampler, "close", None)
        if close:
            close()


def _prepare_cpu() -> None:
    """Two corrections to vLLM 0.32 on CPU, both before the engine is built."""
    import vllm.distributed.device_communicators.cpu_communicator as communicator
    import vllm.model_executor.layers.utils as layers

    # Linear weights are repacked into an opaque handle and emptied, after which load_weights raises
    # and reload_weights leaves a tied lm_head stale. Keep them plain, as vLLM itself does for
    # layers marked _cpu_skip_gemm_dispatch.
    def keep_plain(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    layers.dispatch_cpu_unquantized_gemm = keep_plain

    # Tensor-parallel ranks meet in a shared-memory segment whose name has no run in it: a second
    # run on the machine, or the remains of a killed one, would collide.
    def name(c):
        return f"{os.environ['MASTER_PORT']}-{c.unique_name}-[{'-'.join(map(str, c.ranks))}]-cpushm"

    communicator._CPUSHMDistributed.make_group_name = staticmethod(name)


class TorchSampler:
    """The same in plain PyTorch: a KV cache, left-padded prompts, one forward a token, `max_seqs`
    sequences at once."""

    def __init__(
        self,
        path: str,
        eos_ids: list[int],
        max_len: int,
        max_seqs: int = 256,
        dtype: str = "auto",
        stop: tuple[str, ...] = (),
    ):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
        safe = {"use_safetensors": True, "trust_remote_code": False}
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", **safe
        )
        self.model = model.to(device)
        self.model.requires_grad_(False).eval()
        self.eos_ids, self.max_len, self.max_seqs, self.device = eos_ids, max_len, max_seqs, device
        self.stop, self.tokenizer = stop, AutoTokenizer.from_pretrained(path) if stop else None

    @torch.no_grad()
    def sample(
        self,
        prompts: list[list[int]],
        n: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        progress=False,
    ) -> list[Sample]:
        """As VLLMSampler.sample, with other random numbers for the same seeds."""
        self.wake()
        jobs = [(ids, seed + i * n + j) for i, ids in enumerate(prompts) for j in range(n)]
        chunks = [jobs[s : s + self.max_seqs] for s in range(0, len(jobs), self.max_seqs)]
        if progress:
            from tqdm import tqdm

            chunks = tqdm(chunks, desc="sampling", leave=False)
        return [
            sample
            for chunk in chunks
            for sample in self._decode(chunk, max_new_tokens, temperature)
        ]

    def _decode(
        self, jobs: list[tuple[list[int], int]], max_new_tokens: int, temperature: float
    ) -> list[Sample]:
        width = max(len(ids) for ids, _ in jobs)
        ids = torch.tensor([[0] * (width - len(p)) + p for p, _ in jobs], device=self.device)
        real = torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p, _ in jobs], device=self.device
        )
        limits = [min(max_new_tokens, self.max_len - len(p)) for p, _ in jobs]
        draws = torch.stack(
            [torch.rand(max(limits), generator=torch.Generator().manual_seed(s)) for _, s in jobs]
        )
        cache, tokens, logprobs = None, [], []
        done = torch.zeros(len(jobs), dtype=torch.bool, device=self.device)
        for t in range(max(limits)):
            position = (real.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            out = self.model(ids, attention_mask=real, position_ids=position, past_key_values=cache, use_cache=True,
                             logits_to_keep=1)  # fmt: skip
            cache = out.past_key_values
            logp = torch.log_softmax(
                out.logits[:, -1].float() / (temperature or 1.0), dim=-1
            )  # (B, V)
            if temperature:  # inverse-CDF sampling with the sequence's own uniform number
                cdf = logp.exp().double().cumsum(-1)
                draw = draws[:, t, None].to(cdf) * cdf[:, -1:]
                ids = torch.searchsorted(cdf, draw, right=True).clamp(max=logp.shape[1] - 1)
            else:
                ids = logp.argmax(-1, keepdim=True)
            tokens.append(ids[:, 0])
            logprobs.append(logp.gather(1, ids)[:, 0])
            real = torch.cat([real, torch.ones_like(ids)], dim=1)
            done |= torch.isin(ids[:, 0], torch.tensor(self.eos_ids, device=self.device))
            for i in (~done).nonzero()[:, 0].tolist() if self.stop else ():
                done[i] = self._stops([step[i].item() for step in tokens])
            if done.all():
                break
        samples = []
        for row, logp, limit in zip(
            torch.stack(tokens, 1).tolist(), torch.stack(logprobs, 1).tolist(), limits
        ):
            ends = (
                t + 1
                for t, token in enumerate(row[:limit])
                if token in self.eos_ids or self._stops(row[: t + 1])
            )
            end = next(ends, None)
            length = end or min(limit, len(row))
            samples.append(Sample(row[:length], logp[:length], end is not None))
        return samples

    def _stops(self, ids: list[int]) -> bool:
        """Do these tokens complete one of the texts that end a response?"""
        longest = max(
            map(len, self.stop), default=0
        )  # a token is at least a byte, a character at most four
        return bool(self.stop) and any(
            s in self.tokenizer.decode(ids[-4 * longest - 4 :]) for s in self.stop
        )

    @torch.no_grad()
    def load(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        mine = dict(self.model.named_parameters())
        for name, tensor in named_tensors:
            mine.pop(name).copy_(tensor)
        if mine:
            raise RuntimeError(
                f"no new weights came for {sorted(mine)}: the engine would answer with stale ones"
            )

    def sleep(self) -> None:
        self.model.to("cpu")

    def wake(self) -> None:
        self.model.to(self.device)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def make_sampler(
    engine: str,
    path: str,
    eos_ids: list[int],
    tp: int = 1,
    gpu_memory: float = 0.6,
    seed: int = 0,
    **both,
) -> VLLMSampler | TorchSampler:
    """`both` is what either engine takes: max_len, max_seqs, dtype, stop."""
    gc.collect()  # one that failed before may still hold memory, in cycles
    if engine == "vllm":
        return VLLMSampler(path, eos_ids, tp=tp, gpu_memory=gpu_memory, seed=seed, **both)
    if engine == "torch":
        return TorchSampler(path, eos_ids, **both)
    raise ValueError(f"engine={engine!r}: use 'vllm' or 'torch'")
