#!/usr/bin/env bash
# Every published figure of SAC Flow (arXiv 2509.25756) whose tasks are here, at full budget. The
# paper shows curves and has no per-task table: compare shapes and orders. The published curves of
# MuJoCo are the training return of the stochastic policy, charts/episodic_return; evaluations with
# and without noise are ours.
#   bash benchmark/sac_flow.sh                                 print all commands
#   bash benchmark/sac_flow.sh --workers 4 --devices 0 1 2 3   run them on four GPUs
#   bash benchmark/sac_flow.sh --dry-run                       count runs, updates and GPU hours
# One seed takes 15 to 25 PFLOP (MuJoCo, 1M steps), about 19 (cubes). Then:
#   python benchmark/report.py runs/sac-flow-tables
set -euo pipefail
cd "$(dirname "$0")/.."
FIVE="-- --num-seeds 5" # seeds 0 to 4 in one program

# From scratch on MuJoCo, 1M steps, 5 seeds: Flow-G, Flow-T, the naive flow that both repair (also in
# the released form), and SAC with a Gaussian, with its own critics and with those of the flows, which
# separates the policy from the critic. Published with the -v4 environments.
POLICIES=("flow-g=sac_flow --policy flow-g" "flow-t=sac_flow --policy flow-t"
    "naive=sac_flow --policy mlp" "naive-released=sac_flow --policy mlp --renorm-time"
    "gaussian=sac_flow --policy gaussian"
    "gaussian-crossq=sac_flow --policy gaussian --critic brn")
python benchmark/launch.py --algos "${POLICIES[@]}" --seeds 0 \
    --tasks Hopper-v4 Walker2d-v4 HalfCheetah-v4 Ant-v4 Humanoid-v4 HumanoidStandup-v4 \
    --out runs/sac-flow-tables/mujoco "$@" $FIVE

# Offline-to-online on OGBench's cubes, 1M + 1M. Quadruple was published with 100M rows of data.
python benchmark/launch.py --algos "flow-g=sac_flow --policy flow-g" \
    "flow-t=sac_flow --policy flow-t" "naive=sac_flow --policy mlp" --seeds 0 \
    --tasks cube-double-task4 cube-triple-task4 cube-quadruple-task4 \
    --out runs/sac-flow-tables/cubes "$@" $FIVE

# The paper's noise: one fixed deviation with drift correction, and target entropy 0, which it cannot
# reach.
FIXED="--noise fixed --drift-correction --target-entropy 0"
python benchmark/launch.py --algos "fixed-g=sac_flow --policy flow-g $FIXED" \
    "fixed-t=sac_flow --policy flow-t $FIXED" --tasks Hopper-v4 HalfCheetah-v4 Ant-v4 \
    --seeds 0 --out runs/sac-flow-tables/fixed-noise "$@" $FIVE

# From scratch on manipulation tasks, where the paper says that no method succeeds.
python benchmark/launch.py --algos "flow-g=sac_flow --mode online --policy flow-g" \
    "flow-t=sac_flow --mode online --policy flow-t" --tasks cube-double-task4 robomimic/can-mh \
    --seeds 0 --out runs/sac-flow-tables/scratch "$@" $FIVE

# Number of flow steps K on Ant.
python benchmark/launch.py --algos "g4=sac_flow --policy flow-g --flow-steps 4" \
    "g7=sac_flow --policy flow-g --flow-steps 7" "g10=sac_flow --policy flow-g --flow-steps 10" \
    "t4=sac_flow --policy flow-t --flow-steps 4" "t7=sac_flow --policy flow-t --flow-steps 7" \
    "t10=sac_flow --policy flow-t --flow-steps 10" --tasks Ant-v4 --seeds 0 \
    --out runs/sac-flow-tables/flow-steps "$@" $FIVE

# Width of Flow-G on Ant.
python benchmark/launch.py --algos "w64=sac_flow --hidden-dim 64" \
    "w256=sac_flow --hidden-dim 256" "w512=sac_flow --hidden-dim 512" --tasks Ant-v4 \
    --seeds 0 --out runs/sac-flow-tables/width "$@" $FIVE

# RoboMimic, offline-to-online: lift, can and square from several operators' demonstrations.
python benchmark/launch.py --algos "flow-g=sac_flow --policy flow-g" \
    "flow-t=sac_flow --policy flow-t" --tasks robomimic/lift-mh robomimic/can-mh \
    robomimic/square-mh --seeds 0 --out runs/sac-flow-tables/robomimic "$@" $FIVE
