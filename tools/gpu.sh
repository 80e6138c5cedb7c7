#!/usr/bin/env bash
# Measure on a GPU machine without a network, in steps that each have a time limit.
#   tools/gpu.sh STEP...   STEP: setup doctor smoke verify kernels timing layers fig2 throughput all
# `all` spreads layers and fig2 over two GPUs where there are two. Wheels of what the machine lacks are
# taken from .whl/, a newer ptxas from .whl/ptxas.gz; rows and logs are packed into $OUT/gpu.tar.gz (default:
# out/), also where TOTAL, the seconds for all steps together, ran out. The next call with the same SITE goes on.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out}; SITE=${SITE:-$HOME/site}; WHEELS=${WHEELS:-.whl}; TOTAL=${TOTAL:-540}
RESULTS=$SITE/results; LOGS=$SITE/logs
mkdir -p "$OUT" "$RESULTS" "$LOGS"
export PYTHONPATH="$SITE:$PWD" PYTHONUNBUFFERED=1 TRITON_CACHE_DIR="$SITE/triton-cache" TRITON_CACHE_AUTOTUNING=1
export GLABENCH_TUNE_MS=${GLABENCH_TUNE_MS:-20}  # of the 125 ms that Triton would take a configuration
[ -x "$SITE/ptxas" ] && export TRITON_PTXAS_PATH="$SITE/ptxas"
trap 'tar czf "$OUT/gpu.tar.gz" -C "$SITE" results logs' EXIT

left() { echo $((TOTAL - SECONDS > 1 ? TOTAL - SECONDS : 1)); }

step() {  # step NAME SECONDS COMMAND...
    local name=$1 limit=$2 started=$SECONDS
    shift 2
    [ "$limit" -gt "$(left)" ] && limit=$(left)
    timeout --kill-after=5 "$limit" "$@" > "$LOGS/$name.log" 2>&1
    echo "== $name: exit $?, $((SECONDS - started)) s"
    tail -n "${TAIL:-12}" "$LOGS/$name.log"
}

suite() {  # suite NAME DEVICE [OPTIONS]: --resume, so that what ran into its limit goes on with the next call
    local name=$1 device=$2
    shift 2
    step "$name-${device/:/}" "$TOTAL" python3 -m glabench run "$name" --device "$device" --out "$RESULTS/$name" \
        --resume ${IMPL:+--impl "$IMPL"} ${ARGS:-} "$@"
}

for name in "$@"; do
    case $name in
        setup)
            [ -f "$WHEELS/ptxas.gz" ] && gunzip -c "$WHEELS/ptxas.gz" > "$SITE/ptxas" && chmod +x "$SITE/ptxas"
            step setup 120 python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
                --upgrade --target "$SITE" "$WHEELS"/*.whl
            [ -x "$SITE/ptxas" ] && export TRITON_PTXAS_PATH="$SITE/ptxas"
            nvidia-smi -L ;;
        doctor) TAIL=40 step doctor 90 python3 -m glabench doctor ;;
        smoke) step smoke "$TOTAL" python3 -m glabench speed --impl "${IMPL:-gla,attention,mamba,mamba2,retention}" \
            --shape "${SHAPE:-340m}" --seqlen "${SEQLEN:-1k}" --out "$RESULTS/smoke" ${ARGS:-} ;;
        verify) step verify "$TOTAL" python3 -m glabench verify ${IMPL:+--impl "$IMPL"} ${ARGS:-} ;;
        kernels) step kernels 110 python3 tools/try_kernels.py --limit 100 ${ARGS:-} ;;
        timing) step timing 90 python3 tools/check_timing.py ;;
        throughput) step throughput "$TOTAL" python3 -m glabench throughput ${MODELS:-} --size "${SIZE:-1.3b}" \
            ${IMPL:+--impl "$IMPL"} --out "$RESULTS/throughput" --resume ${ARGS:-} ;;
        layers | fig2) suite "$name" "${DEVICE:-cuda}" ;;
        all)
            if [ "$(nvidia-smi -L | wc -l)" -gt 1 ]; then
                (suite fig2 cuda:1; suite layers cuda:1 --shape fig2) & side=$!
                suite layers cuda:0 --shape 340m,1.3b
                wait "$side"
            else
                suite layers cuda; suite fig2 cuda
            fi ;;
        *) echo "no step $name" >&2; exit 2 ;;
    esac
done
