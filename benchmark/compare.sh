#!/usr/bin/env bash
# Every method at the same cost: two minutes of updates on one core, the same small networks, data,
# batch, episodes of evaluation and seeds. Table and pictures: results/compare.
#   bash benchmark/compare.sh                         print all commands
#   bash benchmark/compare.sh --workers 1             run them; --seeds 0 1: these seeds only
#   bash benchmark/compare.sh --tune --workers 1      the three values tried of each method, seed 100
#   bash benchmark/compare.sh --time --workers 1      measure the updates' costs instead
#   bash benchmark/compare.sh --quarter --workers 1   a quarter of an hour, three evaluations, seed 0
# Needs the data: python benchmark/collect.py antmaze-large; python benchmark/collect.py cube-single
# --num-transitions 200000. COMPARE_OUT: where the runs go; COMPARE_DATA: where the data are;
# COMPARE_TASKS, COMPARE_METHODS: these tasks, these methods only.
# Then: python benchmark/report.py runs/compare
set -euo pipefail
cd "$(dirname "$0")/.."
OUT="${COMPARE_OUT:-runs/compare}" SEEDS="0 1 2 3 4" MODE=table
EVALUATE="--eval-episodes 50 --log-interval 10000"
args=() && for word in "$@"; do
    case $word in --time | --tune | --quarter) MODE=${word#--} ;; *) args+=("$word") ;; esac
done

# The scripts' clock counts the processor time of their process, not what others take.
CLOCK=$(mktemp -d) && trap 'rm -r "$CLOCK"' EXIT
echo "import time; time.perf_counter = time.process_time" > "$CLOCK/sitecustomize.py"
export PYTHONPATH="$CLOCK${PYTHONPATH:+:$PYTHONPATH}"

# What differs between methods and tasks: the number of updates, fixed beforehand (120 s over the
# processor time of an update, measured by --time on one core, the fastest 100 updates of 1,000;
# compiling and evaluating are not counted), then the one setting that was tuned, with the values
# tried on seed 100 with half the updates; the table has the first.
declare -A METHODS=(
    [gsflow-cube-single]="25000 --alpha 1000 100 300"
    [prior-cube-single]="26000 --alpha 1000 100 300"
    [entropy-cube-single]="54000 --alpha 1000 100 300"
    [fql-cube-single]="55000 --alpha 300 100 1000"
    [flowq-cube-single]="55000 --guidance-lambda 10 3 30"
    [bc-cube-single]="55000 --eval-candidates 4 8 16"
    [fmq-mvp-cube-single]="35000 --horizon 5 3 1"
    [qc-cube-single]="27000 --horizon 5 3 1"
    [sac_flow-cube-single]="23000 --beta 300 100 30"
    [gsflow-antmaze-large]="29000 --alpha 30 10 100"
    [fql-antmaze-large]="47000 --alpha 30 10 100"
    [flowq-antmaze-large]="48000 --guidance-lambda 3 10 30"
    [bc-antmaze-large]="49000 --eval-candidates 4 8 16"
    [fmq-mvp-antmaze-large]="33000 --horizon 3 5 10"
    [qc-antmaze-large]="25000 --horizon 3 5 10"
    [sac_flow-antmaze-large]="22000 --beta 10 3 30"
    [gsflow-pointmaze-large]="32000 --alpha 3 1 10"
    [fql-pointmaze-large]="60000 --alpha 3 1 10"
    [flowq-pointmaze-large]="60000 --guidance-lambda 100 30 300"
    [bc-pointmaze-large]="60000 --eval-candidates 4 8 16"
    [fmq-mvp-pointmaze-large]="38000 --horizon 5 3 10"
    [qc-pointmaze-large]="27000 --horizon 5 3 10"
    [sac_flow-pointmaze-large]="25000 --beta 10 3 30"
)
case $MODE in
    time) OUT="$OUT-time" SEEDS=900 EVALUATE="--eval-episodes 1 --log-interval 100" ;;
    tune) OUT="$OUT-tune" SEEDS=100 ;;
    quarter) OUT="$OUT-quarter" SEEDS=0 ;;
esac

# FMQ and MVP are one method offline; they differ in their online objective. bc is FlowQ's flow
# without guidance, its critic for the best of N alone.
NETS="--hidden-dims 128 128 128" LR="--learning-rate 1e-3"
ONE_STEP="gsflow $NETS $LR --ema-decay 0.999 --flow-steps 5"
GSFLOW="gsflow=$ONE_STEP --kl-weight 0.1 --num-candidates 4"
PRIOR="prior=${GSFLOW#*=} --student deterministic" # GSFlow without entropy and noise
ENTROPY="entropy=$ONE_STEP --prior gaussian" # without its prior
FQL="fql=$ONE_STEP --prior gaussian --student deterministic"
FLOWQ="flowq=flowq $NETS $LR --eval-candidates 4"
BC="bc=flowq --guidance-lambda 0 $NETS $LR"
FLOWMAP="--consistency-warmup 500 --consistency-anneal-end 3000 --eval-modes best-of-n one-step"
FMQ="fmq-mvp=fmq $NETS --online-steps 0 --num-samples 8 $FLOWMAP"
QC="qc=fmq --actor flow --eval-modes best-of-n $NETS --online-steps 0 --num-samples 8 --flow-steps 5"
SAC="sac_flow=sac_flow --policy flow-g --hidden-dim 128 --critic-hidden-dims 128 128 128"
SAC="$SAC --actor-lr 1e-3 --critic-lr 1e-3 --online-steps 0"

compare() { # TASK, then an algorithm a line, each with what METHODS holds for LABEL-TASK
    local task=$1 algos=() algo label updates flag values value every && shift
    [[ " ${COMPARE_TASKS:-$task} " == *" $task "* ]] || return 0
    for algo in "$@"; do
        label=${algo%%=*}
        [[ " ${COMPARE_METHODS:-$label} " == *" $label "* ]] || continue
        read -r updates flag values <<< "${METHODS[$label-$task]}"
        case $MODE in
            table) values=${values%% *} ;;
            time) values=${values%% *} updates=1000 ;;
            tune) updates=$((updates / 2)) ;;
            quarter) values=${values%% *} updates=$((updates * 15 / 2)) ;;
        esac
        every=$updates && [[ $MODE == quarter ]] && every=$((updates / 3))
        for value in $values; do
            [[ $MODE == tune ]] && algo="$label-$value=${algo#*=}"
            algos+=("$algo $flag $value --offline-steps $updates --eval-interval $every")
        done
    done
    [[ ${#algos[@]} -gt 0 ]] || return 0
    python benchmark/launch.py --tasks "$task" --algos "${algos[@]}" --seeds $SEEDS --out "$OUT" \
        "${args[@]}" -- --normalize-obs True --batch-size 64 --tau 0.01 $EVALUATE \
        --dataset-dir "${COMPARE_DATA:-~/.ogbench/data}"
}

compare pointmaze-large \
    "$GSFLOW --latent-dim 2 --prior-hidden-dims 128 --n-step 10 --gamma 0.995" \
    "$FQL --n-step 10 --gamma 0.995" \
    "$FLOWQ --n-step 10 --gamma 0.995" \
    "$BC --n-step 10 --gamma 0.995" \
    "$FMQ $LR --gamma 0.995" \
    "$QC $LR --gamma 0.995" \
    "$SAC --gamma 0.995"

compare cube-single \
    "$GSFLOW --latent-dim 5 --prior-hidden-dims 256 256 --n-step 5" \
    "$PRIOR --latent-dim 5 --prior-hidden-dims 256 256 --n-step 5" \
    "$ENTROPY --n-step 5" \
    "$FQL --n-step 5" \
    "$FLOWQ --n-step 5" \
    "$BC --n-step 5" \
    "$FMQ $LR" \
    "$QC $LR" \
    "$SAC"

# gamma 0.995: with 0.99 the values of the first half of the way hardly differ
compare antmaze-large \
    "$GSFLOW --latent-dim 8 --prior-hidden-dims 128 --n-step 25 --gamma 0.995" \
    "$FQL --n-step 25 --gamma 0.995" \
    "$FLOWQ --n-step 25 --gamma 0.995" \
    "$BC --n-step 25 --gamma 0.995" \
    "$FMQ --learning-rate 5e-4 --q-agg-offline min --gamma 0.995" \
    "$QC --learning-rate 5e-4 --q-agg-offline min --gamma 0.995" \
    "$SAC --horizon-length 3 --gamma 0.995"
