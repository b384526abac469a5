#!/usr/bin/env bash
# The one test command. It sets up .venv when there is none.
#
#   bash tests/run.sh                                # what CI runs: under 8 minutes on 2 cores
#   bash tests/run.sh --all                          # also what takes long, and the planted bugs: under an hour
#   bash tests/run.sh tests/test_math.py -k gae      # other arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
bash run_cpu.sh --setup
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
export HF_HUB_OFFLINE=1 VLLM_LOGGING_LEVEL=ERROR TORCH_CPP_LOG_LEVEL=ERROR PYTHONWARNINGS=ignore
tests=(tests/test_train.py tests) # the longest file first: else one core waits for it at the end
for word in "$@"; do
  [[ $word == tests/* ]] && tests=()
done
python -m pytest "${tests[@]}" -q -ra --durations=10 -n 2 --dist loadfile --no-loadscope-reorder "$@"
if [[ " $* " == *" --all "* ]]; then
  python tests/planted.py
fi
