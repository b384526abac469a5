#!/usr/bin/env bash
# Everything that only a GPU can show, in one command on one card and in less than nine minutes:
#
#   bash tools/gpu/gpu.sh                            # log; table.md and gpu.json in runs/gpu
#   bash tools/gpu/gpu.sh --device cpu --minutes 4   # the same code at tiny sizes, for rehearsal: times mean nothing
#
# It installs nothing. PYTHON names the Python; what that one lacks is skipped, and said. Flags: gpu.py -h.
set -euo pipefail
cd "$(dirname "$0")/../.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore TORCH_CPP_LOG_LEVEL=ERROR
export VLLM_LOGGING_LEVEL=ERROR OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"  # the CPU works in references, offload
# Packed rows come in all sizes. vLLM's sleep mode turns this off around its own pool, from 0.32 on: see gpu.py.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
nvidia-smi --query-gpu=name,memory.total,memory.used,driver_version --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
exec "${PYTHON:-python3}" tools/gpu/gpu.py "$@"
