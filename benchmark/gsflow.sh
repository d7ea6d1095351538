#!/usr/bin/env bash
# Every published table and figure of GSFlow (arXiv 2603.14245), at full budget: sizes, steps and
# presets are the scripts' defaults. A command prints what it would run; arguments of this script
# are passed on, so:
#   bash benchmark/gsflow.sh                                print all commands
#   bash benchmark/gsflow.sh --workers 4 --devices 0 1 2 3  run them on four GPUs
#   bash benchmark/gsflow.sh --dry-run                      count runs, updates and GPU hours
# For SLURM, copy one command and add --slurm FILE. One seed of 1M updates takes 62 PFLOP (GSFlow)
# or 12 PFLOP (FQL). Then: python benchmark/report.py runs/gsflow-tables
set -euo pipefail
cd "$(dirname "$0")/.."

GSFLOW="gsflow"
FQL="fql=gsflow --prior gaussian --student deterministic"

# Offline OGBench table, default tasks of ten environments: GSFlow and its baseline FQL. The paper
# has 5 seeds; alpha of GSFlow is published for cube-double alone, sweep it elsewhere (below). On
# five of the tasks also the offline-to-online table: from the end of these runs 1M online steps.
# (FQL's alpha for both phases is another one on two tasks, whose offline phase is then run too.)
python benchmark/launch.py --algos "$GSFLOW" "$FQL" --seeds 0 1 2 3 4 \
    --tasks antmaze-large antmaze-giant humanoidmaze-large cube-single puzzle-3x3 \
    --out runs/gsflow-tables/ogbench "$@"
python benchmark/launch.py --share-offline --algos "$GSFLOW" "$FQL" \
    "gsflow-online=$GSFLOW --online-steps 1000000" "fql-online=${FQL#*=} --online-steps 1000000" \
    --tasks humanoidmaze-medium antsoccer-arena cube-double scene puzzle-4x4 --seeds 0 1 2 3 4 \
    --out runs/gsflow-tables/ogbench "$@"

# Table of the number of candidates N = 5, 10, 15.
python benchmark/launch.py --algos "n5=gsflow --num-candidates 5" "n10=gsflow" \
    "n15=gsflow --num-candidates 15" --tasks cube-double --seeds 0 1 2 3 4 \
    --out runs/gsflow-tables/candidates "$@"

# Entropy-control ablation, offline-to-online: no entropy term, a fixed temperature, the term
# online alone; the deterministic student keeps the guided prior. Beside them: gsflow-online and
# fql-online of the table above.
python benchmark/launch.py --algos "no-entropy=gsflow --entropy off" \
    "fixed=gsflow --entropy fixed" "entropy-online=gsflow --entropy online" \
    "deterministic=gsflow --student deterministic" \
    --tasks puzzle-4x4 --seeds 0 1 2 3 4 --out runs/gsflow-tables/entropy "$@" \
    -- --online-steps 1000000

# Not a table of the paper: the sweep of alpha for tasks without a published value; the seven alphas
# of a seed train as one program (--pack).
python benchmark/launch.py --algos "a3=gsflow --alpha 3" "a10=gsflow --alpha 10" \
    "a30=gsflow --alpha 30" "a50=gsflow --alpha 50" "a100=gsflow --alpha 100" \
    "a300=gsflow --alpha 300" "a1000=gsflow --alpha 1000" --seeds 0 1 2 \
    --tasks antmaze-large antmaze-giant humanoidmaze-medium humanoidmaze-large antsoccer-arena \
    cube-single scene puzzle-3x3 puzzle-4x4 --out runs/gsflow-tables/alpha --pack "$@"

# Figure of the toy: multi-crescent, offline, then online.
python benchmark/launch.py --algos "$GSFLOW" "$FQL" --tasks multi-crescent --seeds 0 \
    --out runs/gsflow-tables/toy "$@" -- --online-steps 6000 --num-seeds 4

# Table of training and inference time: python benchmark/speed.py --methods GSFlow FQL

# D4RL: antmazes and cloned Adroit, as FQL trained: 500K offline, or 1M offline and 1M online.
ONLINE="--offline-steps 1000000 --online-steps 1000000"
python benchmark/launch.py --algos "$GSFLOW" "$FQL" \
    "gsflow-online=$GSFLOW $ONLINE" "fql-online=${FQL#*=} $ONLINE" \
    --tasks d4rl/antmaze-umaze-v2 d4rl/antmaze-umaze-diverse-v2 d4rl/antmaze-medium-play-v2 \
    d4rl/antmaze-medium-diverse-v2 d4rl/antmaze-large-play-v2 d4rl/antmaze-large-diverse-v2 \
    d4rl/pen-cloned-v1 d4rl/door-cloned-v1 d4rl/hammer-cloned-v1 d4rl/relocate-cloned-v1 \
    --seeds 0 1 2 3 4 --out runs/gsflow-tables/d4rl "$@"

# The paper's pixel table needs environments that are not here.
