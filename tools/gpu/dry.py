"""What can be shown without a card about a staged release of vLLM on the GPU machine's torch, Triton:

    python dry.py UNPACKED VERSION MODEL [config] [model] [compile] [triton]

UNPACKED is where assemble.sh put it (STAGE=... PYTHON=... bash tools/gpu/assemble.sh), this Python one
of a virtual environment with the versions of the GPU machine: torch 2.11.0 (its CUDA build), triton
3.6.0, transformers 5.17.0, numpy 2.5.2. Parts, each a fresh process:

    config   the pruned libraries load and register their operators; rollout.py's arguments are taken
    model    Qwen2 as vLLM builds it for CUDA, on the CPU: weights, a forward, new weights, a forward
    compile  the same through vLLM's own torch.compile backend (Inductor makes C++ in place of Triton)
    triton   the kernels of the GPU runner (sampler, log-probs, inputs), compiled for 9.0

torch is told that a card is there as far as imports and configuration ask, and an empty libcuda.so.1
is built with gcc.
"""

import os
import re
import subprocess
import sys
import tempfile
import types

PARTS = ("config", "model", "compile", "triton")

# --------------------------------------------------------------- the driver: one process for a part


def empty_libcuda(folder: str, libraries: list[str]) -> None:
    """A libcuda.so.1 that has every function which the libraries ask for, and does nothing."""
    names = set()
    for library in libraries:
        listed = subprocess.run(["objdump", "-T", library], capture_output=True, text=True)
        for name in re.findall(r"\*UND\*.*\s(cu[A-Z]\w+)$", listed.stdout, re.M):
            if not name.startswith(("cublas", "cudnn")):
                names.add(name)
    with open(f"{folder}/stub.c", "w") as file:
        for name in sorted(names):
            file.write(f"int {name}(void) {{ return 100; }}\n")
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, "-o", f"{folder}/libcuda.so.1", f"{folder}/stub.c"], check=True)


def drive(unpacked: str, version: str, model: str, parts: list[str]) -> int:
    folder = tempfile.mkdtemp()
    places = [f"{place}/torch/lib" for place in sys.path]
    torch_lib = next(place for place in places if os.path.exists(place))
    tree = f"{unpacked}/vllm-{version}/vllm"
    libraries = [
        f"{torch_lib}/libtorch_cuda.so",
        f"{torch_lib}/libc10_cuda.so",
        f"{tree}/_C_stable_libtorch.abi3.so",
        f"{tree}/cumem_allocator.abi3.so",
        f"{tree}/vllm_flash_attn/_vllm_fa3_C.abi3.so",
    ]
    empty_libcuda(folder, libraries)
    environment = os.environ | {
        "LIBCUDA_STUB": folder,
        "LD_LIBRARY_PATH": folder,
        "PYTHONPATH": f"{unpacked}/vllm-{version}:{unpacked}/base",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": f"{folder}/vllm",
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        "TRITON_CACHE_DIR": f"{folder}/triton",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29533",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    codes = {}
    for part in parts:
        command = [sys.executable, __file__, unpacked, version, model, part]
        codes[part] = subprocess.run(command, env=environment).returncode
    print(codes)
    return int(any(codes.values()))


# ------------------------------------------------------------------------------- one part


def pretend_card() -> None:
    import torch

    card = types.SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        total_memory=80 << 30,
        multi_processor_count=132,
        L2_cache_size=50 << 20,
        warp_size=32,
        max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65536,
        is_integrated=False,
        gcnArchName="",
        shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472,
        uuid="0",
    )
    answers = {
        "is_available": True,
        "device_count": 1,
        "get_device_capability": (9, 0),
        "get_device_name": card.name,
        "get_device_properties": card,
        "mem_get_info": (79 << 30, 80 << 30),
        "current_device": 0,
        "set_device": None,
        "synchronize": None,
        "_lazy_init": None,
        "reset_peak_memory_stats": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer: answer)


def pretend_driver() -> None:
    """Triton compiles for it, and launches nothing."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    properties = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    class Nothing:
        utils = types.SimpleNamespace(
            get_device_properties=lambda _: properties,
            load_binary=lambda *_: (1, 1, 32, 0, 1024),
        )
        launcher_cls = staticmethod(lambda *_: lambda *args, **named: None)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda *_: 0)
        get_current_stream = staticmethod(lambda *_: 0)
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

    driver.set_active(Nothing())


def pretend_platform(on_cpu: bool) -> None:
    """on_cpu: vLLM's operators for CUDA shall take tensors on the CPU."""
    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform

    platform = NonNvmlCudaPlatform()
    vllm.platforms._current_platform = vllm.platforms.current_platform = platform
    if on_cpu:
        platform.dispatch_key = "CPU"


def part_triton(version: str) -> None:
    import torch
    from vllm.v1.worker.gpu import input_batch
    from vllm.v1.worker.gpu.sample import gumbel, logprob

    def ints(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.int32)

    def longs(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.int64)

    logits = torch.zeros(8, 1000)
    drafting = {"is_drafting": False} if version == "0.32.0" else {}
    scores = getattr(logprob, "compute_topk_scores", None) or logprob.compute_topk_logprobs
    seeds = (longs(8), longs(8))
    gumbel.apply_temperature(logits, ints(8), torch.zeros(8))
    gumbel.gumbel_sample(
        logits, ints(8), torch.zeros(8), *seeds, apply_temperature=False, **drafting
    )
    scores(logits, 0, longs(8))
    eight = ints(8)
    input_batch.prepare_prefill_inputs(eight, ints(8), ints(8), ints(9), ints(8, 64), eight, eight)
    input_batch.prepare_pos_seq_lens(ints(8), ints(9), ints(8), longs(8), ints(8))
    input_batch.combine_sampled_and_draft_tokens(
        ints(8), ints(8), longs(8), ints(9), ints(8), ints(8), longs(8, 1), ints(9), 8
    )
    input_batch.post_update(
        ints(8),
        ints(8),
        longs(8),
        None,
        longs(8, 1),
        ints(8),
        ints(8),
        ints(9),
        ints(8, 64),
        ints(8),
    )
    input_batch.expand_idx_mapping(ints(8), 8, ints(9), 1)
    input_batch.get_num_sampled_and_rejected(ints(8), ints(8), ints(9), ints(8), ints(8))
    compiled = 0
    for _, _, files in os.walk(os.environ["TRITON_CACHE_DIR"]):
        compiled += sum(name.endswith(".cubin") for name in files)
    print(f"triton: ok, {compiled} kernels")


def engine_config(model: str, part: str):
    """As rollout.py asks for it; its sampling parameters too."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs

    more = {"enforce_eager": False}
    if part == "model":
        more = {"enforce_eager": True, "compilation_config": {"custom_ops": ["none"]}}
    SamplingParams(
        n=4,
        temperature=1.0,
        max_tokens=9,
        seed=1,
        stop_token_ids=[1],
        ignore_eos=True,
        logprobs=0,
        flat_logprobs=True,
        stop=[],
        include_stop_str_in_output=True,
        detokenize=False,
        skip_special_tokens=False,
    )
    arguments = EngineArgs(
        model=model,
        skip_tokenizer_init=True,
        load_format="safetensors",
        dtype="bfloat16",
        tensor_parallel_size=1,
        distributed_executor_backend="external_launcher",
        enable_sleep_mode=True,
        max_model_len=200,
        max_num_seqs=256,
        seed=0,
        logprobs_mode="processed_logprobs",
        gpu_memory_utilization=0.6,
        use_tqdm_on_load=False,
        **more,
    )
    return arguments.create_engine_config()


def part_config(config, version: str) -> None:
    import torch
    import vllm._custom_ops  # noqa: F401
    import vllm.cumem_allocator
    import vllm.model_executor.models.qwen2
    import vllm.model_executor.warmup.kernel_warmup as warmup
    import vllm.v1.engine.core
    import vllm.v1.executor.uniproc_executor
    import vllm.v1.worker.gpu.model_runner
    import vllm.v1.worker.gpu_worker  # noqa: F401
    from vllm.vllm_flash_attn.flash_attn_interface import is_fa_version_supported

    for operator in (
        "_C::rms_norm",
        "_C::silu_and_mul",
        "_C::rotary_embedding",
        "_C_cache_ops::reshape_and_cache_flash",
        "_vllm_fa3_C::fwd",
    ):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CUDA"), operator
    assert is_fa_version_supported(3)
    if version == "0.32.0":
        warmup._warmup_ll_bf16_router_gemm(torch.nn.Linear(2, 2))
    compilation = config.compilation_config
    print(
        f"config: ok, V2 runner {config.use_v2_model_runner}, {compilation.mode}, "
        f"{compilation.cudagraph_mode}, async {config.scheduler_config.async_scheduling}"
    )


def part_model(part: str, config, folder: str) -> None:
    """Eager, or compiled."""
    import torch
    from safetensors.torch import load_file
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model

    config.device_config.device = torch.device("cpu")
    with set_current_vllm_config(config), torch.no_grad():
        init_distributed_environment(1, 0, "tcp://127.0.0.1:29517", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        torch.set_default_dtype(torch.bfloat16)
        made = initialize_model(vllm_config=config).eval()
        torch.set_default_dtype(torch.float32)
        get_model_loader(config.load_config).load_weights(made, config.model_config)

        def forward(tokens: int) -> torch.Tensor:
            with set_forward_context(None, config, num_tokens=tokens):
                return made(torch.arange(tokens), torch.arange(tokens)).float()

        forward(16)
        first = forward(24)
        weights = load_file(f"{folder}/model.safetensors")
        made.load_weights((name, (2 * x).to(torch.bfloat16)) for name, x in weights.items())
        moved = (forward(24) - first).abs().mean().item()
    attention = {type(module.impl).__name__ for module in made.modules() if hasattr(module, "impl")}
    mode = config.compilation_config.mode
    print(f"{part}: ok, {attention}, mode {mode}; new weights move the output by {moved:.2f}")
    assert moved > 0.1


def run_part(part: str, version: str, model: str) -> None:
    pretend_card()
    if part == "triton":
        pretend_driver()
    pretend_platform(on_cpu=part in ("model", "compile"))
    import torch
    import vllm
    from vllm import LLM, SamplingParams  # noqa: F401  what rollout.py imports

    print(f"{part}: vllm {vllm.__version__}, torch {torch.__version__}")
    if part == "triton":
        part_triton(version)
        return
    config = engine_config(model, part)
    if part == "config":
        part_config(config, version)
        return
    torch.cuda.is_available = lambda: False
    torch.cuda.device_count = lambda: 0
    part_model(part, config, model)


if __name__ == "__main__":
    unpacked, version, model, *parts = sys.argv[1:]
    if "LIBCUDA_STUB" not in os.environ:
        sys.exit(drive(unpacked, version, model, parts or list(PARTS)))
    run_part(parts[0], version, model)
