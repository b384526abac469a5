#!/usr/bin/env bash
# For a GPU machine without a network: puts all that it lacks into one archive. On a machine with a package index:
#
#   bash tools/gpu/stage.sh [--model FOLDER] [--vllm "0.32.0 0.26.0"] [--part SIZE] [--work DIR]
#
# Downloads vLLM's wheels for CUDA and the packages of packages.txt, takes out what one Hopper card never asks for
# (prune.py), packs, and splits into parts of at most SIZE (58M) in .stage, which git ignores. Then it says what to copy
# and what to run there. --model: a small warmed model; default: that of run_cpu.sh, if it was made.
# Needs pip (any Python 3), unzip and xz; no GPU, no Python 3.12. About 4 minutes of one core, 1 GB in DIR.
set -euo pipefail
kit="$(cd "$(dirname "$0")" && pwd)"
root="$(cd "$kit/../.." && pwd)"
model=""
versions="0.32.0 0.26.0"
size=58M
work=${TMPDIR:-/tmp}/stage-work
while [ $# -gt 0 ]; do
  case $1 in
    --model) model=$2 ;;
    --vllm) versions=$2 ;;
    --part) size=$2 ;;
    --work) work=$2 ;;
    *) echo "unknown flag $1: see the top of this file"; exit 1 ;;
  esac
  shift 2
done
if [ -z "$model" ]; then
  for folder in "$root"/runs/warm-seed*; do
    if [ -e "$folder/config.json" ]; then model=$folder; fi
  done
elif [ ! -e "$model/config.json" ]; then
  echo "--model $model: no model folder there"
  exit 1
fi
[ -z "$model" ] || model="$(cd "$model" && pwd)"
began=$SECONDS
say() { echo "[$((SECONDS - began)) s] $*"; }

# wheels for Python 3.12 on x86-64, whatever this machine has
pip=(python3 -m pip --disable-pip-version-check -q)
there=(--no-deps --only-binary=:all: --python-version 3.12 --implementation cp)
for n in $(seq 39 -1 5); do there+=(--platform "manylinux_2_${n}_x86_64"); done
there+=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64)

mkdir -p "$work"
cd "$work"
rm -rf pack
mkdir pack
say "the packages of packages.txt"
"${pip[@]}" install "${there[@]}" --no-compile --target pack/base -r "$kit/packages.txt" 2> pip.log || { cat pip.log; exit 1; }
rm -rf pack/base/bin
for version in $versions; do
  if [ -z "$(compgen -G "wheels/vllm-$version-*.whl")" ]; then
    say "vllm $version"
    "${pip[@]}" download "${there[@]}" --no-cache-dir -d wheels "vllm==$version" 2> pip.log || { cat pip.log; exit 1; }
  fi
  wheel=$(compgen -G "wheels/vllm-$version-*.whl")
  say "$wheel: $(($(stat -c %s "$wheel") >> 20)) MiB"
  unzip -p "$wheel" '*/METADATA' | grep -E '^Requires-Dist: (torch|transformers)[=<>!]' || true
  rm -rf unpacked
  mkdir unpacked
  # flash-attn 2, the largest library by far, is never looked at: on Hopper it is flash-attn 3
  unzip -q "$wheel" -d unpacked -x '*/_vllm_fa2_C.abi3.so' '*/vllm-rs'
  python3 "$kit/prune.py" unpacked "pack/vllm-$version"
  rm -rf unpacked
done
if [ -n "$model" ]; then
  cp -r "$model" pack/warm
  say "the small model: $model"
else
  say "no warmed small model: e2e.sh will make one with random weights, and part A will learn nothing"
fi

say "packing $(du -sm pack | cut -f1) MB"
rm -rf "$root/.stage"
mkdir "$root/.stage"
sorted() { LC_ALL=C sort -t/ -k3; } # the trees of two releases lie side by side: the second costs only what differs
list() {
  find . -type f ! -name '*.so*' | sorted
  find . -type f -name '*.so*' | sorted
}
cd pack
list | tar -cf - --no-recursion --owner=0 --group=0 -T - | xz -T1 --lzma2=preset=6,dict=192MiB > ../pack.tar.xz
cd ..
split -b "$size" -d -a 2 pack.tar.xz "$root/.stage/part-"
sha256sum pack.tar.xz | cut -d' ' -f1 > "$root/.stage/sha256"
cd "$root/.stage"
sha256sum part-* > parts.sha256
say "packed: $(du -cb part-* | tail -n 1 | cut -f1) bytes in $(ls part-* | wc -l) part(s) in $root/.stage"
cat << 'TEXT'

Copy the repository with its folder .stage to the GPU machine, which has Python 3.12 with torch 2.11.0 for CUDA 13 and
transformers. There, in the repository:

  bash tools/gpu/assemble.sh && TOTAL=560 bash tools/gpu/e2e.sh      # all parts that 560 seconds are enough for
  TOTAL=120 bash tools/gpu/e2e.sh bench                              # when time is left
TEXT
