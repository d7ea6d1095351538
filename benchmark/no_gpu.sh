#!/usr/bin/env bash
# The "no GPU" table: small networks and short runs, each at most 20 minutes on two CPU cores. First
# settings: what they have reached so far stands in README, "Without a GPU".
#   bash benchmark/no_gpu.sh                          print all commands
#   bash benchmark/no_gpu.sh --workers 2              run them, two at a time, a core each
# Needs the data: python benchmark/collect.py antmaze-large; python benchmark/collect.py cube-single
# --num-transitions 200000. Then: python benchmark/report.py runs/no-gpu
set -euo pipefail
cd "$(dirname "$0")/.."

SMALL="--normalize-obs True --tau 0.01 --eval-episodes 25"
NETS="--hidden-dims 128 128 128 --learning-rate 1e-3"
FMQ="--num-samples 8 --consistency-warmup 500 --consistency-anneal-end 3000 --online-steps 0"
SAC="--hidden-dim 128 --critic-hidden-dims 128 128 128 --actor-lr 1e-3 --critic-lr 1e-3"
SAC="$SAC --policy flow-g --online-steps 0"

python benchmark/launch.py --seeds 0 1 2 --out runs/no-gpu/pointmaze \
    --algos gsflow flowq fmq sac_flow --tasks pointmaze-medium "$@"

python benchmark/launch.py --seeds 0 1 2 --out runs/no-gpu/antmaze \
    --algos "gsflow $NETS --prior-hidden-dims 128 --num-candidates 4 --n-step 10" \
    "flowq $NETS --n-step 10" "fmq $NETS $FMQ --horizon 3" \
    "sac_flow $SAC --horizon-length 3 --beta 10" \
    --tasks "antmaze-large --offline-steps 12000 --eval-interval 6000" "$@" -- $SMALL

python benchmark/launch.py --seeds 0 1 2 --out runs/no-gpu/cube \
    --algos "gsflow $NETS --prior-hidden-dims 128 --num-candidates 4 --n-step 5 --alpha 100" \
    "flowq $NETS --n-step 5" "fmq $NETS $FMQ" "sac_flow $SAC --beta 100" \
    --tasks "cube-single --offline-steps 12000 --eval-interval 6000" "$@" -- $SMALL
