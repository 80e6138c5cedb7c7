#!/usr/bin/env bash
# Measure on a GPU machine without a network, in steps that each have a time limit.
#   tools/gpu.sh STEP...   STEP: setup doctor smoke verify timing layers fig2
# Wheels of what the machine lacks are taken from .whl/, a newer ptxas from .whl/ptxas.gz; results are
# packed into $OUT (default: out/). WHEELS, SITE and LIMIT (seconds a step) can be set.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out}; SITE=${SITE:-$HOME/site}; WHEELS=${WHEELS:-.whl}; LIMIT=${LIMIT:-540}; RESULTS=${RESULTS:-$SITE/results}
mkdir -p "$OUT" "$SITE"
export PYTHONPATH="$SITE:$PWD" PYTHONUNBUFFERED=1 TRITON_CACHE_DIR="$SITE/triton-cache"
export GLABENCH_TUNE_MS=${GLABENCH_TUNE_MS:-40}  # of the 125 ms that Triton would take a configuration
[ -x "$SITE/ptxas" ] && export TRITON_PTXAS_PATH="$SITE/ptxas"

step() {  # step NAME SECONDS COMMAND...
    local name=$1 limit=$2 started=$SECONDS
    shift 2
    timeout --kill-after=5 "$limit" "$@" > >(tee "$OUT/$name.log") 2>&1
    echo "== $name: exit $?, $((SECONDS - started)) s"
}

for name in "$@"; do
    case $name in
        setup)
            [ -f "$WHEELS/ptxas.gz" ] && gunzip -c "$WHEELS/ptxas.gz" > "$SITE/ptxas" && chmod +x "$SITE/ptxas"
            step setup 120 python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
                --upgrade --target "$SITE" "$WHEELS"/*.whl
            [ -x "$SITE/ptxas" ] && export TRITON_PTXAS_PATH="$SITE/ptxas"
            nvidia-smi -L ;;
        doctor) step doctor 90 python3 -m glabench doctor ;;
        smoke) step smoke "$LIMIT" python3 -m glabench speed --impl "${IMPL:-gla,attention,mamba,mamba2,retention}" \
            --shape "${SHAPE:-340m}" --seqlen "${SEQLEN:-1k}" --out "$OUT/smoke" ${ARGS:-} ;;
        verify) step verify "$LIMIT" python3 -m glabench verify ${IMPL:+--impl "$IMPL"} ;;
        timing) TRITON_CACHE_AUTOTUNING=1 step timing 120 bash -c 'python3 tools/check_timing.py > "$1"' _ "$OUT/check_timing.json" ;;
        # --resume: a step that ran into its limit goes on with the next call
        layers | fig2) step "$name" "$LIMIT" python3 -m glabench run "$name" --out "$RESULTS/$name" --resume \
            ${IMPL:+--impl "$IMPL"} ${ARGS:-} ;;  # ARGS: --device cuda:1, --shape fig2
        *) echo "no step $name" >&2; exit 2 ;;
    esac
done
[ -d "$RESULTS" ] && tar czf "$OUT/results.tar.gz" -C "$RESULTS" .
exit 0
