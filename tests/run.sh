#!/usr/bin/env bash
# The one test command: sets up .venv when there is none, then runs every test. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash run_cpu.sh --setup
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
export HF_HUB_OFFLINE=1 VLLM_LOGGING_LEVEL=ERROR TORCH_CPP_LOG_LEVEL=ERROR PYTHONWARNINGS=ignore
exec python -m pytest tests -q -ra --durations=10 "$@"
