#!/usr/bin/env bash
# The reference runs. Each reproduces the settings of a published run (named beside each flag); docs/scaling.md has the
# memory they need. Nothing in here has been measured on GPUs yet.
#
#   pip install -r requirements.txt
#   bash run_4xh100.sh                                        # R1-Distill-Qwen-1.5B on Eurus-2 math and code, 4 GPUs
#   RECIPE=countdown-0.5b        bash run_4xh100.sh           # Qwen2.5-0.5B on Countdown, 1 GPU
#   RECIPE=countdown-3b          bash run_4xh100.sh           # Qwen2.5-3B on Countdown, 2 GPUs
#   RECIPE=countdown-3b-instruct bash run_4xh100.sh           # Qwen2.5-3B-Instruct with its chat template, 2 GPUs
#   bash run_4xh100.sh --plan 4 80                            # will it fit? needs no GPU
#   bash run_4xh100.sh --steps 0 --eval_every 0               # loads everything, samples and scores one batch
#
#   NNODES=2 HEAD=node0:29500 bash run_4xh100.sh --replicas 2  # on each of two nodes that share this folder
#
# Flags after the script's name win over its own. So do N_GPUS, BASE_MODEL, CRITIC_MODEL, DATA_DIR (files instead of the
# hub), EXPERIMENT_NAME and ROLLOUT_TP_SIZE.
set -euo pipefail
cd "$(dirname "$0")"

RECIPE=${RECIPE:-eurus-1.5b}
case $RECIPE in
  eurus-1.5b)            gpus=4 tp=1 model=deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B ;;
  countdown-0.5b)        gpus=1 tp=1 model=Qwen/Qwen2.5-0.5B ;;
  countdown-3b)          gpus=2 tp=2 model=Qwen/Qwen2.5-3B ;;
  countdown-3b-instruct) gpus=2 tp=2 model=Qwen/Qwen2.5-3B-Instruct ;;
  *) echo "RECIPE=$RECIPE: use eurus-1.5b, countdown-0.5b, countdown-3b or countdown-3b-instruct"; exit 1 ;;
esac
BASE_MODEL=${BASE_MODEL:-$model}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}              # a GPU's process has little to do on the CPU
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True   # packed rows come in all sizes; vLLM turns it off for its own

FLAGS=( # what all of them share: TinyZero's settings, which the run on Eurus kept
  --model "$BASE_MODEL" --critic_model "${CRITIC_MODEL:-$BASE_MODEL}"  # the critic starts as the policy does
  --out "runs/${EXPERIMENT_NAME:-$RECIPE}" --resume auto  # the run folder; goes on where it was, if it was
  --tp "${ROLLOUT_TP_SIZE:-$tp}"      # GPUs that share an engine
  --minibatch_size 128                # of 256 samples: two updates a step
  --critic_lr 1e-5                    # ten times the policy's, which has the default 1e-6
  --kl_coef 0.001                     # in the reward, estimator k1
  --value_clip 0.5                    # values move at most this far in an update
  --entropy_coef 0.001                # veRL's default of January 2025
)
if [ "$RECIPE" = eurus-1.5b ]; then
  FLAGS+=(
    --task math,code --data "${DATA_DIR:-PRIME-RL/Eurus-2-RL-Data}"  # by their numbers of rows, as there: 17 to 1
    --template chat                   # the system prompt of the data is left out: it was made for another model
    --code_reward fraction            # part of the tests passed, as PRIME's verifier gave
    --steps 1880                      # about one epoch of 256 prompts a step
    --max_new_tokens 16384            # long chains of thought
    --save_every 16 --eval_every 64   # as there
    --eval_temperature 0.6            # as the model's card recommends; veRL is greedy
  )
else
  FLAGS+=(
    --task countdown --data "${DATA_DIR:-Jiayi-Pan/Countdown-Tasks-3to4}"  # the published rows, not generated ones
    --steps 1280                      # one epoch of the 327,680 training rows; TinyZero stopped by hand
    --max_prompt_tokens 256           # as there; ours have about 80
    --gpu_memory 0.3                  # room for all 256 answers; TinyZero's 0.4 would leave 3 GB of 80 with a 3B model
    --save_every 100 --eval_every 100 # as there
    --eval_rows 1024                  # the whole test split
    --eval_temperature 0              # greedy, as there
  )
  [ "$RECIPE" = countdown-3b-instruct ] && FLAGS+=(--template chat)  # base models get plain text
fi
case " $* " in
  *" --plan "*) exec python ppo.py "${FLAGS[@]}" "$@" ;;        # arithmetic only
esac
where=(--standalone)
[ "${NNODES:-1}" -gt 1 ] && where=(--nnodes "$NNODES" --rdzv_backend c10d --rdzv_endpoint "$HEAD" --rdzv_id "$RECIPE")
# one command for a start and for every restart: --resume auto goes on from the newest checkpoint, if there is one. On
# SIGTERM a step may be finished and saved before anything is killed
exec torchrun --shutdown_timeout 3600 "${where[@]}" --nproc_per_node "${N_GPUS:-$gpus}" ppo.py "${FLAGS[@]}" "$@"
