#!/usr/bin/env bash
# FlowQ (arXiv 2505.14139). Its tables are on D4RL, and no number of them was readable to us: what
# follows is the same question on OGBench and on D4RL, at full budget, with flow matching without
# guidance (lambda 0) as the reference in the same run.
#   bash benchmark/flowq.sh                                 print all commands
#   bash benchmark/flowq.sh --workers 4 --devices 0 1 2 3   run them on four GPUs
#   bash benchmark/flowq.sh --dry-run                       count runs, updates and GPU hours
# One seed of 1M updates takes 11 PFLOP. Then: python benchmark/report.py runs/flowq-tables
set -euo pipefail
cd "$(dirname "$0")/.."

# Sweep of lambda for both schedules, 3 seeds, default task of each environment. Evaluations report
# one sample (n1) beside the best of 50 (n50): only n1 tests the guidance. The seven values of lambda
# of a seed train as one program (--pack).
LAMBDAS=(0 0.3 1 3 10 30 100)
SWEEP=()
for schedule in t t2_over_1mt; do
    for lambda in "${LAMBDAS[@]}"; do
        SWEEP+=("$schedule-$lambda=flowq --schedule $schedule --guidance-lambda $lambda")
    done
done
python benchmark/launch.py --algos "${SWEEP[@]}" --seeds 0 1 2 \
    --tasks antmaze-large antmaze-giant humanoidmaze-medium humanoidmaze-large antsoccer-arena \
    cube-single cube-double scene puzzle-3x3 puzzle-4x4 --out runs/flowq-tables/lambda --pack "$@"

# All five tasks of each environment with the default lambda (put the sweep's winner in), 5 seeds.
ALL_TASKS=()
for env in antmaze-large antmaze-giant humanoidmaze-medium cube-single cube-double scene; do
    for i in 1 2 3 4 5; do ALL_TASKS+=("$env-task$i"); done
done
python benchmark/launch.py --algos flowq "bc=flowq --guidance-lambda 0" --seeds 0 1 2 3 4 \
    --tasks "${ALL_TASKS[@]}" --out runs/flowq-tables/offline "$@"

# Figure of return against the schedule h(t), with the learned one.
python benchmark/launch.py --algos "t=flowq --schedule t" "t2=flowq --schedule t2" \
    "t2_over_1mt=flowq --schedule t2_over_1mt" "learned=flowq --schedule learned" \
    --tasks antmaze-large cube-single --seeds 0 1 2 3 4 --out runs/flowq-tables/schedule "$@"

# Forms of the guided velocity, the gradient where the unguided flow leads, and the critic without
# samples.
python benchmark/launch.py --algos "score=flowq" "drop-time=flowq --velocity-form drop-time" \
    "field=flowq --velocity-form field" "posterior=flowq --velocity-form posterior" \
    "weighted=flowq --velocity-form weighted" "denoised=flowq --grad-at denoised" \
    "iql=flowq --critic iql" \
    --tasks antmaze-large cube-single --seeds 0 1 2 --out runs/flowq-tables/forms "$@"

# Figure of the toy: densities by schedule.
python benchmark/launch.py --algos "t=flowq --schedule t" "t2=flowq --schedule t2" \
    "t2_over_1mt=flowq --schedule t2_over_1mt" "learned=flowq --schedule learned" \
    --tasks energy-toy --seeds 0 --out runs/flowq-tables/toy "$@"

# D4RL: locomotion and antmazes, with Diffusion-QL's weights as a start (benchmark/tasks/d4rl.py).
LOCOMOTION=()
for robot in halfcheetah hopper walker2d; do
    for kind in medium medium-replay medium-expert; do LOCOMOTION+=("d4rl/$robot-$kind-v2"); done
done
python benchmark/launch.py --algos flowq "bc=flowq --guidance-lambda 0" --seeds 0 1 2 3 4 \
    --tasks d4rl/antmaze-umaze-v2 d4rl/antmaze-umaze-diverse-v2 d4rl/antmaze-medium-play-v2 \
    d4rl/antmaze-medium-diverse-v2 d4rl/antmaze-large-play-v2 d4rl/antmaze-large-diverse-v2 \
    "${LOCOMOTION[@]}" --out runs/flowq-tables/d4rl "$@"
