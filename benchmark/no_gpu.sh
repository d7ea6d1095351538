#!/usr/bin/env bash
# The "no GPU" table: small networks, n-step targets or chunks, short runs; each command takes less
# than 20 minutes on two CPU cores. Results and times stand in README, "Without a GPU".
#   bash benchmark/no_gpu.sh                          print all commands
#   bash benchmark/no_gpu.sh --workers 2              run them, two at a time
# Needs the data: python benchmark/collect.py antmaze-large; python benchmark/collect.py cube-single
# --num-transitions 200000. Then: python benchmark/report.py runs/no-gpu
set -euo pipefail
cd "$(dirname "$0")/.."

NETS="--hidden-dims 128 128 128"
# a latent per action dimension and a stronger KL term keep the prior's noise as wide as N(0, I), on
# which the teacher is trained (with the defaults 1.5 to 3.6 times as wide on antmaze-large)
GSFLOW="gsflow $NETS --learning-rate 1e-3 --tau 0.02 --flow-steps 5 --kl-weight 0.1"
FLOWQ="flowq $NETS --learning-rate 1e-3 --guidance-lambda 10 --eval-candidates 4"
FLOWQ="$FLOWQ --offline-steps 30000 --eval-interval 10000"
FMQ="fmq $NETS --tau 0.01 --num-samples 8 --consistency-warmup 500 --consistency-anneal-end 3000"
FMQ="$FMQ --online-steps 0"
SAC="sac_flow --hidden-dim 128 --critic-hidden-dims 128 128 128 --actor-lr 1e-3 --critic-lr 1e-3"
SAC="$SAC --policy flow-g --online-steps 0"

python benchmark/launch.py --seeds 0 1 2 --out runs/no-gpu/pointmaze \
    --algos gsflow flowq fmq sac_flow --tasks pointmaze-medium "$@"

# gamma 0.995: with 0.99 the values of the first half of the way hardly differ
python benchmark/launch.py --seeds 0 1 2 --out runs/no-gpu/antmaze --tasks antmaze-large \
    --algos "$GSFLOW --latent-dim 8 --prior-hidden-dims 128 --num-candidates 8 --alpha 30 --n-step 25
        --gamma 0.995 --offline-steps 20000 --eval-interval 10000" \
    "$FLOWQ --n-step 25 --gamma 0.995 --tau 0.01" \
    "$FMQ --horizon 3 --learning-rate 5e-4 --q-agg-offline min --gamma 0.995
        --offline-steps 20000 --eval-interval 10000" \
    "$SAC --horizon-length 3 --beta 10 --tau 0.01 --offline-steps 12000 --eval-interval 4000" \
    "$@" -- --normalize-obs True --eval-episodes 25

python benchmark/launch.py --seeds 0 1 2 --out runs/no-gpu/cube --tasks cube-single \
    --algos "$GSFLOW --latent-dim 5 --prior-hidden-dims 256 256 --num-candidates 4 --alpha 300
        --n-step 5 --offline-steps 16000 --eval-interval 8000" \
    "$FLOWQ --n-step 5 --tau 0.02" \
    "$FMQ --learning-rate 1e-3 --offline-steps 12000 --eval-interval 6000" \
    "$SAC --beta 100 --tau 0.02 --offline-steps 14000 --eval-interval 7000" \
    "$@" -- --normalize-obs True --eval-episodes 25
