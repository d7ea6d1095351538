"""benchmark/see.py: what is drawn where, files and their frames, the episodes, misuse; the
notebook; without a display."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import ROOT, SCRIPTS, load_script
from PIL import Image, ImageColor

SPEC = importlib.util.spec_from_file_location("cleanflow_see", ROOT / "benchmark" / "see.py")
see = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = see
SPEC.loader.exec_module(see)

GSFLOW = "--hidden-dims 8 --prior-hidden-dims 8 --num-candidates 2 --flow-steps 2 --batch-size 8"
GSFLOW += " --offline-steps 20 --eval-interval 20 --log-interval 10"
FLOWQ = "--hidden-dims 8 --flow-steps 2 --batch-size 8"
FLOWQ += " --offline-steps 20 --eval-interval 20 --log-interval 10"
SAC = "--hidden-dim 8 --d-model 8 --critic-hidden-dims 8 --flow-steps 2 --batch-size 8"
SAC += " --online-steps 60 --learning-starts 20 --eval-interval 60 --checkpoint-interval 60"


def train(script, directory, flags):
    """Run a script in this process -> its run directory."""
    module = load_script(ROOT / "algos" / f"{script}.py")
    argv = [*flags.split(), "--out-dir", str(directory)]
    assert module.command_line(module.main, module.Args, argv) == 0
    (run,) = directory.iterdir()
    return run


@pytest.fixture(scope="module")
def maze_run(data_dir, tmp_path_factory):
    flags = f"--env-id pointmaze-medium --dataset-dir {data_dir} --eval-episodes 3 {GSFLOW}"
    return train("gsflow", tmp_path_factory.mktemp("maze"), flags)


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    flags = f"--env-id energy-toy --eval-episodes 4 --num-seeds 2 {FLOWQ}"
    return train("flowq", tmp_path_factory.mktemp("toy"), flags)


@pytest.fixture(scope="module")
def pendulum_run(tmp_path_factory):
    return train("sac_flow", tmp_path_factory.mktemp("pendulum"), f"--eval-episodes 3 {SAC}")


def color_at(image, pixel):
    return image.getpixel(tuple(round(float(p)) for p in pixel))


# ---- what is drawn where ----
@pytest.mark.parametrize("maze", ["medium", "large"])
def test_walls_goal_and_start_are_where_the_maze_has_them(gsflow, maze):
    env = gsflow.PointMaze(maze, 1)
    view = see.MazeView(env, 400)
    image = view.background().resize((view.width, view.height), Image.Resampling.NEAREST)
    assert max(image.size) == 400
    rows, columns = env.maze_map.shape
    cell = 400 / (max(rows, columns) - 1.4)  # the outer walls are cut by 0.7 of a cell on each side
    colors = {k: ImageColor.getrgb(v) for k, v in dict(wall=see.WALL, floor=see.FLOOR).items()}
    start, goal = (np.array(ij) for ij in ((1, 1), dict(medium=(6, 6), large=(7, 10))[maze]))
    for i in range(1, rows - 1):
        for j in range(1, columns - 1):
            # away from the discs around the centres; row 0 lies at the bottom
            spot = ((j + 0.85 - 0.7) * cell, view.height - (i + 0.85 - 0.7) * cell)
            kind = "wall" if env.maze_map[i, j] else "floor"
            assert color_at(image, spot) == colors[kind], (i, j)
    centre = lambda ij: ((ij[1] - 0.2) * cell, view.height - (ij[0] - 0.2) * cell)
    assert color_at(image, centre(goal)) == ImageColor.getrgb(see.GOAL)
    assert color_at(image, centre(start)) == colors["floor"]  # a ring, radius 1 of 4
    ring = (centre(start)[0] + 0.25 * cell - 1, centre(start)[1])
    assert color_at(image, ring) == ImageColor.getrgb(see.INK)
    assert color_at(image, (1, 1)) == colors["wall"]


def test_balls_and_their_ways_are_drawn(gsflow):
    """Two balls, one of which stays at the goal after two steps."""
    env = gsflow.PointMaze("medium", 1)
    view = see.MazeView(env, 400)
    first = np.array([[0, 0], [4, 0], [4, 4], [4, 8]], float)
    second = np.array([[20, 16], [20, 18], [20, 20], [20, 20]], float)
    states = SimpleNamespace(xy=np.stack([first, second], axis=1))
    length, success = np.array([3, 2]), np.array([0.0, 1.0])
    episodes = see.Episodes(states, np.zeros((3, 2, 2)), length, success, -length)
    frames = list(view.frames(episodes, 1, None, "title"))
    assert len(frames) == 4 and frames[0].size[0] == 400
    header = frames[0].height - view.height
    assert header > 10
    at = lambda frame, xy: color_at(frame, view.pixel(np.array(xy)) + [0, header])
    blue, red = (ImageColor.getrgb(c) for c in see.COLORS[:2])
    for t, frame in enumerate(frames):
        assert at(frame, first[t]) == blue and at(frame, second[t]) == red
    floor = ImageColor.getrgb(see.FLOOR)
    bluish = lambda frame, xy: np.abs(np.subtract(at(frame, xy), blue)).max() < 40  # a thin line
    assert at(frames[0], (2, 0)) == floor and bluish(frames[1], (2, 0))  # its way
    assert bluish(frames[3], (4, 2)) and at(frames[3], (4, 10)) == floor


def test_value_colours_the_floor(gsflow):
    view = see.MazeView(gsflow.PointMaze("medium", 1), 400)
    points, _ = view.free_points(2)
    image = view.background((points, points[:, 1]))  # the higher, the better
    blue = lambda xy: see.HIGH_VALUE[0] - color_at(image, view.pixel(np.array(xy)) * see.SHARP)[0]
    assert blue((-1, -1)) < blue((3, 9)) < blue((1, 21))  # free cells, further and further up


def test_frames_end_with_the_last_step():
    assert see.times(10, 4) == [0, 4, 8, 10] and see.times(8, 4) == [0, 4, 8]
    assert see.times(0, 4) == [0]


def test_pendulum_points_up_at_zero():
    angles = np.array([[[0.0, 0.0]], [[np.pi / 2, 0.0]]])  # upright; then to the left
    episodes = see.Episodes(angles, np.zeros((1, 1, 1)), np.array([1]), np.zeros(1), np.zeros(1))
    up, left = see.pendulum_frames(episodes, 1, 200, "")
    color, header = ImageColor.getrgb(see.COLORS[0]), up.height - 200
    assert color_at(up, (100, header + 40)) == color != color_at(up, (40, header + 100))
    assert color_at(left, (40, header + 100)) == color != color_at(left, (100, header + 40))


def test_bandit_shows_each_action(toy_run):
    run = see.open_run(toy_run, see.Args(runs=()))
    actions = np.array([[[0.5, 0.9], [-0.5, 0.2]]], np.float32)  # x to the right, y upwards
    ones = np.ones(2, int)
    episodes = see.Episodes(None, actions, ones, 0.0 * ones, np.array([1.0, 3.0]))
    none, one, both = see.bandit_frames(run, episodes, 480, "")
    header, dot = both.height - 480, ImageColor.getrgb(see.COLORS[1])
    pixel = lambda a: (240 + a[0] / 1.5 * 240, header + 240 - a[1] / 1.5 * 240)
    near = lambda image, a: np.abs(np.subtract(color_at(image, pixel(a)), dot)).max() < 60
    assert [near(image, (0.5, 0.9)) for image in (none, one, both)] == [False, True, True]
    assert [near(image, (-0.5, 0.2)) for image in (none, one, both)] == [False, False, True]


# ---- files ----
SMALL = "--episodes 2 --max-steps 10 --every 4 --size 96 --gif-size 48"  # frames at 0, 4, 8, 10


@pytest.mark.slow
def test_mp4_and_gif_have_each_frame(maze_run, tmp_path, capsys):
    pytest.importorskip("imageio_ffmpeg")
    import imageio.v3

    assert see.main_of([str(maze_run), "--out", str(tmp_path / "clip"), *SMALL.split()]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.gif", "clip.mp4"]
    frames = imageio.v3.imread(tmp_path / "clip.mp4")
    assert len(frames) == 4 and frames.shape[2] == 96
    with Image.open(tmp_path / "clip.gif") as gif:
        assert gif.n_frames == 4 and gif.width == 48
        gif.seek(3)
        assert gif.info["duration"] == 2000
    assert "2 episodes" in capsys.readouterr().out


@pytest.mark.slow
def test_runs_stand_side_by_side(maze_run, pendulum_run, tmp_path):
    out = tmp_path / "new" / "both.gif"
    flags = ["--out", str(out), *SMALL.split()]
    assert see.main_of([str(maze_run), str(pendulum_run), *flags]) == 0
    assert [p.name for p in out.parent.iterdir()] == ["both.gif"]
    with Image.open(out) as gif:
        assert gif.width == round((96 + 12 + 96) / 2)


def test_side_by_side_waits_for_the_longest():
    images = [Image.new("RGB", (10, 10 + k), color) for k, color in enumerate(("red", "blue"))]
    short, long = iter(images[:1]), iter([images[1]] * 3)
    frames = list(see.side_by_side([short, long]))
    assert len(frames) == 3 and frames[2].size == (32, 11)
    assert frames[2].getpixel((5, 5)) == (255, 0, 0) and frames[2].getpixel((27, 5)) == (0, 0, 255)


@pytest.mark.slow
def test_follow_ends_with_the_run(maze_run, tmp_path):
    out = tmp_path / "video.gif"
    assert see.main_of([str(maze_run), "--follow", "--out", str(out), *SMALL.split()]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["video_20.gif"]


def test_task_file_draws_itself(toy_run, tmp_path):
    run = see.open_run(toy_run, see.Args(runs=()))

    class Drawn(type(run.env)):
        max_episode_steps = 2

        def draw(self, state):
            return np.full((20, 30, 3), 200 if state.done else 100, np.uint8)

    frames = list(see.frames_of(run._replace(env=Drawn()), see.Args(runs=(), episodes=2, every=1)))
    shades = [frame.getpixel((5, frame.height - 5))[0] for frame in frames]
    assert shades == [100, 200, 100, 200]  # two episodes of one step


# ---- what is shown is what was measured ----
@pytest.mark.parametrize("name", ["toy_run", pytest.param("pendulum_run", marks=pytest.mark.slow)])
def test_episodes_are_those_of_the_evaluation(name, request):
    directory = request.getfixturevalue(name)
    measured = json.loads((directory / "result.json").read_text())["episodes"]
    mode = dict(toy_run="_n1", pendulum_run="_stochastic")[name]
    for seed in (0, 1) if name == "toy_run" else (0,):
        run = see.open_run(directory, see.Args(runs=(), seed=seed))
        assert run.step == (20 if name == "toy_run" else 60)
        episodes = see.play_jax(run, 3, None)
        expected = np.array(measured[f"return{mode}"][seed])[:3]
        np.testing.assert_allclose(episodes.returns, expected, rtol=1e-4)
        assert episodes.length.tolist() == measured[f"length{mode}"][seed][:3]
    assert len(set(measured[f"return{mode}"][0])) > 1  # else it would say nothing


def test_another_mode_acts_differently(pendulum_run):
    modes = {}
    for mode in ("stochastic", "deterministic"):
        run = see.open_run(pendulum_run, see.Args(runs=(), mode=mode))
        modes[mode] = see.play_jax(run, 2, 5).actions
        assert run.title == f"sac_flow {mode}" and modes[mode].shape == (5, 2, 1)
    assert np.abs(modes["stochastic"] - modes["deterministic"]).max() > 1e-4


def test_opening_a_run_leaves_the_script_as_it_was(maze_run):
    run = see.open_run(maze_run, see.Args(runs=()))
    assert all(getattr(run.script, n).__module__ == run.script.__name__ for n in see.REPLACED)


# ---- the plot ----
TINY = {
    "gsflow": dict(hidden_dims=(8,), prior_hidden_dims=(8,), flow_steps=2),
    "flowq": dict(hidden_dims=(8,), flow_steps=2, eval_candidates=1),
    "fmq": dict(hidden_dims=(8,), horizon=2, num_samples=2),
    "sac_flow": dict(hidden_dim=8, d_model=8, critic_hidden_dims=(8,), flow_steps=2),
}


def untrained(name):
    """A run of a script as `open_run` returns it, without training."""
    script = load_script(ROOT / "algos" / f"{name}.py")
    task = script.parse_task("pointmaze-medium")
    args = script.resolve(script.Args(env_id="pointmaze-medium", **TINY[name]), task)
    env = script.make_jax_env(task, args)
    state = script.start_states(args, 2, 2, np.zeros(2, np.float32), np.ones(2, np.float32))
    state = jax.tree.map(lambda x: x[0], state)
    policies = script.evaluation_policies(script.make_networks(args, 2), args)
    policy = next(iter(policies.values()))
    return see.Run(script, task, env, None, policy, args, state, 0, name)


QUICK_ONE = [s if s == "gsflow" else pytest.param(s, marks=pytest.mark.slow) for s in SCRIPTS]


@pytest.mark.parametrize("name", QUICK_ONE)
def test_every_method_is_asked(name):
    run = untrained(name)
    points = np.array([[0, 0], [4, 8], [20, 20]], np.float32)
    value, actions, noise, flow = see.ask(run, points, 5, with_draws=True)
    assert value.shape == (3,) and actions.shape == noise.shape == flow.shape == (3, 5, 2)
    assert np.abs(actions).max() <= 1 and np.abs(flow).max() <= 1
    assert noise.std() > 0.05 and len(np.unique(noise)) == noise.size
    look = see.look_of(run)
    chunk = run.policy(run.state, points[0], jax.random.key(3))
    by_hand = look.value(points[0], chunk)
    constant = run._replace(policy=lambda state, obs, key: chunk)
    np.testing.assert_allclose(see.ask(constant, points, 2)[0][0], by_hand, rtol=1e-4, atol=1e-6)


def test_plot_writes_a_picture(maze_run, tmp_path):
    out = tmp_path / "policy.png"
    assert see.main_of([str(maze_run), "--plot", "--out", str(out)]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["policy.png"]
    pixels = np.asarray(Image.open(out).convert("RGB"), int)
    assert pixels.shape[1] > 1000 and pixels.std() > 30


def test_plot_of_a_walker(gsflow, tmp_path):
    """The ant stands where the value is asked; without torques its way ends near its start."""
    task = gsflow.parse_task("antmaze-medium")
    args = gsflow.resolve(gsflow.Args(env_id="antmaze-medium", **TINY["gsflow"]), task)
    host = gsflow.make_host_env(task, "post")
    state = gsflow.start_states(args, 29, 8, np.zeros(29, np.float32), np.ones(29, np.float32))
    state = jax.tree.map(lambda x: x[0], state)
    asked = []

    def policy(state, obs, key):
        jax.debug.callback(lambda x: asked.append(np.asarray(x)), obs, ordered=False)
        return np.zeros(8, np.float32) + 0 * obs[:8]

    run = see.Run(gsflow, task, None, host, policy, args, state, 0, "ant")
    maze = see.maze_of(run)
    view = see.MazeView(maze, 480)
    assert view.unit == 4
    for xy in (maze.start_xy, maze.goal_xy, host.unwrapped.cur_task_info["goal_xy"]):
        column, row = np.floor((xy - view.low) / view.unit).astype(int)
        assert maze.maze_map[row, column] == 0  # they lie in the open
        assert host.unwrapped.xy_to_ij(xy) == (row, column)
    assert np.linalg.norm(maze.start_xy - maze.goal_xy) > 10
    points = np.array([[0, 0], [4, 8]], np.float32)
    value = see.ask(run, points, 1)[0]
    jax.effects_barrier()
    rows = {tuple(x[:2]): x for x in np.reshape(asked, (-1, 29))}
    assert set(rows) == {(0, 0), (4, 8)}
    start = np.asarray(host.reset(seed=0)[0], np.float32)
    for point, q in zip(points, value, strict=True):
        np.testing.assert_array_equal(rows[tuple(point)][2:], start[2:])
        by_hand = see.look_of(run).value(rows[tuple(point)], np.zeros(8, np.float32))
        np.testing.assert_allclose(q, by_hand, rtol=1e-4, atol=1e-6)
    policy_only = run._replace(policy=lambda state, obs, key: 0 * obs[:8])
    see.plot([policy_only], tmp_path / "x.png", 1)
    pixels = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"), int)
    assert pixels.shape[1] > 900 and pixels.std() > 30
    red = (np.abs(pixels - (214, 39, 40)).max(axis=-1) < 40).nonzero()  # of a way that fails
    assert 0 < len(red[0]) < 2_000 and np.ptp(red[1]) < 60
    host.close()


# ---- misuse ----
def refused(capsys, *argv):
    assert see.main_of([*map(str, argv)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def test_misuse_is_one_sentence(maze_run, toy_run, tmp_path, capsys):
    gif = tmp_path / "x.gif"
    assert "which run?" in refused(capsys)
    assert "has no args.json" in refused(capsys, tmp_path, "--out", gif)
    assert "(none: leave it out)" in refused(capsys, maze_run, "--mode", "n1", "--out", gif)
    assert "flowq's (n1)" in refused(capsys, toy_run, "--mode", "best", "--out", gif)
    assert "seeds 0 to 1" in refused(capsys, toy_run, "--seed", 2, "--out", gif)
    assert "at least 1" in refused(capsys, maze_run, "--every", 0, "--out", gif)
    assert "use --script" in refused(capsys, maze_run, "--script", "no.py", "--out", gif)
    assert "is none" in refused(capsys, toy_run, "--plot", "--out", tmp_path / "x.png")
    assert "PNG" in refused(capsys, maze_run, "--plot", "--out", gif)
    assert "leave out --plot" in refused(capsys, maze_run, "--plot", "--follow")
    (tmp_path / "file").touch()
    assert "cannot write" in refused(
        capsys, maze_run, *SMALL.split(), "--out", tmp_path / "file/x.gif"
    )
    script = tmp_path / "script.py"
    script.write_text("Args = 1\n")
    assert "has no main" in refused(capsys, maze_run, "--script", script, "--out", gif)
    script.rename(tmp_path / "broken.py").write_text("Args =\n")
    broken = tmp_path / "broken.py"
    assert "cannot load" in refused(capsys, maze_run, "--script", broken, "--out", gif)
    (tmp_path / "args.json").write_text("{")
    assert "damaged" in refused(capsys, tmp_path, "--out", gif)
    (tmp_path / "args.json").write_text('{"algo": "ppo"}')
    assert "ppo.py" in refused(capsys, tmp_path, "--out", gif)
    assert not gif.exists() and not list(tmp_path.glob(".*"))


def test_missing_packages_are_one_sentence(maze_run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    assert "pip install -r benchmark/requirements-video.txt" in refused(capsys, maze_run)
    assert (ROOT / "benchmark" / "requirements-video.txt").is_file()


def test_without_opengl_is_one_sentence(monkeypatch):
    monkeypatch.setattr(see, "PROBE", "raise SystemExit(1)")
    monkeypatch.delitem(sys.modules, "mujoco", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(see.UserError, match="neither EGL nor OSMesa"):
        see.choose_gl.__wrapped__()


def test_osmesa_is_the_fallback(monkeypatch):
    probe = "import os; raise SystemExit(os.environ['MUJOCO_GL'] != 'osmesa')"
    monkeypatch.setattr(see, "PROBE", probe)
    monkeypatch.delitem(sys.modules, "mujoco", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setenv("PYOPENGL_PLATFORM", "egl")
    see.choose_gl.__wrapped__()
    assert os.environ["MUJOCO_GL"] == os.environ["PYOPENGL_PLATFORM"] == "osmesa"


def test_task_without_a_picture_is_one_sentence(toy_run):
    run = see.open_run(toy_run, see.Args(runs=()))

    class Longer(type(run.env)):
        max_episode_steps = 2

    with pytest.raises(see.UserError, match="method draw"):
        list(see.frames_of(run._replace(env=Longer()), see.Args(runs=())))


# ---- from the scripts ----
def test_copied_script_says_which_file_to_copy(maze_run, tmp_path, capsys):
    copy = tmp_path / "algos" / "mine.py"
    copy.parent.mkdir()
    shutil.copy(ROOT / "algos" / "gsflow.py", copy)
    mine = see.load_script(copy)
    assert mine.command_line(mine.main, mine.Args, ["--evaluate", str(maze_run), "--video"]) == 2
    err = capsys.readouterr().err
    assert "needs benchmark/see.py" in err and f"--script {copy}" in err and err.count("\n") == 1
    assert mine.command_line(mine.main, mine.Args, ["--video"]) == 2
    assert "--evaluate RUN_DIR" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluate_with_video(maze_run):
    pytest.importorskip("imageio_ffmpeg")
    command = [sys.executable, str(ROOT / "algos" / "gsflow.py"), "--evaluate", str(maze_run)]
    out = subprocess.run([*command, "--video"], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "written to" in out.stdout and "success" in out.stdout
    for kind in ("gif", "mp4"):
        video = maze_run / f"video.{kind}"
        assert video.stat().st_size > 1_000
        video.unlink()


# ---- without a display ----
OFFICIAL = {  # script, flags; HalfCheetah's renderer is Gymnasium's, the maze's OGBench's
    "HalfCheetah-v5": ("sac_flow", SAC),
    "pointmaze-medium": ("gsflow", f"--env-backend host {GSFLOW}"),
}


@pytest.mark.slow
@pytest.mark.parametrize("env_id", OFFICIAL)
def test_official_environments_are_rendered(env_id, tmp_path):
    """In a process of its own, because this one may have imported MuJoCo with other settings."""
    script, flags = OFFICIAL[env_id]
    flags = f"--env-id {env_id} --eval-episodes 1 {flags}"
    run = train(script, tmp_path / "runs", flags)
    command = [sys.executable, str(ROOT / "benchmark" / "see.py"), str(run)]
    command += ["--out", str(tmp_path / "x.gif"), *SMALL.split()]
    env = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    out = subprocess.run(command, capture_output=True, text=True, env=env)
    if "neither EGL nor OSMesa" in out.stderr:
        pytest.skip(out.stderr)
    assert out.returncode == 0, out.stderr
    with Image.open(tmp_path / "x.gif") as gif:
        assert gif.n_frames == 8  # two episodes
        pictures = []
        for k in (0, 3):
            gif.seek(k)
            pictures.append(np.asarray(gif.convert("RGB"), int)[10:])
    assert pictures[0].std() > 10  # not an empty picture
    assert np.abs(pictures[0] - pictures[1]).max() > 30  # it moved


@pytest.mark.slow
def test_official_episodes_are_those_of_the_evaluation(tmp_path):
    run = train("sac_flow", tmp_path, f"--env-id Pendulum-v1 --eval-episodes 2 {SAC}")
    measured = json.loads((run / "result.json").read_text())["episodes"]["return_stochastic"][0]
    opened = see.open_run(run, see.Args(runs=()))
    returns = [total for *_, total, _, over in see.play_host(opened, 2, None) if over]
    opened.host.close()
    np.testing.assert_allclose(returns, measured, rtol=1e-4)


WITHOUT_RENDERER = """
import sys
sys.path.insert(0, 'benchmark')
import see
try:
    see.choose_gl()
except see.UserError as e:
    sys.exit(str(e))
import gymnasium
env = gymnasium.make('HalfCheetah-v5')
env.reset(seed=0)
draw = see.make_camera(env, 120, 'cheetah')
first = draw().astype(int)
for _ in range(10):
    env.step(env.action_space.high)
second = draw().astype(int)
assert first.shape == (90, 120, 3) and first.std() > 10, first.std()
assert abs(second - first).max() > 30
# side by side, each draws in its own OpenGL context
other = gymnasium.make('HalfCheetah-v5', render_mode='rgb_array', width=160, height=120)
other.reset(seed=0)
draw_other = see.make_camera(other, 160, 'cheetah')
alone = draw_other().astype(int)
draw()
assert abs(draw_other().astype(int) - alone).max() < 3
"""


@pytest.mark.slow
def test_mujoco_draws_where_an_environment_does_not():
    command = [sys.executable, "-c", WITHOUT_RENDERER]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if "neither EGL nor OSMesa" in out.stderr:
        pytest.skip(out.stderr)
    assert out.returncode == 0, out.stderr


# ---- the notebook ----
@pytest.mark.slow
def test_notebook_runs(tmp_path, monkeypatch):
    """All but the cells that clone and install, with small settings in place of the notebook's."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    for part in ("algos", "benchmark"):
        (tmp_path / part).symlink_to(ROOT / part)
    notebook = nbformat.read(ROOT / "benchmark" / "first_run.ipynb", as_version=4)
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    assert sum("setup" in t for t in tags) == 1 and sum("settings" in t for t in tags) == 1
    for cell, names in zip(notebook.cells, tags, strict=True):
        if "settings" in names:
            cell.source = f'FLAGS = "{GSFLOW} --eval-episodes 2"\nSEE = "{SMALL}"'
    notebook.cells = [c for c, t in zip(notebook.cells, tags, strict=True) if "setup" not in t]
    monkeypatch.setenv("PATH", f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where).execute()
    shown = [o for c in notebook.cells for o in c.get("outputs", ())]
    assert sum("image/gif" in o.get("data", {}) for o in shown) == 2
    assert sum("image/png" in o.get("data", {}) for o in shown) == 1
    assert (tmp_path / "mine.py").read_text() != (ROOT / "algos" / "gsflow.py").read_text()
    assert list(tmp_path.glob("runs/mine/*/result.json"))
    text = "".join(o.get("text", "") for o in shown)
    assert "Traceback" not in text and "error:" not in text
