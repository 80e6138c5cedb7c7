#!/usr/bin/env bash
# Measure on a GPU machine without a network, in steps that each have a time limit.
#   tools/gpu.sh STEP...   STEP: setup doctor smoke tests verify kernels tune cold counters timing decode layers
#                          fig2 neighbours all throughput recall-try recall cache. `all`: the three suites; it and
#                          `throughput` over two GPUs where there are two, `recall` over all.
# What the machine lacks is taken from .whl/: wheels, a newer ptxas as ptxas.gz, and site folders as *.tar.xz (packages,
# perhaps a ptxas at the top). Rows and logs are packed into $OUT/gpu.tar.gz (default: out/) twice a minute and at the
# end, so that a run that is cut loses little.
# `cache` packs what Triton compiled, without its tuning, as $OUT/triton-cache.tar.xz: in .whl/ it spares the next
# machine the compilation. Leave it out where cold starts are to be reported: they would be warm.
# TOTAL: seconds for all steps together. The next call with the same SITE goes on.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out}; SITE=${SITE:-$HOME/site}; WHEELS=${WHEELS:-.whl}; TOTAL=${TOTAL:-540}
RESULTS=$SITE/results; LOGS=$SITE/logs
mkdir -p "$OUT" "$RESULTS" "$LOGS"
export PYTHONPATH="$SITE:$PWD" PYTHONUNBUFFERED=1 TRITON_CACHE_DIR="$SITE/triton-cache" TRITON_CACHE_AUTOTUNING=1
export GLABENCH_TUNE_MS=${GLABENCH_TUNE_MS:-50}  # of the 125 ms that Triton would take a configuration
[ -x "$SITE/ptxas" ] && export TRITON_PTXAS_PATH="$SITE/ptxas"
percent() { printf ',%s.avg.pct_of_peak_sustained_%s' "$@"; }
COUNTERS=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,lts__t_bytes.sum,launch__registers_per_thread
COUNTERS+=$(percent dram__throughput elapsed lts__throughput elapsed sm__inst_executed_pipe_tensor active \
    sm__warps_active active smsp__issue_active active)
COUNTERS+=$(printf ',smsp__average_warps_issue_stalled_%s_per_issue_active.ratio' long_scoreboard short_scoreboard \
    barrier gmma wait mio_throttle)
pack() { tar czf "$OUT/gpu.tar.part" -C "$SITE" results logs && mv "$OUT/gpu.tar.part" "$OUT/gpu.tar.gz"; }
(while sleep 30; do pack; done) 2> /dev/null & packer=$!
trap 'kill $packer; pack' EXIT

# Triton needs the binaries, what describes them, and its launchers; the rest of an entry is for people to read.
pack_cache() {
    find "$SITE/triton-cache" \( -name '*.cubin' -o -name '*.json' -o -name '*.so' \) ! -name '*.autotune.json' \
        ! -path '*/tmp.pid_*' -printf 'triton-cache/%P\n' | tar cf - -C "$SITE" -T - | python3 -c \
        'import lzma, shutil, sys; shutil.copyfileobj(sys.stdin.buffer, lzma.open(sys.argv[1], "w"))' \
        "$OUT/triton-cache.tar.xz"
}

unpack() {  # unpack ARCHIVE...: into SITE, and tell the entries of a Triton cache where they are now
    local archive
    for archive in "$@"; do
        python3 -m tarfile -e "$archive" "$SITE" || return
    done
    [ ! -d "$SITE/triton-cache" ] || find "$SITE/triton-cache" -name '__grp__*' -exec \
        sed -i "s|\"[^\"]*/triton-cache/|\"$SITE/triton-cache/|g" {} +
}

left() { echo $((TOTAL - SECONDS > 1 ? TOTAL - SECONDS : 1)); }

step() {  # step NAME SECONDS COMMAND...
    local name=$1 limit=$2 started=$SECONDS
    shift 2
    [ "$limit" -gt "$(left)" ] && limit=$(left)
    [ "$limit" -gt 1 ] || { echo "== $name: no time left"; return; }
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

training() {  # training CONDITIONS DEVICE: Figure 6's steps
    step "throughput-${2/:/}" "$TOTAL" python3 -m glabench throughput ${MODELS:-} --size "${SIZE:-1.3b}" \
        --conditions "$1" --device "$2" ${IMPL:+--impl "$IMPL"} --out "$RESULTS/throughput" --resume ${ARGS:-}
}

gpus() { if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then tr , '\n' <<< "$CUDA_VISIBLE_DEVICES"; else nvidia-smi -L; fi | wc -l; }

for name in "$@"; do
    case $name in
        setup)
            [ -f "$WHEELS/ptxas.gz" ] && gunzip -c "$WHEELS/ptxas.gz" > "$SITE/ptxas" && chmod +x "$SITE/ptxas"
            wheels=("$WHEELS"/*.whl) archives=("$WHEELS"/*.tar.xz)
            [ -f "${wheels[0]}" ] && step setup 120 python3 -m pip install -q --no-index --no-deps --no-compile \
                --no-cache-dir --upgrade --target "$SITE" "${wheels[@]}"
            [ -f "${archives[0]}" ] && { unpack "${archives[@]}" || echo "== setup: an archive is damaged" >&2; }
            [ -x "$SITE/ptxas" ] && export TRITON_PTXAS_PATH="$SITE/ptxas"
            nvidia-smi -L ;;
        doctor) TAIL=40 step doctor 90 python3 -m glabench doctor ;;
        smoke) step smoke "$TOTAL" python3 -m glabench speed --impl "${IMPL:-gla,attention,mamba,mamba2,retention}" \
            --shape "${SHAPE:-340m}" --seqlen "${SEQLEN:-1k}" --out "$RESULTS/smoke" ${ARGS:-} ;;
        tests)  # warnings of another torch are no failures
            TAIL=40 step tests "$TOTAL" python3 -m pytest -q -m gpu -p no:cacheprovider -o filterwarnings=default \
                --durations 10 ${ARGS:-tests} ;;
        verify) step verify "$TOTAL" python3 -m glabench verify ${IMPL:+--impl "$IMPL"} ${ARGS:-} ;;
        kernels) step kernels 110 python3 tools/try_kernels.py --limit 100 ${ARGS:-} ;;
        tune) step tune "$TOTAL" env GLABENCH_PLANS="$RESULTS/plans" python3 -m glabench tune \
            --shape "${SHAPE:-340m}" ${IMPL:+--impl "$IMPL"} --limit "$(($(left) * 3 / 4 + 1))" ${ARGS:-} ;;
        cold)  # before anything else has compiled for these shapes
            for shape in 340m 1.3b fig2; do
                step "cold-$shape" 60 env TRITON_CACHE_DIR="$(mktemp -d)" python3 tools/try_kernels.py --parts cold \
                    --families gla --shapes "$shape"
            done ;;
        counters)  # what the profiler's counters say of each kernel: a table a shape in $RESULTS/counters
            mkdir -p "$RESULTS/counters"
            for shape in ${SHAPE:-340m 1.3b fig2}; do
                TAIL=3 step "counters-$shape" 90 ncu --profile-from-start off --clock-control none --csv --page raw \
                    --metrics "$COUNTERS" --log-file "$RESULTS/counters/$shape.csv" \
                    python3 tools/try_kernels.py --parts counted --families ${FAMILIES:-gla linear_attention} \
                    --shapes "$shape"
            done ;;
        cache) pack_cache && ls -l "$OUT/triton-cache.tar.xz" ;;
        timing) step timing 90 python3 tools/check_timing.py ;;
        decode) step decode "$TOTAL" python3 -m glabench decode --shape "${SHAPE:-340m,1.3b}" --out "$RESULTS/decode" \
            --impl "${IMPL:-gla,gla_step_fla,retention,linear_attention,attention,mamba,mamba2}" --resume ${ARGS:-} ;;
        throughput)  # over two GPUs a condition on each
            if [ "$(gpus)" -gt 1 ]; then
                training paper cuda:0 & side=$!
                training modern cuda:1
                wait "$side"
            else
                training paper,modern cuda
            fi ;;
        layers | fig2 | neighbours) suite "$name" "${DEVICE:-cuda}" ;;
        recall-try)  # a few steps of each mixer: does it run, with a CUDA graph, and what does an epoch take
            TAIL=20 step recall-try 300 python3 -m glabench recall --panel b --dims 64,512 --lrs 2e-3 --epochs 2 \
                --examples 12800 --jobs 1 --out "$RESULTS/recall-try" ${ARGS:-} ;;
        recall)  # Figure 4's panels, a shard a GPU; what TOTAL cuts off goes on with the next call
            count=$(gpus)
            for ((i = 0; i < count; i++)); do
                TAIL=40 step "recall-$i" "$TOTAL" python3 -m glabench recall --panel paper --device "cuda:$i" \
                    --shard "$i/$count" --epochs "${EPOCHS:-16}" --seeds "${SEEDS:-1}" --jobs "${JOBS:-4}" \
                    --stop-sweep --out "$RESULTS/fig4" ${ARGS:-} &
            done
            wait ;;
        all)
            if [ "$(gpus)" -gt 1 ]; then
                (suite fig2 cuda:1; suite neighbours cuda:1) & side=$!
                suite layers cuda:0
                wait "$side"
            else
                suite layers cuda; suite fig2 cuda; suite neighbours cuda
            fi ;;
        *) echo "no step $name" >&2; exit 2 ;;
    esac
done
