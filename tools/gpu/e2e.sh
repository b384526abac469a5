#!/usr/bin/env bash
# The main job on one card, for whoever has it for ten minutes:
#
#   bash tools/gpu/e2e.sh                  # all parts, in this order, within TOTAL=560 seconds
#   bash tools/gpu/e2e.sh A B              # only these
#   REHEARSE=1 bash tools/gpu/e2e.sh       # on a CPU, A, B and C at tiny sizes
#
#   checks  the torch paths: tools/gpu/gpu.sh, short
#   A       the MAIN JOB as a user types it, torchrun ppo.py --engine vllm, with a small warmed model: it must learn
#   B       the README's command for one GPU at 0.5B (random weights), with a stopwatch around the engine
#   C       one weight never reaches the engine: the canary must end the run
#   speed   tools/gpu/gpu_speed.py vllm: engine and trainer at 1.5B, sleep, wake, load, tokens a second
#   bench   tools/gpu/gpu_speed.py bench: MFU and memory at 1.5B
#
# vLLM is the one that stage.sh packed and assemble.sh unpacked to STAGE (/tmp/stage), else the installed one. A tries
# one release after another, the last time without compiling; the other parts use what worked (VLLM=0.26.0 says it).
# A part that fails shows the end of its log, and the next one runs. When no time is left a part is skipped, and says so.
# OUT (runs/stage) gets all.log, metrics, the engine's stopwatch and report.html. PYTHON names the Python.
# SMALL: a model folder for A and C; default: the staged one, else that of run_cpu.sh, else random weights.
set -uo pipefail
kit="$(cd "$(dirname "$0")" && pwd)"
cd "$kit/../.."
stage=${STAGE:-/tmp/stage}
python=${PYTHON:-python3}
rehearse=${REHEARSE:-}
out=${OUT:-$PWD/runs/stage}
logs=$PWD/runs/stage-logs
total=${TOTAL:-560}
mkdir -p "$out" "$logs"
for d in /usr/local/nvidia/lib64 /usr/local/nvidia/lib; do # where containers have the driver's libraries
  if [ -d "$d" ]; then export LD_LIBRARY_PATH="$d${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"; fi
done
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore TORCH_CPP_LOG_LEVEL=ERROR
export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-INFO}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} OMP_WAIT_POLICY=PASSIVE
path_before=${PYTHONPATH:-}
torchrun=("$python" -m torch.distributed.run --standalone --nproc_per_node 1)

A=(--task countdown3 --prompts_per_step 128 --samples_per_prompt 4 --minibatch_size 256 --max_prompt_tokens 32
   --max_new_tokens 160 --max_tokens_per_microbatch 8000 --lr 1e-3 --critic_lr 2e-3 --critic_warmup 1
   --no_gradient_checkpointing --gpu_memory 0.3 --engine vllm)
B=(--task countdown --prompts_per_step 64 --samples_per_prompt 4 --max_prompt_tokens 256 --max_new_tokens 1024
   --gpu_memory 0.4 --engine vllm)
steps_a=16
steps_b=3
half_size=()
if [ -n "$rehearse" ]; then
  A+=(--prompts_per_step 8 --minibatch_size 32 --max_new_tokens 16)
  B+=(--prompts_per_step 4 --max_new_tokens 8 --max_tokens_per_microbatch 600)
  steps_a=2
  steps_b=2
  half_size=(--tiny)
fi

left() { echo $((total - SECONDS)); }
say() { echo "[e2e $SECONDS s] $*"; }
minutes() { awk "BEGIN {print $1 / 60}"; }

releases() { # of vLLM that were staged, the best first; else the installed one
  local found="" v
  for v in ${VLLM:-0.32.0 0.26.0}; do
    if [ -d "$stage/vllm-$v" ]; then found+=" $v"; fi
  done
  echo "${found:-installed}"
}

use() { # a release of vLLM ("" for a part that needs none), and "eager" for no compiling
  version=$1
  eager=$2
  name="vLLM $version${eager:+, eager}"
  local path=$stage/base
  if [ -d "$stage/vllm-$version" ] && [ -n "$version" ]; then path=$stage/vllm-$version:$path; fi
  if [ -d "$stage/base" ]; then export PYTHONPATH="$path${path_before:+:$path_before}"; fi
  # packed rows come in all sizes. The sleep mode of a release without this file refuses expandable segments
  export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
  local vllm
  vllm=$("$python" -c 'import importlib.util as u; s = u.find_spec("vllm"); print(s.submodule_search_locations[0] if s else "")')
  if [ -n "$vllm" ] && [ ! -e "$vllm/device_allocator/alloc_conf.py" ]; then unset PYTORCH_CUDA_ALLOC_CONF; fi
}

run() { # title, least seconds, most seconds, log, command ...; status 9: skipped
  local title=$1 least=$2 most=$3 log=$logs/$4 code began=$SECONDS
  shift 4
  if [ "$(left)" -lt "$least" ]; then
    say "$title: SKIPPED, it needs $least s and $(left) are left"
    return 9
  fi
  if [ "$most" -gt "$(left)" ]; then most=$(left); fi
  say "$title (at most $most s)"
  : > "$log"
  "$python" "$kit/limit.py" "$most" "$log" "$@"
  code=$?
  { echo "==== $title, exit status $code"; cat "$log"; } >> "$out/all.log"
  if [ $code = 0 ]; then
    say "$title: ok, $((SECONDS - began)) s"
  else
    say "$title: exit status $code after $((SECONDS - began)) s"
  fi
  return $code
}

ending() { # of a log, without torchrun's words about it
  echo "The end of $1:"
  sed '/File ".*torch\/distributed\/run.py"/,$d; s/^\[rank0\]: *//' "$logs/$1" |
    grep -vE '^\s*$|registered at|elastic/' | tail -n 30 | cut -c1-260
}

small_model() { # its folder is in $small
  local folder
  for folder in "${SMALL:-}" "$stage/warm" runs/warm-seed* "$logs/cold"; do
    small=$folder
    if [ -e "$small/config.json" ]; then return; fi
  done
  small=$logs/cold # the last one looked at
  "$python" tests/tiny.py "$small" --steps 0 > /dev/null
}

half_model() {
  half=$logs/half
  if [ -e "$half/config.json" ]; then return; fi
  run "a model of 0.5B with random weights" 20 60 model.log "$python" "$kit/model.py" "$half" "${half_size[@]}" || {
    ending model.log
    return 1
  }
}

checks() {
  use "" ""
  local most=${CHECKS:-130}
  run "torch paths" 60 $((most + 40)) checks.log \
    bash tools/gpu/gpu.sh --minutes "$(minutes "$most")" --out runs/stage-gpu
  if [ $? = 9 ]; then return; fi
  echo "$(grep -c '^ok ' "$logs/checks.log") checks ok"
  grep '^FAIL' "$logs/checks.log" | head -n 20
  cp runs/stage-gpu/gpu.json "$out/" 2> /dev/null
  sed -n '/^\*\*/,$p' "$logs/checks.log" | grep -v '^$' | head -n 40 | cut -c1-400
}

A_with() { # release, eager
  use "$1" "$2"
  small_model
  rm -rf runs/stage-a
  local command=("${torchrun[@]}" ppo.py)
  if [ -n "$eager" ]; then command=(env STAGE_EAGER=1 STAGE_LOG=/dev/null "${torchrun[@]}" "$kit/job.py"); fi
  run "A, the main job, $name" 60 "${LIMIT_A:-170}" A.log "${command[@]}" --model "$small" --out runs/stage-a \
    --steps $steps_a --eval_every $((steps_a / 2)) --eval_rows 256 "${A[@]}" || {
    [ $? = 9 ] || ending A.log
    return 1
  }
  grep -E 'ready after|of the held-out rows' "$logs/A.log" | cut -c1-250
  "$python" "$kit/show.py" "A, $name" runs/stage-a/metrics.jsonl
  cp runs/stage-a/metrics.jsonl "$out/metrics-A.jsonl"
  echo "$version $eager" > "$logs/chosen"
}

part_A() {
  rm -f "$logs/chosen"
  local found v
  found=$(releases)
  for v in $found; do
    A_with "$v" "" && return
  done
  A_with "${found%% *}" eager
}

chosen() { # part: uses what A found to work
  if [ ! -e "$logs/chosen" ]; then
    say "$1: SKIPPED, no release of vLLM has done A"
    return 1
  fi
  local version eager
  read -r version eager < "$logs/chosen"
  use "$version" "$eager"
}

part_B() {
  chosen B && half_model || return
  rm -rf runs/stage-b "$out/engine-B.jsonl"
  run "B, the main job at 0.5B, $name" 80 "${LIMIT_B:-200}" B.log env "STAGE_LOG=$out/engine-B.jsonl" \
    ${eager:+STAGE_EAGER=1} "${torchrun[@]}" "$kit/job.py" --model "$half" --steps $steps_b --out runs/stage-b "${B[@]}"
  case $? in
    0) ;;
    9) return ;;
    *) ending B.log ;;
  esac
  grep -E 'ready after|Sleep mode freed|[Gg]raph capturing finished|torch.compile took|Using .* attention|Model Runner' \
    "$logs/B.log" | head -n 9 | cut -c1-220
  "$python" "$kit/show.py" "B at 0.5B, $name" runs/stage-b/metrics.jsonl "$out/engine-B.jsonl"
  cp runs/stage-b/metrics.jsonl "$out/metrics-B.jsonl" 2> /dev/null
}

part_C() {
  chosen C || return
  small_model
  rm -rf runs/stage-c
  run "C, one weight stays stale (the run must end)" 50 "${LIMIT_C:-90}" C.log env STAGE_STALE=1 STAGE_LOG=/dev/null \
    ${eager:+STAGE_EAGER=1} "${torchrun[@]}" "$kit/job.py" --model "$small" --steps 9 --out runs/stage-c "${A[@]}" \
    --lr 1e-2 --entropy_coef 0.1 --critic_warmup 0
  if [ $? = 9 ]; then return; fi
  if grep -q "stale or wrong weights" "$logs/C.log"; then
    say "C is ok: $(grep -oE 'canary at step [0-9]+: log-probs differ by [0-9.]+, allowed [0-9.]+' "$logs/C.log" | head -n 1)"
  else
    say "C FAILED: the canary said nothing"
    ending C.log
  fi
}

speed_part() { # of gpu_speed.py, least seconds, most seconds
  mkdir -p runs/stage-speed
  run "$1" "$2" "$3" "$1.log" "${torchrun[@]}" tools/gpu/gpu_speed.py "$1" --out runs/stage-speed --minutes "$(minutes "$3")"
  case $? in
    0) ;;
    9) return ;;
    *) ending "$1.log" ;;
  esac
  grep -E '^(ok|FAIL|skip|    ) ' "$logs/$1.log" | cut -c1-420
}

part() {
  case $1 in
    checks) checks ;;
    A | B | C) "part_$1" ;;
    speed) chosen speed && speed_part vllm 80 150 ;;
    bench) use "" "" && speed_part bench 60 120 ;;
    *) echo "no part $1: see the top of this file"; exit 1 ;;
  esac
}

parts=("$@")
if [ $# = 0 ]; then
  parts=(checks A B C speed bench)
  if [ -n "$rehearse" ]; then parts=(A B C); fi
fi
for p in "${parts[@]}"; do part "$p"; done
finished=()
for folder in runs/stage-a runs/stage-b; do
  if [ -s "$folder/metrics.jsonl" ]; then finished+=("$folder"); fi
done
if [ ${#finished[@]} -gt 0 ]; then "$python" tools/report.py "${finished[@]}" --out "$out/report.html"; fi
say "end; $(nvidia-smi --query-gpu=name,memory.used --format=csv,noheader 2> /dev/null)"
