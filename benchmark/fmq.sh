#!/usr/bin/env bash
# Every published table and figure of FMQ (arXiv 2605.12416) on OGBench, at full budget: 1M offline
# and 1M online steps, 5 seeds, chunks of 5 actions (the scripts' defaults).
#   bash benchmark/fmq.sh                                   print all commands
#   bash benchmark/fmq.sh --workers 4 --devices 0 1 2 3     run them on four GPUs
#   bash benchmark/fmq.sh --dry-run                         count runs, updates and GPU hours
# One seed takes 93 PFLOP (QC: about 330), half of it offline; methods that differ only online share
# that half. Then: python benchmark/report.py runs/fmq-tables
set -euo pipefail
cd "$(dirname "$0")/.."

MVP="mvp=fmq --online-objective mvp"
QC="qc=fmq --actor flow --eval-modes best-of-n"

# Main table and learning curves. Row FMQ is the metric success_best_of_n, FMQ+QGBS success_qgbs
# (MVP likewise); success_one_step is ours, no such number is published. Beside it the comparison
# with equal aggregation of the critics, which the published one confounds. Figure 3, X being MVP's
# best score on TASK: python benchmark/report.py runs/fmq-tables/main/*/TASK --steps-to X
METHODS=(fmq "$MVP" "$QC" "fmq-mean=fmq --q-agg-online mean" "mvp-min=${MVP#*=} --q-agg-online min")
python benchmark/launch.py --share-offline --algos "${METHODS[@]}" --seeds 0 1 2 3 4 \
    --tasks cube-double-task3 cube-double-task4 cube-triple-task3 scene-task4 \
    humanoidmaze-medium-task3 humanoidmaze-medium-task4 antmaze-giant-task4 antmaze-giant-task5 \
    --out runs/fmq-tables/main "$@"

# The same table's other two tasks, with those of the trust region: fixed radius, plain gradient.
python benchmark/launch.py --share-offline --algos "${METHODS[@]}" "fixed=fmq --no-adaptive-eta" \
    "gradient=fmq --no-normalize-grad" --tasks cube-triple-task4 scene-task5 --seeds 0 1 2 3 4 \
    --out runs/fmq-tables/main "$@"

# The consistency losses that the paper compares; on which tasks it did is not known to us.
python benchmark/launch.py --share-offline --algos "semigroup=fmq --consistency semigroup" \
    "lagrangian=fmq --consistency lagrangian" --tasks cube-triple-task4 scene-task5 \
    --seeds 0 1 2 3 4 --out runs/fmq-tables/main "$@"

# Sweep of the beam search, the published one: 32, 24, 32, 36, 144 jumps, beside the main table's 20.
# Search changes no training, so these are evaluations of that table's finished runs, one after
# another (with --workers; else printed).
go() { echo "$@"; }
if [[ " $* " == *" --workers "* ]]; then
    go() { { echo "$@" && "$@"; } | tee -a runs/fmq-tables/search.txt; }
fi
search() { go python algos/fmq.py --evaluate "$run" --eval-modes qgbs "$@"; }
for run in runs/fmq-tables/main/fmq/*/*/*/; do
    [[ " $* " == *" --dry-run "* || " $* " == *" --plan "* ]] && break
    search --qgbs-rounds 0 --qgbs-beam 32 --qgbs-eta 0
    search --qgbs-rounds 1 --qgbs-beam 4 --qgbs-branches 4
    search --qgbs-rounds 1 --qgbs-beam 8 --qgbs-branches 2
    search --qgbs-rounds 1 --qgbs-beam 16 --qgbs-branches 1
    search --qgbs-rounds 2 --qgbs-beam 4 --qgbs-branches 4
    search --qgbs-rounds 2 --qgbs-beam 16 --qgbs-branches 4
done

# RoboMimic: can and square from several operators' demonstrations, 1M + 1M.
python benchmark/launch.py --share-offline --algos fmq "$MVP" "$QC" \
    --tasks robomimic/can-mh robomimic/square-mh --seeds 0 1 2 3 4 \
    --out runs/fmq-tables/robomimic "$@"

# Time of one decision: python benchmark/speed.py --methods "FMQ offline" QC
