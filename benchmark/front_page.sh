#!/usr/bin/env bash
# The pictures at README's top: trains the four methods in the same maze (seed 0, short runs, about
# half an hour on two CPU cores), then draws their policies side by side and their curves.
#   bash benchmark/front_page.sh             finished runs are not run again
set -euo pipefail
cd "$(dirname "$0")/.."
RUNS=runs/front OUT=benchmark/results/front

python benchmark/launch.py --tasks pointmaze-medium --seeds 0 --out $RUNS --workers 1 --algos \
    "gsflow" "flowq --eval-candidates 1" "fmq --eval-modes best-of-n --online-steps 0" \
    "sac_flow --online-steps 5000" -- --eval-interval 1000 --eval-episodes 20

run_of() { ls -d $RUNS/"$1"/pointmaze-medium/*/*/ | tail -n 1; }
python benchmark/see.py "$(run_of gsflow)" "$(run_of flowq)" "$(run_of fmq)" "$(run_of sac_flow)" \
    --out $OUT/policies.gif --value --episodes 8 --every 4 --size 240 --gif-size 240 --fps 20
python benchmark/report.py $RUNS --out $RUNS/report --headline
cp $RUNS/report/curves_collected.png $OUT/curves.png
