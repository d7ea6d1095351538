"""Flags with several values: each arm of a grid is the run that it would be alone."""

import json
import os
import re
import shutil
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, SCRIPTS, load_script
from helpers import assert_same_end, end_of, finish, launch, only_run, rows_without_time, start

SHORT = "--batch-size 8 --offline-steps 5 --log-interval 5 --eval-interval 5 --eval-episodes 2"
ONLINE = " --online-steps 8 --checkpoint-interval 5"
FLAGS = {  # a run in which every flag below matters
    "gsflow": "--hidden-dims 8 --prior-hidden-dims 8 --num-candidates 2 --flow-steps 2" + ONLINE,
    "flowq": "--hidden-dims 8 --flow-steps 2 --eval-candidates 2 --critic iql",
    "fmq": "--hidden-dims 8 --num-samples 2 --horizon 2 --eval-modes best-of-n --learning-starts 4"
    " --consistency-warmup 1 --consistency-anneal-end 4" + ONLINE,
    "sac_flow": "--hidden-dim 8 --d-model 8 --critic-hidden-dims 8 --flow-steps 2 --autotune True"
    " --learning-starts 4" + ONLINE,
}
VALUES = {  # of each flag that a grid may vary, two
    "gsflow": dict(
        learning_rate=(1e-3, 3e-3), tau=(0.01, 0.2), alpha=(3.0, 10.0), online_alpha=(3.0, 1.0),
        recon_weight=(1.0, 2.0), kl_weight=(0.01, 0.5), target_entropy=(-1.0, -3.0),
        init_temperature=(1.0, 2.0), offline_td_temperature=(0.5, 1.0),
        online_td_temperature=(1.0, 0.3), behavior_temperature=(1.0, 2.0),
    ),
    "flowq": dict(
        learning_rate=(1e-3, 3e-3), actor_learning_rate=(1e-3, 3e-3), tau=(0.01, 0.2),
        ema_decay=(0.99, 0.9), guidance_lambda=(3.0, 10.0), expectile=(0.9, 0.7),
    ),
    "fmq": dict(
        learning_rate=(1e-3, 3e-3), tau=(0.01, 0.2), gamma=(0.99, 0.9), eta=(1.0, 2.0),
        beta=(0.3, 1.0),
    ),
    "sac_flow": dict(
        actor_lr=(1e-3, 3e-3), critic_lr=(1e-3, 3e-3), alpha_lr=(1e-3, 3e-3), adam_b1=(0.9, 0.5),
        tau=(0.01, 0.2), gamma=(0.99, 0.9), sigma=(0.1, 0.2), sigma_inference=(0.1, 0.2),
        ent_coef=(0.1, 0.3), target_entropy=(-9.0, -12.0), beta=(10.0, 30.0),
        beta_online=(10.0, 3.0),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The task file that README shows: a small environment inside the program, and its data."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (text,) = [b for b in blocks if b.startswith("# my_task.py")]
    path = tmp_path_factory.mktemp("task") / "my_task.py"
    path.write_text(text)
    return f"{path}:reach"


def as_flags(values):
    return [w for k, v in values.items() for w in ("--" + k.replace("_", "-"), *np.ravel(v))]


def assert_close(member, alone):
    """Up to the last bits: numbers that are traced, and sums in another order, round differently;
    the largest difference seen in these short runs is 3e-7."""
    for path, x in alone.items():
        np.testing.assert_allclose(member[path], x, rtol=1e-5, atol=2e-6, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_an_arm_is_the_run_that_it_would_be_alone(name, task, tmp_path, monkeypatch):
    """All flags that may have several values, as arms: the first values; for each flag its second
    one, which changes the result; all second values. The first and last end as single runs do."""
    script, values = load_script(ROOT / "algos" / f"{name}.py"), VALUES[name]
    assert sorted(script.grid_flags(script.Args)) == sorted(values)
    last = len(values) + 1
    column = lambda i, v: [v[arm in (1 + i, last)] for arm in range(last + 1)]
    given = {0: {k: v[0] for k, v in values.items()}, last: {k: v[1] for k, v in values.items()}}
    given["grid"] = {k: column(i, v) for i, (k, v) in enumerate(values.items())}
    monkeypatch.setattr(script, "combine", lambda args: args)  # these arms, not all combinations
    common, ends = ["--env-id", task, *SHORT.split(), *FLAGS[name].split(), "--seed", 3], {}
    for kind, own in given.items():
        launch(script, *common, *as_flags(own), out_dir=tmp_path / str(kind))
        ends[kind], _ = end_of(script, only_run(tmp_path / str(kind)))
    grid = {k: x for k, x in ends.pop("grid").items() if not k.endswith("['arm']")}
    for arm, alone in ends.items():
        assert grid.keys() == alone.keys()
        assert_close({k: x[arm] for k, x in grid.items()}, {k: x[0] for k, x in alone.items()})
    for i, flag in enumerate(values):
        assert any((x[0] != x[1 + i]).any() for x in grid.values()), f"--{flag} changes nothing"


# ---- one run, from its flags to its report ----
TINY = "--hidden-dims 8 --prior-hidden-dims 8 --batch-size 8 --num-candidates 2 --flow-steps 2"
TINY += " --eval-episodes 2 --log-interval 10 --eval-interval 20 --checkpoint-interval 20"
BANDIT = ["--env-id", "multi-crescent", *TINY.split(), "--offline-steps", 20]
BOTH = [*BANDIT, "--online-steps", 20]
GRID = ["--alpha", 1, 30, "--num-seeds", 2, "--seed", 5]
NAMES = [f"alpha={a},seed={s}" for a in (1, 30) for s in (5, 6)]


@pytest.fixture(scope="module")
def grid(gsflow, tmp_path_factory):
    """(directory, output) of a run with two arms, two seeds of each, both phases."""
    directory = tmp_path_factory.mktemp("grid")
    out, _ = launch(gsflow, *BOTH, *GRID, out_dir=directory)
    return only_run(directory), out


def test_everything_names_the_members(gsflow, grid):
    run, out = grid
    assert {f"tb_{name}" for name in NAMES} == {p.name for p in run.glob("tb_*")}
    rows = rows_without_time(run)
    assert [f"{r['arm']},seed={r['seed']}" for r in rows] == NAMES * 4
    facts, result = (json.loads((run / f"{n}.json").read_text()) for n in ("args", "result"))
    numbers = {f"alpha={a}": dict(alpha=a, online_alpha=a) for a in (1.0, 30.0)}
    assert facts["arms"] == {k.replace(".0", ""): v for k, v in numbers.items()}
    assert result["seeds"] == [5, 6, 5, 6] and np.shape(result["episodes"]["return"]) == (4, 2)
    for i, (arm, own) in enumerate(result["arms"].items()):
        returns = result["episodes"]["return"][2 * i : 2 * i + 2]
        assert own["seeds"] == [5, 6] and own["episodes"]["return"] == returns
        assert own["eval/return"] == pytest.approx(np.mean(returns))
        assert len(re.findall(f"step +20  {arm}  .*return", out)) == 1 == out.count(f"\n{arm}  ")
        evaluated = [
            float(r["eval/success"]) for r in rows if r["arm"] == arm and r["eval/success"]
        ]
        assert own["eval/success_last_three"] == pytest.approx(np.mean(evaluated))
    (state, facts), (offline, _) = (
        gsflow.load_checkpoint(run),
        gsflow.load_checkpoint(run, "offline"),
    )
    for tree in (state["state"], offline["state"]):
        assert tree["arm"].tolist() == [0, 0, 1, 1] and tree["seed"].tolist() == [5, 6, 5, 6]
    assert np.shape(facts["evals"]) == (2, 4)


def test_a_member_equals_its_single_run(gsflow, grid, tmp_path):
    launch(gsflow, *BOTH, "--alpha", 30, "--seed", 6, out_dir=tmp_path)
    ends = [end_of(gsflow, run)[0] for run in (grid[0], only_run(tmp_path))]
    member = {k: x[3] for k, x in ends[0].items()}
    assert_close(member, {k: x[0] for k, x in ends[1].items()})


@pytest.mark.slow
def test_a_resumed_grid_ends_the_same(gsflow, grid, tmp_path):
    launch(gsflow, *BANDIT, *GRID, out_dir=tmp_path)
    run = only_run(tmp_path)
    launch(gsflow, "--resume", run, "--alpha", 1, 30, "--online-steps", 20)
    assert_same_end(gsflow, grid[0], run)
    assert rows_without_time(grid[0]) == rows_without_time(run)
    for flags in (["--alpha", 1, 3], ["--alpha", 1], ["--tau", 0.1, 0.2]):
        _, err = launch(gsflow, "--resume", run, *flags, "--online-steps", 40, code=2)
        assert f"{flags[0]} " in err and "cannot change" in err and err.count("\n") == 1


@pytest.mark.slow
def test_start_from_goes_on_with_the_arms(gsflow, grid, tmp_path):
    flags = ["--start-from", grid[0], "--online-alpha", 7, "--online-steps", 20]
    launch(gsflow, *flags, out_dir=tmp_path)
    result = json.loads((only_run(tmp_path) / "result.json").read_text())
    assert list(result["arms"]) == ["alpha=1", "alpha=30"] and result["steps"] == 40
    _, err = launch(gsflow, *flags[:3], 1, 2, 3, "--online-steps", 20, code=2, out_dir=tmp_path)
    assert "--online-alpha had other values" in err


@pytest.mark.slow
def test_a_grid_may_begin_at_the_end_of_a_run(gsflow, tmp_path):
    """One offline phase, then arms of its seeds: each is what that run alone would have become."""
    launch(gsflow, *BANDIT, "--alpha", 5, "--num-seeds", 2, out_dir=tmp_path / "offline")
    online = ["--start-from", only_run(tmp_path / "offline"), "--online-steps", 20]
    for kind, values in (("grid", (1, 30)), ("alone", (30,))):
        launch(gsflow, *online, "--online-alpha", *values, out_dir=tmp_path / kind)
    run, alone = (only_run(tmp_path / kind) for kind in ("grid", "alone"))
    result = json.loads((run / "result.json").read_text())
    assert list(result["arms"]) == ["online_alpha=1", "online_alpha=30"]
    grid, alone = (end_of(gsflow, run) for run in (run, alone))
    assert_close({k: x[2:] for k, x in grid[0].items()}, alone[0])
    assert [values[2:] for values in grid[1]["evals"]] == alone[1]["evals"]
    launch(gsflow, "--resume", run, "--online-steps", 30)
    flags = ["--online-alpha", 1, 30, "--online-steps", 40]
    _, err = launch(gsflow, "--resume", only_run(tmp_path / "alone"), *flags, code=2)
    assert "--online-alpha had other values" in err


def test_evaluate_lists_the_members(gsflow, grid):
    out, _ = launch(gsflow, "--evaluate", grid[0])
    result = json.loads((grid[0] / "result.json").read_text())
    rows = [line.split() for line in out.splitlines()[2:6]]
    returns = [f"{np.mean(x):.2f}" for x in result["episodes"]["return"]]
    assert [row[0] for row in rows] == NAMES and [row[2] for row in rows] == returns


def test_the_picture_of_a_run_is_its_first_member(grid):
    assert (grid[0] / "multi_crescent_offline.png").stat().st_size > 1_000


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--batch-size 8 16", "'16' is a value too many; several are for --learning-rate, --tau"),
        ("--gamma 0.9 0.99", "'0.99' is a value too many"),
        ("--alpha 1 3 1", "--alpha has a value twice"),
        ("--alpha", "--alpha needs a number"),
        ("--alpha 1 -3", "--alpha is -3.0, but must be at least 0"),
        ("--init-temperature 0 1", "--init-temperature must be above 0"),
    ],
)
def test_what_is_no_grid_is_refused(gsflow, tmp_path, flags, message):
    """One sentence; nothing is written."""
    _, err = launch(gsflow, *BANDIT, *flags.split(), out_dir=tmp_path / "runs", code=2)
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "runs").exists()


def test_combinations_and_what_follows_from_them(gsflow):
    """Each arm is resolved by itself: what a flag leaves to another follows that one's values."""
    fql = dict(prior="gaussian", student="deterministic", online_steps=5)
    args = gsflow.combine(gsflow.Args(alpha=(1.0, 3.0), tau=(0.1, 0.2, 0.3), num_seeds=2, **fql))
    task = gsflow.parse_task("pointmaze-medium")
    args = gsflow.resolve(args, task)
    assert args.alpha == args.online_alpha and sorted(args.alpha) == [1.0] * 3 + [3.0] * 3
    assert len(set(zip(args.alpha, args.tau, strict=True))) == 6 and args.learning_rate == 1e-3
    for name, arm in gsflow.arms(args).items():
        assert name == f"tau={arm.tau:g},alpha={arm.alpha:g}"
        alone = gsflow.resolve(gsflow.Args(alpha=arm.alpha, tau=arm.tau, num_seeds=2, **fql), task)
        assert arm == alone
    assert [m.seed for m in gsflow.members(args)] == [0, 1] * 6
    single = gsflow.resolve(gsflow.Args(), task)
    assert gsflow.arms(single) == {"": single} and gsflow.members(single) == [("", 0, "0")]


def test_a_function_gets_the_numbers_of_its_arm(gsflow):
    """In its arguments; `learn` in the settings too, but the data are everybody's."""
    args = gsflow.Args(tau=(0.5, 0.25))
    state = SimpleNamespace(arm=jnp.int32(1))
    act = gsflow.per_arm(
        lambda nets, args, more: lambda state, x: more * args.tau * x, None, args, 3
    )
    assert act(state, np.arange(3.0)).tolist() == [0, 0.75, 1.5]
    learn = lambda nets, args: lambda carry, data, *settings: (args.tau, data.tolist(), *settings)
    settings = jnp.array([7.0, 8.0]), jnp.float32(9)
    found = gsflow.per_arm(learn, None, args)({"state": state}, np.arange(2.0), *settings)
    assert found == (0.25, [0, 1], 8, 9)


def test_report_has_a_row_for_each_arm(grid, tmp_path):
    report = load_script(ROOT / "benchmark" / "report.py")
    shutil.copytree(grid[0], tmp_path / "run")
    assert report.main_of([str(tmp_path), "--resamples", "100", "--steps-to", "0"]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    result = json.loads((grid[0] / "result.json").read_text())
    for arm, own in result["arms"].items():
        name = f"gsflow alpha={arm[6:]}.0 online_alpha={arm[6:]}.0"
        rows = [line.split("|") for line in text.splitlines() if f"| {name} |" in line]
        scores = [np.mean(x) for x in own["episodes"]["success"]]
        assert rows[0][4].strip() == "2" and f"{np.mean(scores):.2f} ±" in rows[0][6]
        assert len(rows) == 2 and "2 of 2" in rows[1][4]  # scores, steps to a target


def test_see_shows_the_arm_that_was_asked_for(gsflow, grid):
    see = load_script(ROOT / "benchmark" / "see.py")
    tree, _ = gsflow.load_checkpoint(grid[0])
    kernel = lambda params: params["velocity"]["params"]["Dense_0"]["kernel"]
    for index, flags in ((0, {}), (3, dict(arm="alpha=30", seed=6))):
        run = see.open_run(grid[0], see.Args(runs=(), **flags))
        np.testing.assert_array_equal(
            kernel(run.state.params), kernel(tree["state"]["params"])[index]
        )
        assert run.args.alpha == (1.0, 30.0)[index > 0] and NAMES[index].split(",")[0] in run.title
    with pytest.raises(see.UserError, match="alpha=1, alpha=30"):
        see.open_run(grid[0], see.Args(runs=(), arm="alpha=2"))


def test_launcher_packs_arms(tmp_path, capsys):
    """Methods that differ in a grid's numbers alone become one run, whose arms keep their labels;
    others stay; a default of the task takes part with its value."""
    module = load_script(ROOT / "benchmark" / "launch.py")
    algos = ["none=flowq --guidance-lambda 0", "flowq", "t2=flowq --schedule t2", "three=flowq "
             "--guidance-lambda 3"]  # fmt: skip
    jobs = module.expand(module.Args(algos=tuple(algos), seeds=(0, 4), out=str(tmp_path)), [])
    one, alone, other, _ = module.pack(jobs, tmp_path)
    assert (one.label, alone.label, one.seed, other.seed) == ("none..three", "t2", 0, 4)
    assert one.args.guidance_lambda == (0.0, 100.0, 3.0)
    labels = dict(zip(("0", "100", "3"), ("none", "flowq", "three"), strict=True))
    assert dict(one.labels) == {f"guidance_lambda={k}": v for k, v in labels.items()}
    script = load_script(ROOT / "algos" / "flowq.py")
    assert script.arms(one.args)["guidance_lambda=3"] == jobs[3].args
    square = ["a=flowq --tau 0.1 --ema-decay 0.9", "b=flowq --tau 0.2 --ema-decay 0.99"]
    jobs = module.expand(module.Args(algos=tuple(square), seeds=(0,), out=str(tmp_path)), [])
    assert module.pack(jobs, tmp_path) == jobs  # not all combinations
    assert module.main(["--pack", "--share-offline"]) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_packed_arms_are_methods_of_their_own_in_reports(grid, tmp_path):
    report = load_script(ROOT / "benchmark" / "report.py")
    shutil.copytree(grid[0], tmp_path / "home" / "run")
    facts = dict(label="a..b", arms={"alpha=1": "a", "alpha=30": "b"})
    (tmp_path / "home" / "launch.json").write_text(json.dumps(facts))
    runs = report.read_runs([tmp_path])
    assert [(r.label, r.args["alpha"], r.arm) for r in runs] == [
        ("a", 1.0, "alpha=1"), ("b", 30.0, "alpha=30")
    ]  # fmt: skip
    assert {len(run.rows) for run in runs} == {8}


# ---- other ways to run one ----
@pytest.mark.slow
def test_a_member_that_diverges_is_named_and_left_out(gsflow, tmp_path, monkeypatch):
    make_update = gsflow.make_update

    def poisoned(nets, args):
        def update(state, *rest):
            state, info = make_update(nets, args)(state, *rest)
            bad = (state.seed == 5) & (args.alpha > 2) & (state.step > 12)
            return state, {k: jnp.where(bad, jnp.nan, v) for k, v in info.items()}

        return update

    monkeypatch.setattr(gsflow, "make_update", poisoned)
    out, _ = launch(gsflow, *BANDIT, *GRID, out_dir=tmp_path)
    result = json.loads((only_run(tmp_path) / "result.json").read_text())
    assert out.count("alpha=30,seed=5 diverged before step") == 1 == out.count("diverged")
    assert list(result["diverged"]) == ["alpha=30,seed=5"] and result["seeds"] == [5, 6, 6]
    assert {k: v["seeds"] for k, v in result["arms"].items()} == {
        "alpha=1": [5, 6],
        "alpha=30": [6],
    }


@pytest.mark.slow
def test_members_spread_over_devices_give_the_same(gsflow, grid, tmp_path):
    two_devices = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    finish(start("gsflow", *BOTH, *GRID, out_dir=tmp_path, env=two_devices))
    run = only_run(tmp_path)
    assert json.loads((run / "args.json").read_text())["device"].startswith("2 x ")
    assert_close(end_of(gsflow, run)[0], end_of(gsflow, grid[0])[0])


@pytest.mark.slow
def test_official_environments_of_each_member(gsflow, data_dir, tmp_path):
    """Each member has simulators of its own, with the episodes that its seed has alone."""
    flags = [
        *TINY.split(),
        "--env-backend",
        "host",
        "--dataset-dir",
        data_dir,
        "--eval-episodes",
        1,
    ]
    flags += ["--offline-steps", 4, "--online-steps", 12, "--eval-interval", 100, "--seed", 1]
    flags += ["--num-envs", 2]
    launch(gsflow, *flags, "--online-alpha", 1, 30, out_dir=tmp_path / "grid")
    launch(gsflow, *flags, "--online-alpha", 30, out_dir=tmp_path / "alone")
    grid, alone = (end_of(gsflow, only_run(tmp_path / kind))[0] for kind in ("grid", "alone"))
    assert_close({k: x[1] for k, x in grid.items()}, {k: x[0] for k, x in alone.items()})


@pytest.mark.slow
def test_benchmark_compares_both_ways(capsys):
    """Its table: the grid, then its members alone; their parameters agree after a few updates."""
    module = load_script(ROOT / "benchmark" / "grid.py")
    args = module.Args(grid=("alpha=1,30",), num_seeds=1, steps=10)
    module.main(args, ["--env-id", "multi-crescent", *TINY.split()])
    head, _, _, _, together, alone = capsys.readouterr().out.splitlines()
    assert "10 updates, alpha=1,30, 1 seeds" in head
    cells = [[c.strip() for c in row.split("|")[1:-1]] for row in (together, alone)]
    assert [c[0] for c in cells] == ["2 members in one program", "2 runs one after another"]
    assert cells[0][2] == "1.00" and float(cells[1][2]) > 0 and 0 <= float(cells[0][-1]) < 1e-4
