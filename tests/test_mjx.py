"""benchmark/tasks/mjx.py against the official environments: same starts, same actions, float64."""

import ast
import functools
import hashlib
import inspect
import json
import shutil
import sys
import types

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import ogbench  # noqa: F401  registers the ant mazes
import pytest
from conftest import ROOT, load_script
from mujoco.mjx._src import collision_convex, collision_driver, collision_primitive, math
from test_sac_flow_runs import whole_and_parts

STEPS, STARTS = 10, 32
MAZE = "antmaze-medium-singletask-task1-v0"
LOCOMOTION = ("Hopper-v5", "Walker2d-v5", "HalfCheetah-v5", "Ant-v5", "Humanoid-v5")
ENDING = ("Hopper-v5", "Walker2d-v5", "Ant-v5", "Humanoid-v5")
TASK_FILE = ROOT / "benchmark" / "tasks" / "mjx.py"
mjx_tasks = load_script(TASK_FILE)


@functools.cache
def official(gym_id):
    options = dict(success_timing="post") if "maze" in gym_id else {}
    return gymnasium.make(gym_id, **options).unwrapped


def official_x(env):
    """Where Gymnasium's reward says that the robot is."""
    name = type(env).__name__
    if name.startswith("Humanoid"):
        return env.model.body_mass @ env.data.xipos[:, 0] / env.model.body_mass.sum()
    return env.data.xpos[1, 0] if name.startswith("Ant") else env.data.qpos[0]


def snapshot(env, obs):
    """What the official environment holds, as a state of ours."""
    seen = env.model.nq + env.model.nv - (0 if "Maze" in type(env).__name__ else 2)
    derived = obs[seen:] if env.model.jnt_type[0] == 0 else obs[:0]
    data = env.data
    state = (data.qpos, data.qvel, data.qacc_warmstart, official_x(env), derived, False)
    return mjx_tasks.MjxState(*[np.array(x) for x in state])


def starts(gym_id, rng):
    """Positions and velocities to begin with: half as a reset draws them, half wild."""
    env = official(gym_id)
    for k in range(STARTS):
        env.reset(seed=k)
        qpos, qvel = env.data.qpos.copy(), env.data.qvel.copy()
        if "maze" in gym_id:  # thrown through a free cell
            free = np.argwhere(env.maze_map == 0)
            i, j = free[rng.integers(len(free))]
            qpos[:2] = np.array([j, i]) * 4.0 - 4.0 + rng.uniform(-0.7, 0.7, 2)
            angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(4, 7)
            qvel[:2] = speed * np.array([np.cos(angle), np.sin(angle)])
        if env.model.jnt_type[0] == 0:  # dropped, every other one tumbling
            height = rng.uniform(0.1, 0.25)
            qpos[2] += height if "Standup" in gym_id else -height  # that one starts on its back
            qvel[2] = -rng.uniform(0, 4)
            if k % 2:
                qpos[3:7] = rng.normal(size=4)
                qpos[3:7] /= np.linalg.norm(qpos[3:7])
                qvel[3:6] = rng.normal(size=3)
        elif k % 2:
            qpos[1:3] += rng.uniform(-0.25, 0.25, 2)
            qvel += rng.normal(size=qvel.shape)
        yield qpos, qvel


@functools.cache
def rollouts(gym_id, newton=False):
    """Official rollouts: states before, and actions, states, observations, ... of each step."""
    env, rng = official(gym_id), np.random.default_rng(0)
    shipped = env.model.opt.solver
    env.model.opt.solver = 2 if newton else shipped
    high = env.action_space.high
    episodes, reset_obs, contacts = [], [], []
    for qpos, qvel in starts(gym_id, rng):
        env.reset(seed=0)
        env.set_state(qpos, qvel)
        env.data.qacc_warmstart[:] = 0
        obs = env.get_ob() if "maze" in gym_id else env._get_obs()
        reset_obs.append(obs)
        rows = []
        for _ in range(STEPS):
            action = rng.uniform(-1.2, 1.2, high.shape) * high  # MuJoCo clips what exceeds
            before = snapshot(env, obs)
            obs, reward, terminated, _, _ = env.step(action)
            rows.append((before, action, snapshot(env, obs), obs, reward, terminated))
            used = [c for c in env.data.contact[: env.data.ncon] if c.exclude == 0]
            walls = [c for c in used if env.model.geom_type[list(c.geom)].max() == 6]
            contacts.append((len(used), len(walls)))
        episodes.append(jax.tree.map(lambda *x: np.stack(x), *rows))
    env.model.opt.solver = shipped
    columns = jax.tree.map(lambda *x: np.stack(x, axis=1), *episodes)  # (STEPS, STARTS, ...)
    return columns, np.array(reset_obs), np.array(contacts)


@functools.cache
def make_env(gym_id):
    with jax.enable_x64(True):
        return mjx_tasks.make_env(gym_id, "post")


@functools.cache
def make_step(gym_id):
    env = make_env(gym_id)

    def step(state, action):
        new = env.transition(state, action)
        reward = env.reward(state, action, new, None)
        return new, (new.qpos, env.observation(new, None), reward, env.terminal(new, None))

    return env, jax.jit(jax.vmap(env.at)), jax.jit(jax.vmap(step))


def compare(gym_id, newton=False):
    """Our steps from our own states (rolled) and from the official ones (single), in one program.

    Returns the first observations and, twice, arrays (STEPS, STARTS, ...): positions, observation,
    reward, terminated.
    """
    (before, actions, *_), *_ = rollouts(gym_id, newton)
    env, reset, step = make_step(gym_id)
    outs = []
    with jax.enable_x64(True):
        rolled = reset(before.qpos[0], before.qvel[0])
        start_obs = np.asarray(jax.vmap(env.observation)(rolled))
        for k in range(STEPS):
            single = jax.tree.map(lambda x, k=k: x[k], before)
            states = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), rolled, single)
            new, out = step(states, np.concatenate([actions[k], actions[k]]))
            rolled = jax.tree.map(lambda x: x[:STARTS], new)
            outs.append(jax.device_get(out))
    assert step._cache_size() == 1  # compiled once
    out = [np.stack(x) for x in zip(*outs, strict=True)]
    assert out[0].dtype == np.float64
    return start_obs, [x[:, :STARTS] for x in out], [x[:, STARTS:] for x in out]


@pytest.mark.slow
@pytest.mark.parametrize("gym_id", [*LOCOMOTION, "HumanoidStandup-v5", MAZE])
def test_steps_match_the_official_environment(gym_id):
    newton = gym_id.startswith("Humanoid")  # see the next test
    (_, _, after, obs, reward, terminated), reset_obs, contacts = rollouts(gym_id, newton)
    start_obs, rolled, single = compare(gym_id, newton)
    np.testing.assert_allclose(start_obs, reset_obs, rtol=0, atol=1e-9)
    np.testing.assert_allclose(rolled[0], after.qpos, rtol=0, atol=1e-4)
    np.testing.assert_allclose(single[0], after.qpos, rtol=0, atol=1e-5)
    np.testing.assert_allclose(single[1], obs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(single[2], reward, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(single[3], terminated)
    touching = contacts.reshape(STARTS, STEPS, 2) > 0  # there was something to agree on
    assert touching[..., 0].any(axis=1).mean() > 0.5
    if gym_id in ENDING:
        assert terminated.any() and not terminated.all()
    if gym_id == MAZE:
        assert touching[..., 1].any(axis=1).mean() > 0.3  # walls
        assert contacts[:, 0].max() < make_env(MAZE).max_active


@pytest.mark.slow
def test_humanoid_matches_with_its_own_solver():
    """As shipped its model has PGS, which stops short of the solution that Newton's method finds:
    contact forces, the last 78 numbers observed, agree to 1e-3 and all the rest to 1e-5."""
    (_, _, after, obs, reward, terminated), *_ = rollouts("Humanoid-v5")
    assert official("Humanoid-v5").model.opt.solver == 0
    _, rolled, single = compare("Humanoid-v5")
    np.testing.assert_allclose(rolled[0], after.qpos, rtol=0, atol=1e-4)
    np.testing.assert_allclose(single[1][..., :-78], obs[..., :-78], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(single[1][..., -78:], obs[..., -78:], rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(single[2], reward, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(single[3], terminated)


@pytest.mark.slow
@pytest.mark.parametrize("gym_id", [*LOCOMOTION, "HumanoidStandup-v5", MAZE])
def test_reset_distribution(gym_id):
    env, reference = make_env(gym_id), official(gym_id)

    def draw(key):
        state = env.initial(key)
        return state.qpos - reference.init_qpos, state.qvel

    keys = jax.random.split(jax.random.key(0), 4000)
    with jax.enable_x64(True):
        ours = np.concatenate(jax.jit(jax.vmap(draw))(keys), axis=1)
    theirs, nq = [], env.model.nq
    np.random.seed(0)
    for i in range(400):
        reference.reset(seed=i)
        data = reference.data
        theirs.append(np.concatenate([data.qpos - reference.init_qpos, data.qvel]))
    theirs = np.array(theirs)
    for part in (slice(0, 2), slice(2, nq), slice(nq, None)):  # x and y: wider noise in a maze
        a, b = ours[:, part], theirs[:, part]
        rms = np.sqrt((b**2).mean())
        count = b.size  # the smaller sample; its standard errors, four of them
        assert np.abs(a.mean(axis=0)).max() < 5 * rms / np.sqrt(len(a))
        assert abs(np.sqrt((a**2).mean()) / rms - 1) < 4 / np.sqrt(2 * count)
        assert (np.abs(a).max() > 2 * rms) == (np.abs(b).max() > 2 * rms)  # Gaussian or uniform
    assert len(np.unique(ours[:, -1])) == 4000


def test_spaces_and_limits():
    for gym_id in ("Hopper-v5", MAZE):
        env, reference = make_env(gym_id), official(gym_id)
        assert env.action_space == reference.action_space
        assert env.observation_space == reference.observation_space
        assert env.max_episode_steps == gymnasium.spec(gym_id).max_episode_steps == 1000


@pytest.mark.slow
def test_restart_keeps_the_final_observation(gsflow):
    """In float32, as in training: two time limits in a row, one compiled program."""
    env = mjx_tasks.make_env("Hopper-v5", "post")
    env.max_episode_steps = 3
    step = jax.jit(lambda s, a, key: gsflow.step_envs(env, s, a, key))
    state = gsflow.reset_envs(env, jax.random.key(0), 4)
    near = jnp.asarray([*env.init_qpos[1:], *np.zeros(6)], jnp.float32)
    for k in range(1, 7):
        state, out = step(state, jnp.ones((4, 3)), jax.random.key(k))
        truncated = k % 3 == 0
        assert out["reward"].dtype == out["next_obs"].dtype == jnp.float32
        assert (out["truncated"] == truncated).all() and not out["terminated"].any()
        assert np.abs(out["next_obs"] - near).max(axis=1).min() > 0.1  # it has moved
        now = gsflow.observe(env, state)
        if truncated:
            assert np.abs(now - near).max() <= 5e-3 and (state[1] == 0).all()
        else:
            np.testing.assert_array_equal(now, out["next_obs"])
    assert step._cache_size() == 1


# ---- ant mazes ----


@pytest.mark.parametrize("timing", ("post", "pre"))
def test_maze_rewards_reaching_the_goal(timing):
    """The state before the step is judged, or the one after it; no physics needed to see that."""
    env = mjx_tasks.make_env(MAZE, timing)
    state = jax.jit(env.at)(jnp.asarray(env.init_qpos, jnp.float32), jnp.zeros(14))
    moved = state._replace(qpos=state.qpos.at[:2].set(env.goal_xy + np.array([0.3, 0.39])))
    env.simulate = lambda state, action: moved
    new = env.transition(state, jnp.zeros(8))
    reached = timing == "post"
    assert bool(env.success(new)) == bool(env.terminal(new)) == reached
    assert float(env.reward(state, jnp.zeros(8), new)) == reached - 1
    assert bool(env.success(env.transition(new, jnp.zeros(8))))
    info = official(MAZE).task_infos[0]
    np.testing.assert_array_equal(env.goal_xy, info["goal_xy"])
    np.testing.assert_array_equal(env.start_xy, info["init_xy"])
    assert official(MAZE)._goal_tol == 0.5


@pytest.mark.slow
def test_evaluation_runs_in_one_program(gsflow):
    """In float32, three episodes cut short; success where an ant starts at the goal."""
    jax.clear_caches()  # of MJX's functions, traced in float64 by the tests before
    env = mjx_tasks.make_env(MAZE, "post")
    env.max_episode_steps = 3
    env.start_xy, env.official._goal_tol = env.goal_xy, 1.0  # three quarters of the starts
    still, state = lambda state, obs, key: jnp.zeros(8), types.SimpleNamespace(seed=0)
    run = jax.jit(lambda step: gsflow.evaluate_jax(env, 12, still, state, step))
    result = jax.device_get(run(0))
    early = result["success"] == 1
    assert early.any() and not early.all()
    assert (result["length"][early] == 1).all() and (result["length"][~early] == 3).all()
    np.testing.assert_array_equal(result["return"], np.where(early, 0, -3))


def test_tiles_stand_where_the_walls_are():
    env, reference = make_env(MAZE), official(MAZE)
    model, rng = reference.model, np.random.default_rng(0)
    boxes = model.geom_pos[model.geom_type == 6]
    half = model.geom_size[model.geom_type == 6][0]
    np.testing.assert_array_equal(np.asarray(env.model.geom_size)[env.tiles], [half] * 4)
    free = np.argwhere(reference.maze_map == 0)
    for i, j in free:
        xy = np.array([j, i]) * 4.0 - 4.0 + rng.uniform(-2, 2, 2)
        with jax.enable_x64(True):
            tiles = np.asarray(env.model_at(jnp.asarray([*xy, 0.5])).geom_pos)[env.tiles]
        near = boxes[(np.abs(boxes[:, :2] - xy) < 2 + 1.99).all(axis=1)]
        there = tiles[tiles[:, 2] > 0]
        assert {tuple(p) for p in near} == {tuple(p) for p in there}


def test_contacts_match_mujoco():
    """Ants put anywhere at or in walls, also at corners and top edges: each contact of MuJoCo's."""
    env, reference, rng = make_env(MAZE), official(MAZE), np.random.default_rng(0)
    model, mjx, number, qpos = reference.model, env.mjx, 600, []
    free = np.argwhere(reference.maze_map == 0)
    for _ in range(number):
        q = reference.init_qpos + rng.uniform(-0.3, 0.3, model.nq)
        i, j = free[rng.integers(len(free))]
        q[:2] = np.array([j, i]) * 4.0 - 4.0 + rng.uniform(-1.95, 1.95, 2)
        q[2] = rng.choice([rng.uniform(0.2, 0.9), rng.uniform(1.8, 2.2)])
        q[3:7] = rng.normal(size=4)
        q[3:7] /= np.linalg.norm(q[3:7])
        qpos.append(q)

    def collide(qpos):
        model = env.model_at(qpos)
        data = mjx.collision(model, mjx.kinematics(model, env.data.replace(qpos=qpos)))
        c = data._impl.contact
        return c.dist, c.pos, c.frame, c.geom, c.includemargin

    with jax.enable_x64(True):
        ours = jax.device_get(jax.jit(jax.vmap(collide))(np.array(qpos)))
    ants = {model.geom(i).name: i for i in range(model.ngeom) if model.geom_bodyid[i]}
    offset = env.model.ngeom - model.ngeom  # the ant's geoms come last in both models
    compared, skipped = 0, 0
    for k in range(number):
        reference.set_state(qpos[k], np.zeros(model.nv))
        c, (dist, pos, frame, geom, margin) = reference.data.contact, (x[k] for x in ours)
        if len(c) > env.max_active:  # half of the ant in the wall
            skipped += 1
            continue
        used = dist < margin
        assert used.sum() == len(c), f"start {k}: {used.sum()} contacts, {len(c)} in MuJoCo"
        theirs = np.column_stack([c.geom.max(axis=1), c.dist, c.pos, c.frame])
        mine = np.column_stack([geom.max(axis=1) - offset, dist, pos, frame.reshape(-1, 9)])[used]
        assert set(theirs[:, 0]) <= set(ants.values())
        for row in theirs:  # the same contact is the one nearest to it
            gaps = np.abs(mine - row).max(axis=1)
            np.testing.assert_allclose(mine[gaps.argmin()], row, rtol=0, atol=1e-9)
        compared += len(c)
    assert compared > 1000 and skipped < number / 100


# ---- MJX itself ----

MENDED = {  # what the task file replaces; when this fails, look whether they still have to
    (collision_primitive, "plane_capsule"): "1903f5e8cb7148cb",
    (collision_convex, "_capsule_convex"): "8bd9bc8869e60696",
    (math, "closest_segment_point"): "492bba8f528cae9a",
    (math, "closest_segment_to_segment_points"): "cd6bab2c0860fab7",
    (collision_convex, "_sphere_convex"): "eed2f687830e8f74",
}


@pytest.mark.parametrize("module, name", MENDED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_replaced_has_not_changed(module, name):
    source = inspect.getsource(module)
    functions = [f for f in ast.parse(source).body if getattr(f, "name", "") == name]
    text = ast.get_source_segment(source, functions[0])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == MENDED[module, name]


def test_mjx_uses_what_replaces_them():
    make_env(MAZE)
    plane, sphere, capsule, box = 0, 2, 3, 6  # mjtGeom
    pairs = (plane, capsule), (sphere, capsule), (capsule, capsule), (sphere, box), (capsule, box)
    for pair in pairs:
        mended = collision_driver._COLLISION_FUNC[pair]
        assert mended.__closure__[0].cell_contents.__code__.co_filename == str(TASK_FILE)


# ---- what a script calls ----


@pytest.mark.parametrize(
    "gym_id",
    ("cube-single-singletask-task2-v0", "scene-singletask-task2-v0", "puzzle-3x3-singletask-v0")
    + ("humanoidmaze-medium-singletask-task1-v0", "antsoccer-arena-singletask-task4-v0")
    + ("antmaze-teleport-singletask-task1-v0", "antmaze-large-singletask-task6-v0")
    + ("antmaze-large", "Hopper-v4", "Hopper-v5-singletask-v0", "pointmaze-medium-singletask-v0"),
)
def test_what_mjx_cannot_simulate_is_refused(gym_id):
    with pytest.raises(ValueError) as error:
        mjx_tasks.make_env(gym_id, "post")
    answer = str(error.value)
    assert f"not {gym_id};" in answer and "--env-backend host" in answer and "\n" not in answer
    assert all(name in answer for name in ("antmaze-giant", "Hopper-v5", "HumanoidStandup-v5"))


def test_missing_package_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco.mjx", None)
    monkeypatch.delattr("mujoco.mjx")
    with pytest.raises(ImportError, match=r"^[^\n]*pip install mujoco==\S+ mujoco-mjx==\S+$"):
        mjx_tasks.make_env("Hopper-v5", "post")


def test_warns_on_a_cpu(capsys):
    env = mjx_tasks.make_env("antmaze-large-singletask-task3-v0", "pre")
    err = capsys.readouterr().err
    assert ("--env-backend host" in err) == (jax.default_backend() == "cpu")
    assert err.count("\n") <= 1 and env.success_timing == "pre"
    task = official("antmaze-large-singletask-task3-v0").task_infos[2]
    assert (env.goal_xy == task["goal_xy"]).all()


@pytest.mark.parametrize(
    "name, index", [("antmaze-large", 1), ("antmaze-large-task3", 3), ("Hopper-v5", None)]
)
def test_as_a_task_file(name, index):
    task = mjx_tasks.make_task(name, "/nowhere")
    env = task["env"]
    assert set(task) == {"env", "success"} and task["success"] == (index is not None)
    if index is None:
        assert env.robot == "Hopper" and not hasattr(env, "success")
    else:
        info = official("antmaze-large-singletask-task1-v0").task_infos[index - 1]
        assert env.success_timing == "post" and (env.goal_xy == info["goal_xy"]).all()
    with pytest.raises(ValueError, match="MJX simulates"):
        mjx_tasks.make_task("antmaze-large-task6", "/nowhere")


# ---- training online ----

TINY = "--env-backend mjx --batch-size 4 --checkpoint-interval 5 --log-interval 5"
TINY += " --eval-interval 20 --eval-episodes 1"
RUNS = {
    "gsflow": "--hidden-dims 8 --prior-hidden-dims 8 --offline-steps 10 --online-steps 30"
    " --num-envs 2",
    "fmq": "--hidden-dims 8 --num-samples 2 --offline-steps 10 --online-steps 30"
    " --learning-starts 10",
    "sac_flow": "--hidden-dim 8 --critic-hidden-dims 8 --policy gaussian --online-steps 40"
    " --learning-starts 10 --num-envs 2",
}


def coast(env, state, action):
    """In place of the engine, which takes a minute to compile: positions and velocities move."""
    qvel = 0.9 * state.qvel + 0.1 * action.mean()
    return state._replace(qpos=state.qpos + 0.05 * state.qpos * qvel.mean(), qvel=qvel)


def place(env, qpos, qvel):
    """In place of the engine's kinematics."""
    return mjx_tasks.MjxState(qpos, qvel, qvel, qpos[0], jnp.zeros(0), jnp.asarray(False))


def maze_file(directory):
    """Two short random episodes under the name of the official dataset."""
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(40, 29)).astype(np.float32)
    data = dict(observations=obs, qpos=obs[:, :15], qvel=obs[:, 15:])
    data |= dict(actions=rng.uniform(-1, 1, (40, 8)), terminals=np.arange(40) % 20 == 19)
    np.savez(directory / "antmaze-medium-navigate-v0.npz", **data)


@pytest.mark.slow
@pytest.mark.parametrize("stem", RUNS)
def test_trains_online_and_resumes_in_mid_episode(stem, tmp_path, monkeypatch):
    """The simulators' state is in the checkpoint: parts end like the whole, bit for bit."""
    module = load_script(ROOT / "algos" / f"{stem}.py")
    make_jax_env = module.make_jax_env

    def without_engine(task, args):
        env = make_jax_env(task, args)
        if args.env_backend == "mjx":  # not where the data's sizes are compared
            env.simulate, env.at = functools.partial(coast, env), functools.partial(place, env)
        return env

    monkeypatch.setattr(module, "make_jax_env", without_engine)
    maze_file(tmp_path)
    flags = f"{TINY} {RUNS[stem]} "
    if stem == "sac_flow":
        flags += "--env-id Hopper-v5"
    else:
        flags += f"--env-id antmaze-medium --dataset-dir {tmp_path}"
    whole, _ = whole_and_parts(module, tmp_path, flags.split(), [15, 30], monkeypatch)
    assert json.loads((whole / "result.json").read_text())["steps"] == 40
    envs = str(module.load_checkpoint(whole)[0]["envs"])
    assert "qpos" in envs and "nan" not in envs


# ---- the flag ----


def refusal(stem, flags, tmp_path, monkeypatch, capsys):
    """A script's answer to --env-backend mjx with these flags: one sentence, nothing written."""
    module = load_script(ROOT / "algos" / f"{stem}.py")
    monkeypatch.chdir(tmp_path)
    command = ["--env-backend", "mjx", *flags]
    assert module.command_line(module.main, module.Args, command) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and list(tmp_path.iterdir()) == []
    return err


@pytest.mark.parametrize("stem", RUNS)
@pytest.mark.parametrize(
    "name",
    ("cube-single", "scene", "puzzle-3x3", "humanoidmaze-medium", "antsoccer-arena")
    + ("antmaze-teleport", "pointmaze-medium"),
)
def test_flag_refuses_what_mjx_cannot_simulate(stem, name, tmp_path, monkeypatch, capsys):
    err = refusal(stem, ["--env-id", name], tmp_path, monkeypatch, capsys)
    assert f"not {name}-singletask" in err and "--env-backend host" in err


@pytest.mark.parametrize("stem", RUNS)
def test_task_file_with_an_environment_needs_no_mjx(stem, tmp_path, monkeypatch, capsys):
    flags = ["--env-id", "multi-crescent"]
    assert "drop --env-backend" in refusal(stem, flags, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("stem", RUNS)
def test_flag_finds_the_task_file(stem):
    module = load_script(ROOT / "algos" / f"{stem}.py")
    args = module.Args(env_backend="mjx", success_timing="pre")
    env = module.make_jax_env(module.parse_task("antmaze-large-task3"), args)
    task = official("antmaze-large-singletask-task3-v0").task_infos[2]
    assert env.success_timing == "pre" and (env.goal_xy == task["goal_xy"]).all()
    hopper = module.make_jax_env(module.parse_task("Hopper-v5"), args)
    assert hopper.robot == "Hopper"


def test_copied_script_says_what_to_copy(tmp_path, monkeypatch, capsys):
    copy = tmp_path / "algos" / "mine.py"
    copy.parent.mkdir()
    shutil.copy(ROOT / "algos" / "gsflow.py", copy)
    module = load_script(copy)
    command = ["--env-backend", "mjx", "--env-id", "antmaze-large"]
    monkeypatch.chdir(copy.parent)
    assert module.command_line(module.main, module.Args, command) == 2
    err = capsys.readouterr().err
    assert "mjx.py of the CleanFlow repository" in err and err.count("\n") == 1
    assert [path.name for path in copy.parent.iterdir() if path.suffix] == ["mine.py"]
