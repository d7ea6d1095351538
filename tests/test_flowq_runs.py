"""FlowQ's runs: resume, evaluation, seeds, bad flags, and a point maze that it solves."""

import json
import signal
import time

import jax
import numpy as np
import pytest
from conftest import ROOT, load_script
from helpers import assert_same_end, launch, only_run, rows_without_time, start

TINY = "--hidden-dims 8 8 --batch-size 16 --flow-steps 2 --eval-episodes 3 --eval-candidates 4"
TINY += " --log-interval 20 --offline-steps 200 --eval-interval 100 --checkpoint-interval 100"
TINY = TINY.split()
VARIANTS = {  # what a state may hold: no critic; critic, value, base flow and schedule
    "toy": "--env-id energy-toy --schedule learned --schedule-warmup 50",
    "maze": "--critic iql --schedule learned --schedule-warmup 50 --lr-decay True",
}
VARIANTS = {name: flags.split() for name, flags in VARIANTS.items()}


@pytest.fixture(scope="module")
def flowq():
    return load_script(ROOT / "algos" / "flowq.py")


@pytest.fixture(scope="module")
def references(flowq, data_dir, tmp_path_factory):
    """Runs that nobody interrupted, two seeds each."""
    runs = {}
    for name, flags in VARIANTS.items():
        directory = tmp_path_factory.mktemp(name)
        flags = [*TINY, *flags, "--dataset-dir", data_dir, "--num-seeds", 2]
        launch(flowq, *flags, out_dir=directory)
        runs[name] = only_run(directory)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_leaves_what_it_should(references, name):
    run = references[name]
    result = json.loads((run / "result.json").read_text())
    measured = ["success_n1", "return_n1", "length_n1", "success_n4", "return_n4", "length_n4"]
    if name == "toy":
        assert result["dataset_source"] == "generated"
    else:
        assert result["dataset_source"] == "official"
    assert list(result["episodes"]) == measured and result["steps"] == 200
    assert "eval/success_n1_last_three" in result
    assert np.shape(result["episodes"]["success_n4"]) == (2, 3)
    rows = rows_without_time(run)
    assert [r["step"] for r in rows[::2]] == [str(s) for s in range(20, 201, 20)]
    assert float(rows[0]["train/c_25"]) == 0.75 != float(rows[-1]["train/c_25"])
    assert {r["step"] for r in rows if r["eval/success_n4"]} == {"200"}  # at the end of the phase
    assert {r["step"] for r in rows if r["eval/success_n1"]} > {"200"}
    args = json.loads((run / "args.json").read_text())["args"]
    unset = ("resume", "evaluate", "dataset", "wandb_project")
    assert None not in [v for k, v in args.items() if k not in unset]


@pytest.mark.slow
@pytest.mark.parametrize("name,number", [("toy", signal.SIGTERM), ("maze", signal.SIGKILL)])
def test_interrupted_and_resumed_equals_uninterrupted(
    flowq, references, data_dir, tmp_path, name, number
):
    """The last checkpoint and all metrics are the same bytes."""
    flags = [*TINY, *VARIANTS[name], "--dataset-dir", data_dir, "--num-seeds", 2]
    process = start("flowq", *flags, "--checkpoint-interval", 10, out_dir=tmp_path)
    while not list(tmp_path.glob("*/checkpoint.msgpack")):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(number)
    process.wait()
    assert process.returncode == (143 if number == signal.SIGTERM else -9)
    run = only_run(tmp_path)
    launch(flowq, "--resume", run)
    whole = references[name]
    assert_same_end(flowq, run, whole)
    assert rows_without_time(run) == rows_without_time(whole)


@pytest.mark.slow
def test_a_vmapped_seed_equals_its_single_run(flowq, references, data_dir, tmp_path):
    flags = [*TINY, *VARIANTS["maze"], "--dataset-dir", data_dir, "--seed", 1]
    launch(flowq, *flags, out_dir=tmp_path)
    trees = [flowq.load_checkpoint(r)[0]["state"] for r in (references["maze"], only_run(tmp_path))]
    for tree in trees:  # without effect at first, so that Adam's first step follows rounding
        del tree["params"]["schedule"]["params"]["MLP_0"]["Dense_2"]["bias"]
    together, alone = (jax.tree.leaves(t["params"] | {"ema": t["ema"]}) for t in trees)
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a[1], b[0], atol=1e-5)
    kernels = [a for a in together if a.ndim == 3 and a.shape[1] > 1]
    assert kernels and all(not np.array_equal(a[0], a[1]) for a in kernels)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_evaluate_repeats_the_final_evaluation(flowq, references, capsys, name):
    assert flowq.command_line(flowq.main, flowq.Args, ["--evaluate", str(references[name])]) == 0
    out = capsys.readouterr().out
    result = json.loads((references[name] / "result.json").read_text())
    for mode, first in (("n1", 2), ("n4", 5)):
        for i in range(2):
            kinds = ("success", "return", "length")
            expected = [f"{np.mean(result['episodes'][f'{k}_{mode}'][i]):.2f}" for k in kinds]
            assert out.splitlines()[first + i].split() == [str(i), *expected]


@pytest.mark.slow
def test_evaluate_with_other_steps_and_candidates(flowq, references):
    """The ablation of K on one checkpoint: from the same noise other steps lead elsewhere."""
    run, returns = references["toy"], {}
    for steps in ("2", "50"):
        argv = ["--evaluate", str(run), "--flow-steps", steps, "--eval-candidates", "2"]
        results = flowq.main(flowq.read_args(run, argv, flowq.Args()))
        assert list(results)[::3] == ["success_n1", "success_n2"]
        returns[steps] = results["return_n1"]
    stored = json.loads((run / "result.json").read_text())["episodes"]["return_n1"]
    np.testing.assert_allclose(returns["2"], stored, rtol=1e-6)  # the run's own K
    assert np.abs(returns["50"] - stored).min() > 1e-4


BAD_FLAGS = {
    "unknown task": ("--env-id cube-singel", "close matches: cube-single"),
    "nothing to do": ("--offline-steps 0", "nothing to train"),
    "learned form": ("--schedule learned --velocity-form field", "needs --velocity-form score"),
    "exact elsewhere": ("--critic exact", "--critic exact needs a task file"),
    "learned nothing": ("--schedule learned --guidance-lambda 0", "--guidance-lambda above 0"),
    "samples of iql": ("--critic iql --max-backup-samples 10", "needs --critic td"),
    "join of iql": ("--critic iql --q-agg min", "--q-agg needs --critic td"),
    "expectile of td": ("--expectile 0.8", "--expectile needs --critic iql"),
    "idle warm-up": ("--schedule-warmup 10", "--schedule-warmup needs --schedule learned"),
    "schedule of weights": ("--velocity-form weighted --schedule t2", "--schedule needs"),
    "place of posterior": ("--velocity-form posterior --grad-at mean", "--grad-at needs"),
    "length of weights": ("--velocity-form weighted --guidance-clip 1", "--guidance-clip needs"),
    "choice of one": ("--eval-candidates 1 --eval-choice softmax", "--eval-choice needs"),
    "toy's rewards": ("--env-id energy-toy --reward-transform standardize", "a critic that learns"),
    "toy's discount": ("--env-id energy-toy --gamma 0.9", "--gamma needs a critic that learns"),
    "toy's target": ("--env-id energy-toy --tau 0.1", "--tau needs a critic that learns"),
    "toy's steps": ("--env-id energy-toy --n-step 3", "--n-step needs a critic that learns"),
    "toy's join": ("--env-id energy-toy --guidance-q min", "--guidance-q needs a critic"),
    "toy's layers": ("--env-id energy-toy --critic-hidden-dims 8", "needs a critic that learns"),
    "toy's norm": ("--env-id energy-toy --no-critic-layer-norm", "needs a critic that learns"),
    "no samples": ("--max-backup-samples 0", "--max-backup-samples is 0"),
    "no candidates": ("--eval-candidates 0", "--eval-candidates is 0"),
    "flow steps": ("--flow-steps 0", "--flow-steps is 0"),
    "lambda": ("--guidance-lambda -1", "--guidance-lambda is -1"),
    "nan lambda": ("--guidance-lambda nan", "--guidance-lambda is nan"),
    "guidance clip": ("--guidance-clip -1", "--guidance-clip is -1"),
    "warm-up": ("--schedule learned --schedule-warmup -1", "--schedule-warmup is -1"),
    "expectile": ("--critic iql --expectile 1", "--expectile must be below 1"),
    "average": ("--ema-decay 1.5", "--ema-decay must be below 1"),
    "gamma": ("--gamma 1.5", "--gamma is 1.5"),
    "empty layer": ("--critic-hidden-dims 64 0", "--critic-hidden-dims needs layers"),
    "toy on host": ("--env-id energy-toy --env-backend host", "has no host environment"),
    "backend": ("--env-id antmaze-large --env-backend jax", "has no jax environment"),
    "resume nothing": ("--resume nowhere", "not a run directory"),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(flowq, tmp_path, capsys, monkeypatch, name):
    """One sentence with the remedy on stderr, exit code 2, nothing written."""
    flags, message = BAD_FLAGS[name]
    monkeypatch.chdir(tmp_path)
    assert flowq.command_line(flowq.main, flowq.Args, flags.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert list(tmp_path.iterdir()) == []


def test_idle_flags_are_used_where_they_have_an_effect(flowq):
    """What is refused above is accepted, and kept, where the method makes use of it."""
    for flags in (
        dict(critic="td", q_agg="min", max_backup_samples=2),
        dict(critic="iql", expectile=0.7),
        dict(schedule="learned", schedule_warmup=10),
        dict(velocity_form="posterior", guidance_clip=1.0, eval_choice="softmax"),
        dict(grad_at="denoised", actor_learning_rate=1e-4, guidance_warmup=10),
        dict(env_id="energy-toy", critic="td", gamma=0.5, tau=0.1, n_step=3),
    ):
        args = flowq.Args(**flags)
        resolved = vars(flowq.resolve(args, flowq.parse_task(args.env_id)))
        assert {k: resolved[k] for k in flags} == flags


@pytest.mark.parametrize("flags", ["--schedule t3", "--velocity-form exact", "--online-steps 10"])
def test_flags_that_do_not_parse(flowq, tmp_path, capsys, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        flowq.command_line(flowq.main, flowq.Args, flags.split())
    assert exit.value.code == 2 and "Traceback" not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_flags_that_do_not_fit_a_run(flowq, references, capsys):
    for name, flags, message in (
        ("maze", "--guidance-lambda 1", "--guidance-lambda was 100.0"),
        ("maze", "--flow-steps 3", "--flow-steps was 2"),
        ("maze", "--offline-steps 200", "is complete at step 200"),
        ("toy", "--offline-steps 300", "--lr-decay ends at --offline-steps, 200"),
    ):
        argv = ["--resume", str(references[name]), *flags.split()]
        assert flowq.command_line(flowq.main, flowq.Args, argv) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


def test_task_table(flowq):
    """Full-size settings where no quick ones are asked for; explicit flags win."""

    def resolved(**flags):
        args = flowq.Args(**flags)
        return flowq.resolve(args, flowq.parse_task(args.env_id))

    cube = resolved(env_id="cube-single")
    assert cube.hidden_dims == cube.actor_hidden_dims == (512,) * 4 and cube.n_step == 1
    assert (cube.gamma, cube.q_agg, cube.guidance_lambda) == (0.99, "mean", 30.0)
    assert resolved(env_id="antmaze-large").q_agg == "min"
    assert resolved(env_id="antmaze-medium").q_agg == "mean"
    giant = resolved(env_id="antmaze-giant")
    assert (giant.gamma, giant.q_agg) == (0.995, "min")
    assert resolved(env_id="humanoidmaze-large").gamma == 0.995
    maze = resolved(guidance_lambda=0.0, n_step=1)
    assert (maze.guidance_lambda, maze.n_step, maze.hidden_dims) == (0.0, 1, (128,) * 3)


@pytest.mark.slow
def test_point_maze_is_solved(flowq, tmp_path):
    """A few thousand updates with guidance; one sample per step, no choice among candidates."""
    task = flowq.parse_task("pointmaze-medium")
    args = flowq.resolve(flowq.Args(eval_candidates=1), task)
    env = flowq.make_jax_env(task, args)
    policies = flowq.evaluation_policies(flowq.make_networks(args, 2, task), args)
    untrained = flowq.start_states(args, 2, 2, np.zeros(2), np.ones(2))
    before = flowq.make_evaluate(task, env, policies, args)(untrained, 0)
    assert before["success_n1"].mean() <= 0.02

    flags = ["--offline-steps", 5_000, "--eval-interval", 5_000, "--eval-candidates", 1]
    launch(flowq, *flags, out_dir=tmp_path)
    result = json.loads((only_run(tmp_path) / "result.json").read_text())
    assert len(result["episodes"]["success_n1"][0]) == 50
    assert result["eval/success_n1"] >= 0.8
