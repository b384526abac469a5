"""What the server of tests/launch.py has imported before it forks: libraries, nothing of ours, nothing with a thread.
Left out on purpose: `datasets`. It reads the folder of its cache when it is imported, and that is the job's to say."""

import gc
import os
import sys

sys.modules["kernels"] = None  # as at the top of ppo.py
import transformers.integrations.hub_kernels  # noqa: F401

del sys.modules["kernels"]
import accelerate.utils.fsdp_utils  # noqa: F401
import hypothesis  # noqa: F401
import pytest  # noqa: F401
import torch.distributed.launcher.api  # noqa: F401
import torch.optim  # noqa: F401
import transformers.models.qwen2.modeling_qwen2  # noqa: F401
import tyro  # noqa: F401
import vllm.v1.engine.llm_engine  # noqa: F401

gc.freeze()  # a job's garbage collector need not look at all that: 0.3 s each time
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a library counts its leaks when the server ends
