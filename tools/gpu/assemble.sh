#!/usr/bin/env bash
# On the GPU machine, when it has no network: unpacks what stage.sh has made (.stage, copied along with the repository),
# and says what can be imported.
#
#   bash tools/gpu/assemble.sh       # to /tmp/stage; STAGE names another folder, PYTHON another Python
#
# Joins the parts, compares checksums, unpacks, compiles, runs a few kernels. No network, no pip: Python 3.12 and
# coreutils. The exit status is 1 if no release of vLLM can be imported.
set -euo pipefail
kit="$(cd "$(dirname "$0")" && pwd)"
cd "$kit/../../.stage"
python=${PYTHON:-python3}
to=${STAGE:-/tmp/stage}
began=$(date +%s%N)
say() { echo "[$((($(date +%s%N) - began) / 1000000)) ms] $*"; }

for d in /usr/local/nvidia/lib64 /usr/local/nvidia/lib; do # where containers have the driver's libraries
  if [ -d "$d" ]; then export LD_LIBRARY_PATH="$d${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"; fi
done

sha256sum -c --quiet parts.sha256
rm -rf "$to"
mkdir -p "$to"
cat part-* > "$to/pack.tar.xz"
if [ "$(sha256sum < "$to/pack.tar.xz" | cut -d' ' -f1)" != "$(cat sha256)" ]; then
  echo "the joined archive is broken: is a part missing?"
  exit 1
fi
say "parts joined and whole"
"$python" -c 'import sys, tarfile; tarfile.open(sys.argv[1], "r:xz").extractall(sys.argv[2], filter="data")' "$to/pack.tar.xz" "$to"
rm "$to/pack.tar.xz"
say "unpacked to $to: $(du -sm "$to" | cut -f1) MB"
"$python" -m compileall -q -j "$(nproc)" "$to" > /dev/null || true # some templates are no Python
say "compiled"

good=0
for tree in "$to"/vllm-*; do
  if PYTHONPATH="$tree:$to/base" VLLM_LOGGING_LEVEL=ERROR "$python" "$kit/engine_check.py"; then
    good=$((good + 1))
  else
    echo "$(basename "$tree") cannot be used"
  fi
done
echo "compilers: $(command -v gcc cc nvcc | tr '\n' ' ')"
say "done; $good releases of vLLM can be imported"
[ "$good" -gt 0 ]
