"""Token ids in, sampled token ids and their log-probs out; weights in; memory given back.

Owns: two engines with the same four methods, sample / load / sleep / wake, and no base class.
VLLMSampler is vLLM in the trainer's own process. TorchSampler is plain PyTorch with a KV cache: for
teaching, for debugging, and as a second opinion in the tests. Anything with these methods is an
engine: `make_sampler` is the place to name a new one.
Refuses to know: rewards, losses, datasets, text. Ids are never decoded and re-encoded on the way to
the trainer.
Left out on purpose: which prompts are answered again (`refill` in ppo.py), whether the weights
arrived (the canary of `sync`, there, too), and top_p and top_k: they change the distribution
sampled from, and with it every ratio in the loss.
"""

import gc
import math
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from infra.dist import Ranks, everywhere, gather, share

Prompts = list[list[int]]  # token ids
Weights = Iterable[tuple[str, Tensor]]  # by their Hugging Face names


class Sample(NamedTuple):
    """One response."""

    # ends with an EOS id, or completes a stop text, if and only if `finished`
    ids: list[int]
    # of each id under the engine's weights at the sampling temperature (at 1 when greedy)
    logprobs: list[float]
    finished: bool  # the model chose to stop; False: cut at max_new_tokens


Samples = list[Sample]
MOST_TOKENS = 2048  # of a response in samples.jsonl, one by one


class Rollout(NamedTuple):
    """The samples of one step as tensors; index t of each is about token t."""

    ids: Tensor  # (B, T) long: prompt + response, right-padded with 0
    # (B, T) bool: the policy chose this token; EOS included. Made from lengths, never from ids
    mask: Tensor
    engine_logprobs: Tensor  # (B, T) fp32, 0 outside the mask
    lengths: list[int]  # B, prompt + response


def collate(prompts: Prompts, samples: Samples, device="cpu") -> Rollout:
    """One row for each (prompt, sample) pair."""
    ids, mask, logprobs = [], [], []
    for prompt, sample in zip(prompts, samples, strict=True):
        ids.append(torch.tensor(prompt + sample.ids))
        mask.append(torch.tensor([False] * len(prompt) + [True] * len(sample.ids)))
        logprobs.append(torch.tensor([0.0] * len(prompt) + sample.logprobs))
    padded = [pad_sequence(rows, batch_first=True).to(device) for rows in (ids, mask, logprobs)]
    return Rollout(*padded, [len(row) for row in ids])


def summary(samples: Samples, seconds: float) -> dict:
    lengths = [len(s.ids) for s in samples]
    return {
        "rollout/length_mean": sum(lengths) / len(lengths),
        "rollout/length_max": max(lengths),
        "rollout/truncated_frac": sum(not s.finished for s in samples) / len(samples),
        "rollout/tokens_per_s": sum(lengths) / seconds,
    }


def mismatch(trainer: Tensor, engine: Tensor, cap: float) -> dict:
    """How far the engine's log-probs of its samples are from the trainer's, both (K,); `cap`
    truncates the ratio, 0 does not."""
    gap = trainer - engine
    ratio = gap.exp()
    return {
        "mismatch/logp_abs_mean": gap.abs().mean().item(),
        "mismatch/logp_abs_max": gap.abs().max().item(),
        # KL(engine || trainer), the k3 estimate
        "mismatch/kl": (ratio - 1 - gap).mean().item(),
        "mismatch/ratio_max": gap.max().exp().item(),
        "mismatch/clipped_frac": (ratio > (cap or math.inf)).float().mean().item(),
    }


def records(
    step: int,
    rows: list[dict],
    samples: Samples,
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
        row, sample = rows[b], samples[b]
        record = {
            "step": step,
            "id": row["id"],
            "prompt": row["prompt"],
            "response": texts[b],
            "finished": sample.finished,
        }
        if decode:
            ids = sample.ids[-MOST_TOKENS:]
            end = len(row["ids"]) + len(sample.ids)
            record["tokens"] = [decode([token]) for token in ids]
            for name, x in numbers.items():
                record[name] = [round(value, 4) for value in x[b, end - len(ids) : end].tolist()]
        out.append(record | scored[b])
    return out


def show(samples: list[dict]) -> str:
    """Rows of samples.jsonl, for people: what was asked, said and judged; lists of tokens stay in
    the file."""
    lines = []
    for sample in samples:
        judged = [
            f"{name} {value}"
            for name, value in sample.items()
            if name not in ("prompt", "response", "id") and not isinstance(value, list)
        ]
        lines += [
            f"    prompt   {str(sample['prompt'])[-200:]!r}",
            f"    response {sample['response']!r}",
            f"    judged   {', '.join(judged)}",
        ]
    return "\n".join(lines)


def stream(seed: int, step: int, purpose: int) -> int:
    """First of a million sampling seeds that belong to (seed, step, purpose) alone; purpose < 8."""
    return ((seed * 8 + purpose) * 1_000_000 + step) * 1_000_000


def eos_ids(path: str, tokenizer) -> list[int]:
    """Every id that ends a response: the tokenizer's and those of generation_config.json (chat
    models have several)."""
    from transformers import GenerationConfig

    found = {tokenizer.eos_token_id}
    with suppress(OSError):  # the folder has none
        more = GenerationConfig.from_pretrained(path).eos_token_id
        found |= set(more) if isinstance(more, list) else {more}
    return sorted(found - {None})


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
        self.eos_ids = eos_ids
        self.stop = list(stop)
        self.max_len = max_len
        self.awake = True
        cuda = torch.cuda.is_available()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine core lives in this process
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        local_world = os.environ.get("LOCAL_WORLD_SIZE")  # vLLM on CPU overwrites it
        if cuda:
            options = {"gpu_memory_utilization": gpu_memory}
        else:
            _prepare_cpu()
            options = {
                "kv_cache_memory_bytes": kv_cache_mb << 20,
                # a prompt fed in two parts makes a seeded request fail there ("Generator does not
                # use offset")
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(4096, max_len),
            }
        from vllm import LLM

        if dist.is_initialized():
            options["distributed_executor_backend"] = "external_launcher"
        try:
            self.llm = LLM(
                path,
                skip_tokenizer_init=not stop,
                load_format="safetensors",  # never a pickle
                dtype=dtype,
                tensor_parallel_size=tp,
                enable_sleep_mode=cuda,
                # CUDA graphs there; on CPU compiling takes a minute and gains nothing
                enforce_eager=not cuda,
                max_model_len=max_len,
                max_num_seqs=max_seqs,
                seed=seed,  # note: reseeds this process; equal on all ranks
                # after temperature, as the trainer computes them
                logprobs_mode="processed_logprobs",
                use_tqdm_on_load=False,
                **options,
            )
        except Exception as error:
            advice = "lower --max_new_tokens"
            if cuda:
                free, total = torch.cuda.mem_get_info()
                advice = (
                    f"of {total / 2**30:.1f} GB {free / 2**30:.1f} are free, "
                    f"--gpu_memory asks for {gpu_memory * total / 2**30:.1f}: lower it"
                )
            raise RuntimeError(f"the engine did not start ({advice}): {error}") from error
        if local_world is not None:
            os.environ["LOCAL_WORLD_SIZE"] = local_world
        self.group = None  # the ranks that share this engine
        if tp > 1:
            self.group, _ = dist.new_subgroups(tp)

    def sample(
        self,
        prompts: Prompts,
        n: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        progress: bool = False,
    ) -> Samples:
        """n samples of every prompt, neighbours together. Sample j of prompt i has seed
        `seed + i * n + j`, so the answer does not depend on what else is in the batch, on the rank,
        or on anybody's random state."""
        from vllm import SamplingParams

        self.wake()
        requests = [(ids, seed + i * n) for i, ids in enumerate(prompts)]
        first = 0  # of this rank's own requests
        if self.group is not None:  # ranks of one engine must ask for the same things in one order
            asked = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(asked, requests, group=self.group)
            first = sum(len(part) for part in asked[: dist.get_rank(self.group)])
            requests = [request for part in asked for request in part]
        if not requests:  # more ranks than prompts
            return []
        inputs = [{"prompt_token_ids": ids} for ids, _ in requests]
        params = [
            SamplingParams(
                n=n,
                temperature=temperature,
                max_tokens=min(max_new_tokens, self.max_len - len(ids)),
                seed=first_seed,
                # so EOS stays in the answer, and its log-prob with it
                stop_token_ids=self.eos_ids,
                ignore_eos=True,
                logprobs=0,
                flat_logprobs=True,
                stop=self.stop,
                include_stop_str_in_output=True,
                detokenize=bool(self.stop),
                skip_special_tokens=False,
            )
            for ids, first_seed in requests
        ]
        self.llm.reset_prefix_cache()  # so that a call depends on nothing before it
        outputs = self.llm.generate(inputs, params, use_tqdm=progress)
        return [
            Sample(
                list(completion.token_ids),
                list(completion.logprobs.logprobs),
                completion.finish_reason == "stop",
            )
            for output in outputs[first : first + len(prompts)]
            for completion in output.outputs
        ]

    def load(self, named_tensors: Weights):
        """New weights under their Hugging Face names, one at a time from a generator (collective
        for tp > 1: every rank iterates). vLLM fuses q/k/v, slices for its rank, casts and copies in
        place."""
        self.wake()
        self.llm.apply_model(lambda model: model.load_weights(named_tensors))
        self.llm.reset_prefix_cache()

    def sleep(self):
        """Gives weights and KV cache back to the card. Level 2 keeps no copy: `load` must come
        before `sample`."""
        if self.awake and torch.cuda.is_available():
            self.llm.sleep(level=2)
            self.awake = False

    def wake(self):
        if not self.awake:
            gc.collect()
            torch.cuda.empty_cache()  # the trainer's cached blocks are in the way
            self.llm.wake_up()
            self.awake = True

    def drop(self):
        """Gives its memory to the next engine of this process. Left to itself, vLLM ends
        torch.distributed, the trainer's too, as soon as nothing refers to its client."""
        client = self.llm.llm_engine.engine_core
        client._finalizer.detach()
        client.engine_core.model_executor.shutdown()
        self.llm = None

    def close(self):
        """Ends the engine and, with it, torch.distributed: the last call of a run."""
        self.llm.llm_engine.engine_core.shutdown()


@dataclass
class Engine:
    """The samplers of all ranks, which are asked together. When one fails, every rank makes a new
    one, with the weights that `rescue(what failed)` gives, and asks again, once.

    A sampler is anything with sample, load, sleep and wake. `drop` and `close` are called where
    there are any."""

    make: Callable
    rescue: Callable
    ranks: Ranks
    seed: int
    progress: bool

    def __post_init__(self):
        self.sampler = self.make()

    def ask(
        self,
        prompts: Prompts,
        n: int,
        limit: int,
        temperature: float,
        step: int,
        purpose: int,
    ) -> Samples:
        """n samples of at most `limit` tokens for each prompt, on all ranks; each rank asks for its
        share. They are functions of (seed, step, purpose) and a prompt's place alone."""
        ranks = self.ranks
        first = ranks.rank * len(prompts) // ranks.world  # of this rank's share
        seed = stream(self.seed, step, purpose) + first * n
        for attempt in (1, 2):
            samples, error = [], ""
            try:
                mine = share(prompts, ranks)
                samples = self.sampler.sample(mine, n, limit, temperature, seed, self.progress)
            except Exception as fault:
                error = f"rank {ranks.rank}: {type(fault).__name__}: {fault} "
            errors = "".join(everywhere(error, ranks))
            if not errors:
                return gather(samples, ranks)
            if attempt == 1:
                weights = self.rescue(errors)
                drop = getattr(self.sampler, "drop", None)
                if drop:
                    drop()
                self.sampler = None  # its memory is needed
                self.sampler = self.make()
                self.sampler.load(weights)
        raise RuntimeError(
            f"an engine failed twice on the same prompts; what was trained is saved. {errors}"
        )

    def load(self, named_tensors: Weights):
        self.sampler.load(named_tensors)

    def sleep(self):
        self.sampler.sleep()

    def close(self):
        """The last call of a run; afterwards there is no torch.distributed."""
        close = getattr(self.sampler, "close", None)
        if close:
            close()
        elif dist.is_initialized():
            dist.destroy_process_group()


def _prepare_cpu():
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
        stop=(),
    ):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
        )
        self.model = model.to(self.device).requires_grad_(False).eval()
        self.eos_ids = torch.tensor(eos_ids, device=self.device)
        self.max_len = max_len
        self.max_seqs = max_seqs
        self.stop = stop
        # tokens that hold any of them: a token is at least a byte, a character at most four
        self.ending = 4 * max(map(len, stop), default=0) + 4
        self.tokenizer = AutoTokenizer.from_pretrained(path) if stop else None

    @torch.no_grad()
    def sample(
        self,
        prompts,
        n,
        max_new_tokens,
        temperature,
        seed,
        progress=False,
    ):
        """As VLLMSampler.sample, with other random numbers for the same seeds."""
        self.wake()
        jobs = [(ids, seed + i * n + j) for i, ids in enumerate(prompts) for j in range(n)]
        starts = range(0, len(jobs), self.max_seqs)
        if progress:
            from tqdm import tqdm

            starts = tqdm(starts, "sampling", leave=False)
        samples = []
        for start in starts:
            chunk = jobs[start : start + self.max_seqs]
            samples += self._decode(chunk, max_new_tokens, temperature)
        return samples

    def _decode(self, jobs, max_new_tokens, temperature) -> Samples:
        """One response for each (prompt, seed)."""
        prompts = [torch.tensor(prompt, device=self.device) for prompt, _ in jobs]
        ids = pad_sequence(prompts, batch_first=True, padding_side="left")
        ones = [torch.ones_like(prompt) for prompt in prompts]
        # (B, tokens so far): 0 is padding
        real = pad_sequence(ones, batch_first=True, padding_side="left")
        limits = [min(max_new_tokens, self.max_len - len(prompt)) for prompt in prompts]
        generators = [torch.Generator().manual_seed(seed) for _, seed in jobs]
        # (B, t), a response's own uniform numbers
        draws = torch.stack([torch.rand(max(limits), generator=one) for one in generators])

        cache = None
        done = torch.zeros(len(jobs), dtype=torch.bool, device=self.device)
        tokens, logprobs = [], []  # of each step, (B, 1)
        for t in range(max(limits)):
            position = (real.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            out = self.model(
                ids,
                attention_mask=real,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            logits = out.logits[:, -1].float() / (temperature or 1.0)
            logp = torch.log_softmax(logits, dim=-1)  # (B, V)
            if temperature:
                ids = _draw(logp, draws[:, t, None])
            else:
                ids = logp.argmax(-1, keepdim=True)
            tokens.append(ids)
            logprobs.append(logp.gather(1, ids))
            real = torch.cat([real, torch.ones_like(ids)], dim=1)
            done |= torch.isin(ids[:, 0], self.eos_ids)
            if self.stop:
                recent = torch.cat(tokens[-self.ending :], dim=1).tolist()
                for b in (~done).nonzero()[:, 0].tolist():
                    done[b] = self._stops(recent[b])
            if done.all():
                break
        drawn = [torch.cat(columns, dim=1).tolist() for columns in (tokens, logprobs)]
        return list(map(self._cut, *drawn, limits))

    def _cut(self, tokens, logprobs, limit) -> Sample:
        """What comes after the end of a response is not part of it."""
        end_ids = self.eos_ids.tolist()
        for length, token in enumerate(tokens[:limit], 1):
            if token in end_ids or self._stops(tokens[:length]):
                return Sample(tokens[:length], logprobs[:length], True)
        return Sample(tokens[:limit], logprobs[:limit], False)

    def _stops(self, ids) -> bool:
        """Do these tokens complete one of the texts that end a response?"""
        if not self.stop:
            return False
        ending = self.tokenizer.decode(ids[-self.ending :])
        return any(text in ending for text in self.stop)

    @torch.no_grad()
    def load(self, named_tensors: Weights):
        mine = dict(self.model.named_parameters())
        for name, tensor in named_tensors:
            mine.pop(name).copy_(tensor)
        if mine:
            raise RuntimeError(
                f"no new weights came for {sorted(mine)}: the engine would answer with stale ones"
            )

    def sleep(self):
        self.model.to("cpu")

    def wake(self):
        self.model.to(self.device)

    def close(self):
        if dist.is_initialized():
            dist.destroy_process_group()


def _draw(logp, uniform):
    """Inverse-CDF sampling: logp (B, V), a number in [0, 1) for each row (B, 1) -> ids (B, 1)."""
    cdf = logp.exp().double().cumsum(-1)
    target = uniform.to(cdf) * cdf[:, -1:]
    return torch.searchsorted(cdf, target, right=True).clamp(max=logp.shape[1] - 1)


def make_sampler(
    engine: str,
    path: str,
    eos_ids: list[int],
    tp: int = 1,
    gpu_memory: float = 0.6,
    seed: int = 0,
    **both,
):
    """`both` is what either engine takes: max_len, max_seqs, dtype, stop."""
    gc.collect()  # one that failed before may still hold memory, in cycles
    if engine == "vllm":
        return VLLMSampler(path, eos_ids, tp=tp, gpu_memory=gpu_memory, seed=seed, **both)
    if engine == "torch":
        return TorchSampler(path, eos_ids, **both)
    raise ValueError(f"engine={engine!r}: use 'vllm' or 'torch'")


# -------------------------------------------------------------------------------- python rollout.py


def demo(
    model: str,
    prompt: str,
    engine: Literal["vllm", "torch"] = "vllm",
    template: Literal["base", "chat"] = "base",
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
):
    """Samples one answer and shows it token by token, each with its log-prob in nats. --model: a
    Hugging Face folder or hub id; --template chat: the prompt as a message, for instruct models."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    text = prompt
    if template == "chat":
        message = {"role": "user", "content": prompt}
        text = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=template == "base")["input_ids"]
    ends = eos_ids(model, tokenizer)
    sampler = make_sampler(engine, model, ends, max_len=len(ids) + max_new_tokens)
    (sample,) = sampler.sample([ids], 1, max_new_tokens, temperature, seed)
    sampler.close()
    print(f"prompt    {text!r} ({len(ids)} tokens)\nanswer    {tokenizer.decode(sample.ids)!r}")
    print(f"finished  {sample.finished} (False: cut at --max_new_tokens {max_new_tokens})")
    print(f"log-prob  {sum(sample.logprobs):.3f} nats, token by token:")
    for token, logprob in zip(sample.ids, sample.logprobs):
        print(f"{logprob:8.3f}  {tokenizer.decode([token])!r}")


if __name__ == "__main__":
    import sys

    import tyro

    del sys.path[0]  # as in data.py: the name of this folder's kernels.py
    tyro.cli(demo, use_underscores=True)
