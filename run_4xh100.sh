#!/usr/bin/env bash
# The reference run on one node of 4 H100s, 80 GB each: PPO with a critic, full fine-tuning, vLLM in the same processes.
# A first version: it has the sizes and rates of the run it reproduces, on Countdown, the one task there is so far.
# Nothing in it has been measured on GPUs yet.
#
#   pip install -r requirements.txt
#   bash run_4xh100.sh                                              # DeepSeek-R1-Distill-Qwen-1.5B
#   BASE_MODEL=Qwen/Qwen2.5-3B N_GPUS=2 ROLLOUT_TP_SIZE=2 bash run_4xh100.sh --template base --max_new_tokens 1024
#   bash run_4xh100.sh --steps 0                                    # load, print the plan, sample one batch, stop
set -euo pipefail
cd "$(dirname "$0")"

N_GPUS=${N_GPUS:-4}
BASE_MODEL=${BASE_MODEL:-deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B}
CRITIC_MODEL=${CRITIC_MODEL:-$BASE_MODEL}
ROLLOUT_TP_SIZE=${ROLLOUT_TP_SIZE:-1}
EXPERIMENT_NAME=${EXPERIMENT_NAME:-countdown-1.5b}
export OMP_NUM_THREADS=4                                  # a GPU's process has little to do on the CPU
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True   # packed rows come in all sizes

FLAGS=(
  --model "$BASE_MODEL" --critic_model "$CRITIC_MODEL"
  --out "runs/$EXPERIMENT_NAME"
  --task countdown --template chat
  --steps 1000
  --prompts_per_step 256 --samples_per_prompt 1
  --minibatch_size 128                # two updates a step
  --max_prompt_tokens 1024
  --max_new_tokens 16384              # long chains of thought
  --max_tokens_per_microbatch 18000   # one full-length sequence and a bit
  --lr 1e-6 --critic_lr 1e-5
  --kl_coef 0.001                     # in the reward, k1, as the original
  --value_clip 0.5
  --tp "$ROLLOUT_TP_SIZE"
  --gpu_memory 0.6                    # of the card, while the engine is awake
  --save_every 16 --eval_every 64
)
torchrun --standalone --nproc_per_node "$N_GPUS" ppo.py "${FLAGS[@]}" "$@"
