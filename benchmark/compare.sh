#!/usr/bin/env bash
# Every method at the same cost: two minutes of updates on one core (UPDATES, below), the same
# small networks, data, episodes of evaluation and seeds. Table and pictures: results/compare.
#   bash benchmark/compare.sh                         print all commands
#   bash benchmark/compare.sh --workers 1             run them; --seeds 0 1: these seeds only
#   bash benchmark/compare.sh --time --workers 1      measure the updates' costs instead
# Needs the data: python benchmark/collect.py antmaze-large; python benchmark/collect.py cube-single
# --num-transitions 200000. COMPARE_OUT: where the runs go; COMPARE_DATA: where the data are;
# COMPARE_TASKS: these tasks only.
# Then: python benchmark/report.py runs/compare
set -euo pipefail
cd "$(dirname "$0")/.."
OUT="${COMPARE_OUT:-runs/compare}" SEEDS="0 1 2 3 4" EVALUATE="--eval-episodes 50"

# The scripts' clock counts the processor time of their process, not what others take.
CLOCK=$(mktemp -d) && trap 'rm -r "$CLOCK"' EXIT
echo "import time; time.perf_counter = time.process_time" > "$CLOCK/sitecustomize.py"
export PYTHONPATH="$CLOCK${PYTHONPATH:+:$PYTHONPATH}"

# Numbers of updates fixed beforehand: 120 s over the processor time of an update of these settings,
# measured by --time on one core of an AMD EPYC (the fastest 100 updates of 1,000). Compiling and
# evaluating are not counted.
declare -A UPDATES=(
    [gsflow-cube-single]=6300 [fql-cube-single]=16700 [flowq-cube-single]=14300
    [bc-cube-single]=14800 [fmq-mvp-cube-single]=6700 [qc-cube-single]=5100
    [sac_flow-cube-single]=6300
    [gsflow-antmaze-large]=4500 [fql-antmaze-large]=15000 [flowq-antmaze-large]=14000
    [bc-antmaze-large]=13900 [fmq-mvp-antmaze-large]=7200 [qc-antmaze-large]=5300
    [sac_flow-antmaze-large]=6200
    [gsflow-pointmaze-large]=8500 [fql-pointmaze-large]=18500 [flowq-pointmaze-large]=16800
    [bc-pointmaze-large]=16000 [fmq-mvp-pointmaze-large]=7400 [qc-pointmaze-large]=5600
    [sac_flow-pointmaze-large]=6900
)
if [[ " $* " == *" --time "* ]]; then
    UPDATES=() OUT="$OUT-time" SEEDS="900" EVALUATE="--eval-episodes 1 --log-interval 100"
    set -- "${@/--time/}"
fi
args=() && for word in "$@"; do [[ $word ]] && args+=("$word"); done
steps() { echo "--offline-steps ${UPDATES[$1]:-1000} --eval-interval ${UPDATES[$1]:-1000}"; }

# Settings: those of no_gpu.sh, found on seed 0 with longer runs, and where it has none (fql, qc, bc,
# pointmaze-large) those of the nearest method there. FMQ and MVP are one method offline; they differ
# in their online objective. bc is FlowQ's flow without guidance, its critic for the best of 4 alone.
NETS="--hidden-dims 128 128 128"
GSFLOW="gsflow=gsflow $NETS --learning-rate 1e-3 --flow-steps 5 --kl-weight 0.1"
FQL="fql=gsflow --prior gaussian --student deterministic $NETS --learning-rate 1e-3 --flow-steps 5"
FLOWQ="flowq=flowq $NETS --learning-rate 1e-3 --eval-candidates 4"
BC="bc=flowq --guidance-lambda 0 $NETS --learning-rate 1e-3 --eval-candidates 4"
FLOWMAP="--consistency-warmup 500 --consistency-anneal-end 3000 --eval-modes best-of-n one-step"
FMQ="fmq-mvp=fmq $NETS --online-steps 0 --num-samples 8 $FLOWMAP"
QC="qc=fmq --actor flow --eval-modes best-of-n $NETS --online-steps 0 --num-samples 8 --flow-steps 5"
SAC="sac_flow=sac_flow --policy flow-g --hidden-dim 128 --critic-hidden-dims 128 128 128"
SAC="$SAC --actor-lr 1e-3 --critic-lr 1e-3 --online-steps 0"

compare() { # TASK, then an algorithm a line, each with the numbers of updates of LABEL-TASK
    local task=$1 algos=() algo label && shift
    [[ " ${COMPARE_TASKS:-$task} " == *" $task "* ]] || return 0
    for algo in "$@"; do
        label=${algo%%=*}
        algos+=("$algo $(steps "$label-$task")")
    done
    python benchmark/launch.py --tasks "$task" --algos "${algos[@]}" --seeds $SEEDS --out "$OUT" \
        "${args[@]}" -- --normalize-obs True $EVALUATE --dataset-dir "${COMPARE_DATA:-~/.ogbench/data}"
}

compare cube-single \
    "$GSFLOW --tau 0.02 --latent-dim 5 --prior-hidden-dims 256 256 --num-candidates 4 --alpha 300
        --n-step 5" \
    "$FQL --tau 0.02 --alpha 300 --n-step 5" \
    "$FLOWQ --guidance-lambda 10 --n-step 5 --tau 0.02" \
    "$BC --n-step 5 --tau 0.02" \
    "$FMQ --learning-rate 1e-3 --tau 0.01" \
    "$QC --learning-rate 1e-3 --tau 0.01" \
    "$SAC --beta 100 --tau 0.02"

# gamma 0.995: with 0.99 the values of the first half of the way hardly differ
compare antmaze-large \
    "$GSFLOW --tau 0.02 --latent-dim 8 --prior-hidden-dims 128 --num-candidates 8 --alpha 30
        --n-step 25 --gamma 0.995" \
    "$FQL --tau 0.02 --alpha 30 --n-step 25 --gamma 0.995" \
    "$FLOWQ --guidance-lambda 10 --n-step 25 --gamma 0.995 --tau 0.01" \
    "$BC --n-step 25 --gamma 0.995 --tau 0.01" \
    "$FMQ --horizon 3 --learning-rate 5e-4 --tau 0.01 --q-agg-offline min --gamma 0.995" \
    "$QC --horizon 3 --learning-rate 5e-4 --tau 0.01 --q-agg-offline min --gamma 0.995" \
    "$SAC --horizon-length 3 --beta 10 --tau 0.01"

compare pointmaze-large \
    "$GSFLOW --tau 0.01 --latent-dim 2 --prior-hidden-dims 128 --num-candidates 4 --alpha 3
        --n-step 10 --gamma 0.995" \
    "$FQL --tau 0.01 --alpha 3 --n-step 10 --gamma 0.995" \
    "$FLOWQ --guidance-lambda 100 --n-step 10 --tau 0.01 --gamma 0.995" \
    "$BC --n-step 10 --tau 0.01 --gamma 0.995" \
    "$FMQ --learning-rate 1e-3 --tau 0.01 --gamma 0.995" \
    "$QC --learning-rate 1e-3 --tau 0.01 --gamma 0.995" \
    "$SAC --beta 10 --tau 0.01 --gamma 0.995"
