"""See what a run has learned: its episodes as MP4 and GIF, its value, actions and samples as PNG.

    python benchmark/see.py runs/RUN                      -> runs/RUN/video.mp4 and video.gif
    python benchmark/see.py runs/A runs/B --out ab.gif    side by side; .mp4 or .gif: only that one
    python benchmark/see.py runs/RUN --plot               -> runs/RUN/policy.png (mazes)
    python benchmark/see.py runs/RUN --follow             while it trains: a video per checkpoint
    python algos/gsflow.py --evaluate runs/RUN --video    the first of these, then the evaluation

The episodes are the first of those that `--evaluate` measures at the same checkpoint, so a video
shows what the table counts. Point mazes, one-step toys and the pendulum are drawn here, all their
episodes at once; official environments are drawn by their own renderers, or by MuJoCo's where they
have none, one episode after another, without a display: through EGL, else OSMesa. A JAX environment
of a task file is drawn by its method draw(state) -> uint8 (H, W, 3), one episode after another.

--plot shows the critics' value all over a maze, beside it where the policy of a point maze goes in
each place and what its prior and flow draw there, or the ways of a walker (antmaze, humanoidmaze).

MP4 needs a package that holds an ffmpeg: pip install -r benchmark/requirements-video.txt
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont  # matplotlib requires it, and takes ten times as long

HERE = Path(__file__).resolve().parent
NEEDED = ("Args", "main", "read_args", "purpose_key", "make_networks", "arms")
REPLACED = ("make_evaluate", "make_host_env")


class UserError(Exception):
    """Something the user can mend; shown as one sentence, exit code 2."""


@dataclasses.dataclass(frozen=True)
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]]  # run directories; several: side by side
    out: str | None = None
    """file to write; without .mp4 or .gif at its end, both (default: video, or policy.png with
    --plot, in the first run directory)"""
    plot: bool = False  # a picture of value, actions and samples all over the maze instead
    follow: bool = False  # a video of each checkpoint that the runs write, until they end
    mode: str | None = None  # mode of evaluation, say best_of_n (default: each method's first)
    seed: int | None = None  # which seed of a run with several (default: the first)
    arm: str | None = None  # which arm of a grid, say alpha=3 (default: the first)
    episodes: int = 4  # episodes to show
    max_steps: int | None = None  # cut them after so many steps
    every: int = 2  # steps between two frames
    value: bool = False  # point mazes: the critic's value as the background
    size: int = 480  # pixels, the longer side of a picture
    gif_size: int = 320  # the same in GIFs
    fps: int = 25  # frames per second
    script: str | None = None  # the script that made the runs, where it is not the one in algos/


# ---- a run, through the functions of its script ----
class Run(NamedTuple):
    """What `--evaluate` makes of a run directory."""

    script: Any  # the module
    task: Any
    env: Any  # JAX environment, or None
    host: Any  # official environment, or None
    policy: Callable  # (state, obs (D,), key) -> actions (H * A,)
    args: Any
    state: Any  # of one seed
    step: int
    title: str

    @property
    def act_dim(self):
        return (self.env or self.host).action_space.shape[0]


@functools.cache
def load_script(path):
    """Import a script by its path, once."""
    spec = importlib.util.spec_from_file_location(f"see{len(sys.modules)}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look modules up by name
    try:
        spec.loader.exec_module(module)
    except (OSError, ImportError, SyntaxError) as e:
        raise UserError(f"cannot load {path}: {e}") from e
    for name in (*NEEDED, *REPLACED):
        if not hasattr(module, name):
            raise UserError(f"{path} has no {name}, which see.py calls; see the scripts in algos/")
    return module


class Found(Exception):
    """All is known that an evaluation would begin with."""


def open_run(directory, options):
    """Let the script do all that `--evaluate` does but the evaluation itself -> Run."""
    path = Path(directory) / "args.json"
    if not path.is_file():
        raise UserError(f"{directory} is not a run directory: it has no args.json")
    try:
        algo = str(json.loads(path.read_text())["algo"])
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is damaged ({e}); start a new run") from e
    path = Path(options.script or HERE.parent / "algos" / f"{algo}.py").resolve()
    if not path.is_file():
        raise UserError(f"{directory} is a run of {algo}.py, but there is no {path}: use --script")
    script, found = load_script(path), {}

    def make_evaluate(task, env, policies, args):
        found.update(task=task, env=env, policies=policies, args=args)
        return enough

    def enough(state, step):
        found.update(state=state, step=step)
        raise Found

    def make_host_env(task, success_timing):
        found["host"] = render_env(own["make_host_env"], task, success_timing, options.size)
        return found["host"]

    own = {name: getattr(script, name) for name in REPLACED}
    try:
        script.make_evaluate, script.make_host_env = make_evaluate, make_host_env
        command = ["--evaluate", str(directory)]
        args = script.read_args(str(directory), command, script.Args())
        with contextlib.suppress(Found):
            script.main(args)
        if args.env_backend == "mjx":  # acts inside the program, is measured on the official one
            found["env"] = None
            make_host_env(found["task"], args.success_timing)
    except script.UserError as e:
        raise UserError(str(e)) from e
    finally:
        vars(script).update(own)
    return chosen(script, found, algo, options)


def chosen(script, found, algo, options):
    """The mode of acting, arm and seed that the flags ask for, of a run as `open_run` found it."""
    args, policies = found["args"], found.pop("policies")
    mode = options.mode if options.mode is not None else next(iter(policies))
    if mode not in policies:
        names = ", ".join(policies) if any(policies) else "none: leave it out"
        raise UserError(f"--mode {mode} is not one of {algo}'s ({names})")
    seed = args.seed if options.seed is None else options.seed
    if not args.seed <= seed < args.seed + args.num_seeds:
        seeds = f"{args.seed} to {args.seed + args.num_seeds - 1}"
        raise UserError(f"--seed {seed} is not in a run of the seeds {seeds}")
    arms = script.arms(args)
    arm = next(iter(arms)) if options.arm is None else options.arm
    if arm not in arms:
        names = ", ".join(arms) if any(arms) else "none: leave it out"
        raise UserError(f"--arm {arm} is not one of the run's ({names})")
    index = list(arms).index(arm) * args.num_seeds + seed - args.seed
    state = script.jax.tree.map(lambda x: x[index], found.pop("state"))
    title = " ".join(filter(None, (algo, mode, arm)))
    rest = dict(host=None, policy=policies[mode], title=title)
    found["args"] = arms[arm]
    return Run(script=script, state=state, **(rest | found))


# ---- official environments without a display ----
PROBE = """import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco/>")
with mujoco.Renderer(model, 8, 8) as renderer: pass"""


@functools.cache
def choose_gl():
    """Set MUJOCO_GL to what works here: what it says now, EGL, OSMesa. MuJoCo reads it when it is
    imported, so each is tried in a process of its own."""
    if sys.platform != "linux" or "mujoco" in sys.modules:
        return
    for name in dict.fromkeys((os.environ.get("MUJOCO_GL", "egl"), "egl", "osmesa")):
        chosen = {"MUJOCO_GL": name, "PYOPENGL_PLATFORM": name}
        probe = [sys.executable, "-c", PROBE]
        if subprocess.run(probe, env=os.environ | chosen, capture_output=True).returncode == 0:
            os.environ.update(chosen)
            return
    raise UserError(
        "drawing this environment needs OpenGL that works without a display, and neither EGL nor "
        "OSMesa does: install one of them (Debian, Ubuntu: apt install libegl1 libosmesa6)"
    )


def render_env(make_host_env, task, success_timing, size):
    """The official environment as the script makes it, able to draw."""
    choose_gl()
    import gymnasium

    make = gymnasium.make
    shape = dict(width=size, height=size * 3 // 4)  # OGBench's cameras see a large maze whole

    def make_to_render(env_id, **options):
        level, gymnasium.logger.min_level = gymnasium.logger.min_level, gymnasium.logger.ERROR
        try:
            return make(env_id, render_mode="rgb_array", **shape, **options)
        except TypeError:  # not MuJoCo: it has a size of its own
            return make(env_id, render_mode="rgb_array", **options)
        finally:
            gymnasium.logger.min_level = level

    gymnasium.make = make_to_render
    try:
        return make_host_env(task, success_timing)
    finally:
        gymnasium.make = make


def simulator(env):
    """MuJoCo's (model, data) in an environment, or None; robosuite, which makes new ones at each
    reset, has them at the end of a chain of `sim`s."""
    import mujoco

    while env is not None:
        model, data = getattr(env, "model", None), getattr(env, "data", None)
        model, data = getattr(model, "_model", model), getattr(data, "_data", data)
        if isinstance(model, mujoco.MjModel):
            return model, data
        env = getattr(env, "sim", None)
    return None


def render(env):
    """The environment's own picture. Gymnasium's viewer takes the OpenGL context for its first one
    only, but with runs side by side others have had it since."""
    viewer = getattr(getattr(env.unwrapped, "mujoco_renderer", None), "viewer", None)
    if viewer is not None:
        viewer.make_context_current()
    return env.render()


def make_camera(env, size, name):
    """Function () -> uint8 (H, W, 3) that draws the official environment as it stands."""
    if env.render_mode == "rgb_array":
        return functools.partial(render, env)
    import mujoco

    if simulator(env.unwrapped) is None:
        raise UserError(f"{name} cannot be drawn: give its environment render_mode 'rgb_array'")
    height, current, renderer = size * 3 // 4, None, None
    look = mujoco.MjvOption()
    look.geomgroup[0] = not hasattr(env.unwrapped, "sim")  # robosuite's shapes for collisions

    def draw():
        nonlocal current, renderer
        model, data = simulator(env.unwrapped)
        if model is not current:
            if renderer:
                renderer.close()
            view, current = model.vis.global_, model
            view.offwidth, view.offheight = max(view.offwidth, size), max(view.offheight, height)
            renderer = mujoco.Renderer(model, height, size)
        cameras = [model.camera(i).name for i in range(model.ncam)]
        camera = next((c for c in ("agentview", "track") if c in cameras), -1)
        renderer.update_scene(data, camera, look)
        return renderer.render()

    return draw


# ---- episodes ----
class Episodes(NamedTuple):
    """N episodes on a JAX environment; one that is over stays where it ended."""

    states: Any  # tree of (T + 1, N, ...)
    actions: np.ndarray  # (T, N, A)
    length: np.ndarray  # (N,)
    success: np.ndarray  # (N,), at the last step
    returns: np.ndarray  # (N,)


def pick(chosen, new, old):
    """Rows of `new` where `chosen` (N,), else of `old`, each (N, ...)."""
    return np.where(chosen.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def play_jax(run, number, limit):
    """The first `number` episodes that evaluate_jax of the script plays, step by step."""
    jax, env, jnp = run.script.jax, run.env, run.script.jnp
    key = run.script.purpose_key(run.state.seed, "eval", run.step)
    start_key, env_key, policy_key = jax.random.split(key, 3)

    @jax.jit
    def decide(states, t):
        obs = jax.vmap(lambda s: env.observation(s, None))(states)
        keys = jax.random.split(jax.random.fold_in(policy_key, t), number)
        chunks = jax.vmap(functools.partial(run.policy, run.state))(obs, keys)
        return chunks.reshape(number, -1, *env.action_space.shape).swapaxes(0, 1)

    @jax.jit
    def advance(states, actions, t):
        keys = jax.random.split(jax.random.fold_in(env_key, t), (2, number))[0]
        after = jax.vmap(env.transition)(states, actions, keys)
        reward = jax.vmap(lambda s, a, n: env.reward(s, a, n, None))(states, actions, after)
        over = jax.vmap(lambda s: env.terminal(s, None))(after)
        success = jax.vmap(env.success)(after) if hasattr(env, "success") else jnp.zeros(number)
        return after, reward, over, success

    states = jax.vmap(env.initial)(jax.random.split(start_key, number))
    history, taken, alive = [jax.device_get(states)], [], np.ones(number, bool)
    length, success, returns = np.zeros(number, int), np.zeros(number), np.zeros(number)
    limit = min(limit or env.max_episode_steps, env.max_episode_steps)
    while alive.any() and len(taken) < limit:
        for actions in np.asarray(decide(states, len(taken))):
            if not alive.any() or len(taken) == limit:
                break
            states, *outcome = advance(states, actions, len(taken))
            reward, over, succeeded = (np.asarray(x) for x in outcome)
            keep = functools.partial(pick, alive)
            history.append(jax.tree.map(keep, jax.device_get(states), history[-1]))
            taken.append(actions)
            returns, length = returns + alive * reward, length + alive
            success, alive = np.where(alive, succeeded, success), alive & ~over
    states = jax.tree.map(lambda *x: np.stack(x), *history)
    return Episodes(states, np.stack(taken), length, success, returns)


def play_host(run, number, limit):
    """The first `number` episodes that evaluate_host of the script plays: yields, before the first
    step and after each, (episode, t, return so far, success, whether it is over)."""
    jax, env = run.script.jax, run.host

    @jax.jit
    def decide(obs, episode, t):
        key = run.script.purpose_key(run.state.seed, "eval", run.step, episode, t)
        return run.policy(run.state, obs, key)

    for episode in range(number):
        ids = (int(run.state.seed), run.step, episode)
        obs, _ = env.reset(seed=int(np.random.SeedSequence(ids).generate_state(1)[0]))
        t, total, over, chunk = 0, 0.0, False, []
        yield episode, t, total, 0.0, over
        while not over:
            if not len(chunk):
                obs = np.asarray(obs, np.float32)
                chunk = np.asarray(decide(obs, episode, t)).reshape(-1, *env.action_space.shape)
            obs, reward, terminated, truncated, info = env.step(chunk[0])
            t, total, chunk = t + 1, total + float(reward), chunk[1:]
            over = bool(terminated or truncated) or t == limit
            yield episode, t, total, float(info.get("success", 0.0)), over


# ---- drawing ----
INK, FLOOR, WALL, LINE, GOAL = "#20262d", "#f6f7f9", "#39424e", "#c9d0d8", "#2ca02c"
COLORS = ("#1f77b4", "#d62728", "#ff7f0e", "#9467bd", "#17a2b8", "#e377c2", "#8c564b", "#6b7a00")
CUT = 0.7  # of the outer walls' width is left away
LOW_VALUE, HIGH_VALUE = np.array((249, 250, 252)), np.array((150, 196, 232))
SHARP = 2  # drawn so many times larger, then scaled down, because pillow draws jagged edges


def times(length, every):
    """Steps of which there is a frame: each `every`-th, and the last."""
    return sorted({*range(0, length, every), length})


def with_header(image, title, status):
    """The picture below a line with its title and what is going on."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    height = max(18, image.width // 20)
    framed = Image.new("RGB", (image.width, image.height + height), "white")
    framed.paste(image, (0, height))
    draw, points = ImageDraw.Draw(framed), height * 0.68
    font = ImageFont.load_default(points)
    if (length := draw.textlength(f"{title}    {status}", font)) > image.width:
        font = ImageFont.load_default(max(6, points * image.width / length))
    draw.text((2, 0), title, INK, font)
    draw.text((image.width - 2 - draw.textlength(status, font), 0), status, INK, font)
    return framed


class MazeView:
    """Where a point maze lies in a picture: x to the right, y upwards."""

    def __init__(self, env, size):
        self.env = env
        rows, columns = np.array(env.maze_map.shape) - 2 * CUT
        self.cell = size / max(rows, columns)  # pixels
        self.width, self.height = round(columns * self.cell), round(rows * self.cell)
        corner = np.asarray(env.ij_to_xy(np.array([[0, 0], [1, 1]])), float)
        self.unit = corner[1, 0] - corner[0, 0]  # width of a cell in the maze's own lengths
        self.low = corner[0] - self.unit / 2  # of the whole maze

    def pixel(self, xy):
        """Positions (..., 2) in the maze -> (..., 2) in the picture, from its upper left corner."""
        part = ((np.asarray(xy, float) - self.low) / self.unit - CUT) * self.cell
        return np.stack([part[..., 0], self.height - part[..., 1]], axis=-1)

    def free_points(self, per_cell):
        """Points (M, 2) on a lattice, `per_cell` across each cell, where there is no wall."""
        rows, columns = self.env.maze_map.shape
        i, j = np.indices((rows * per_cell, columns * per_cell)).reshape(2, -1)
        free = self.env.maze_map[i // per_cell, j // per_cell] == 0
        lattice = np.stack([j, i], axis=-1)[free]
        return self.low + (lattice + 0.5) / per_cell * self.unit, lattice

    def background(self, value=None):
        """Walls, start and goal; `value`: (points (M, 2), values (M,)) that colour the floor."""
        image = Image.new("RGB", (self.width * SHARP, self.height * SHARP), FLOOR)
        draw, cell = ImageDraw.Draw(image), self.cell * SHARP
        if value is not None:
            points, level = value[0], np.asarray(value[1])
            level = (level - level.min()) / max(float(np.ptp(level)), 1e-8)
            level = np.argsort(np.argsort(level)) / len(level)  # ranks: equal areas of each shade
            half = np.unique(np.diff(np.unique(points[:, 0])).round(6))[0] / 2
            for point, share in zip(points, np.round(level, 1), strict=True):
                color = tuple(np.round(LOW_VALUE + share * (HIGH_VALUE - LOW_VALUE)).astype(int))
                left, bottom = self.pixel(point - half) * SHARP
                right, top = self.pixel(point + half) * SHARP
                draw.rectangle((left, top, right, bottom), tuple(map(int, color)))
        for i, j in zip(*np.nonzero(self.env.maze_map), strict=True):
            x, y = self.pixel(np.asarray(self.env.ij_to_xy(np.array([i, j])), float)) * SHARP
            draw.rectangle((x - cell / 2, y - cell / 2, x + cell / 2, y + cell / 2), WALL)
        radius = self.env.goal_tol
        self.disc(draw, self.env.goal_xy, radius, GOAL)
        self.disc(draw, self.env.start_xy, radius, None, outline=INK)
        return image

    def disc(self, draw, xy, radius, fill, outline=None):
        (x, y), r = self.pixel(xy) * SHARP, radius / self.unit * self.cell * SHARP
        draw.ellipse((x - r, y - r, x + r, y + r), fill, outline, width=SHARP)

    def frames(self, episodes, every, value, title):
        """All episodes at once: balls of their true size, and the ways they have come."""
        from_start, canvas = episodes.states.xy, self.background(value)  # (T + 1, N, 2)
        ways, draw = self.pixel(from_start) * SHARP, ImageDraw.Draw(canvas)
        before = 0
        for t in times(int(episodes.length.max()), every):
            for n, end in enumerate(np.minimum(t, episodes.length)):
                if end > before:
                    line = [tuple(p) for p in ways[before : end + 1, n]]
                    draw.line(line, COLORS[n % len(COLORS)], 2 * SHARP, "curve")
            before, frame = t, canvas.copy()
            balls = ImageDraw.Draw(frame)
            for n in range(ways.shape[1]):
                color = COLORS[n % len(COLORS)]
                self.disc(balls, from_start[t, n], 0.7, color, outline="white")
            there = int((episodes.success * (episodes.length <= t)).sum())
            status = f"step {t}   {there}/{ways.shape[1]} at the goal"
            small = frame.resize((self.width, self.height), Image.Resampling.LANCZOS)
            yield with_header(small, title, status)


def pendulum_frames(episodes, every, size, title):
    """All episodes at once, a rod each; upright is the aim."""
    angles = np.asarray(episodes.states)[..., 0]  # (T + 1, N), 0 is upright, to the left positive
    side = int(np.ceil(np.sqrt(angles.shape[1])))
    rows, cell = -(-angles.shape[1] // side), size * SHARP // side
    for t in times(len(angles) - 1, every):
        frame = Image.new("RGB", (side * cell, rows * cell), FLOOR)
        draw = ImageDraw.Draw(frame)
        for n, angle in enumerate(angles[t]):
            centre = (np.array([n % side, n // side]) + 0.5) * cell
            tip = centre + 0.4 * cell * np.array([-np.sin(angle), -np.cos(angle)])
            goal = centre - np.array([0, 0.4 * cell])
            line = [tuple(map(float, centre)), tuple(map(float, goal))]
            draw.line(line, LINE, max(1, cell // 80))
            line = [tuple(map(float, centre)), tuple(map(float, tip))]
            draw.line(line, COLORS[n % len(COLORS)], cell // 16)
            r = cell / 40
            box = (centre[0] - r, centre[1] - r, centre[0] + r, centre[1] + r)
            draw.ellipse(box, INK)
        frame = frame.resize((size, rows * size // side), Image.Resampling.LANCZOS)
        yield with_header(frame, title, f"step {t}")


def bandit_frames(run, episodes, size, title, count=40):
    """One-step tasks: rewards all over the plane of actions, and the actions, in `count` frames."""
    actions, jax = episodes.actions[0], run.script.jax  # (N, 2)
    box = run.env.action_space
    bounded = bool(np.isfinite(box.high).all())
    limit = 1.1 * float(box.high.max()) if bounded else 1.5 * max(1.0, float(np.abs(actions).max()))
    side = size * SHARP
    axis = np.linspace(-limit, limit, side // 4)
    plane = np.stack(np.meshgrid(axis, axis[::-1]), axis=-1).reshape(-1, 2)  # y upwards
    start, key = run.env.initial(jax.random.key(0)), jax.random.key(0)

    def reward(action):
        return run.env.reward(start, action, run.env.transition(start, action, key), None)

    level = np.asarray(jax.jit(jax.vmap(reward))(plane.astype(np.float32)))
    level = ((level - level.min()) / max(float(np.ptp(level)), 1e-8))[:, None]
    level *= (np.abs(plane) <= (box.high if bounded else limit)).all(axis=1, keepdims=True)
    colors = (LOW_VALUE + level * (HIGH_VALUE - LOW_VALUE)).astype(np.uint8)
    canvas = Image.fromarray(colors.reshape(len(axis), len(axis), 3)).resize((side, side))
    draw, r = ImageDraw.Draw(canvas), side / 240
    pixel = lambda a: ((a[0] + limit) / (2 * limit) * side, (limit - a[1]) / (2 * limit) * side)
    if bounded:
        (left, bottom), (right, top) = pixel(box.low), pixel(box.high)
        draw.rectangle((left, top, right, bottom), outline=INK, width=SHARP)
    done = 0
    for end in times(len(actions), -(-len(actions) // count)):
        for action in actions[done:end]:
            x, y = pixel(action)
            draw.ellipse((x - r, y - r, x + r, y + r), COLORS[1])
        done, mean = end, float(episodes.returns[:end].mean()) if end else 0.0
        status = f"{end} actions   mean reward {mean:.2f}"
        yield with_header(canvas.resize((size, size), Image.Resampling.LANCZOS), title, status)


def drawn_frames(run, episodes, every, title):
    """A task file's own drawings, one episode after another."""
    for n, length in enumerate(episodes.length):
        for t in times(int(length), every):
            state = run.script.jax.tree.map(lambda x, t=t, n=n: x[t, n], episodes.states)
            yield with_header(np.asarray(run.env.draw(state)), title, f"episode {n + 1}   step {t}")


def rendered_frames(run, number, limit, every, size, outcomes):
    """Official environments, one episode after another; `outcomes` gets (success, return, length)
    of each."""
    camera = None
    for episode, t, total, success, over in play_host(run, number, limit):
        camera = camera or make_camera(run.host, size, run.task.name)
        if over or t % every == 0:
            end = "   success" if success else ""
            status = f"episode {episode + 1}   step {t}   return {total:.1f}{end}"
            yield with_header(camera(), run.title, status)
        if over:
            outcomes.append((success, total, t))


def frames_of(run, options):
    """Frames of one run; says at the end how the episodes went."""
    number, limit, every, size = options.episodes, options.max_steps, options.every, options.size
    if run.env is None:
        outcomes = []
        yield from rendered_frames(run, number, limit, every, size, outcomes)
    else:
        env = run.env
        one_step = env.max_episode_steps == 1 and env.action_space.shape == (2,)
        episodes = play_jax(run, 1_000 if one_step else number, limit)
        outcomes = list(zip(episodes.success, episodes.returns, episodes.length, strict=True))
        if hasattr(env, "maze_map"):
            view = MazeView(env, size)
            value = value_map(run, view) if options.value else None
            yield from view.frames(episodes, every, value, run.title)
        elif hasattr(env, "draw"):
            yield from drawn_frames(run, episodes, every, run.title)
        elif one_step:
            yield from bandit_frames(run, episodes, size, run.title)
        elif "PendulumFunctional" in [c.__name__ for c in type(env).__mro__]:
            yield from pendulum_frames(episodes, every, size, run.title)
        else:
            raise UserError(
                f"{run.task.name} cannot be drawn: give its environment a method draw(state) -> "
                "uint8 array (height, width, 3)"
            )
    success, total, length = np.mean(outcomes, axis=0)
    rate = f"success {success:.2f}  " if run.task.success else ""
    print(
        f"{run.title}, {run.task.name}, step {run.step:,}: {len(outcomes)} episodes  {rate}"
        f"return {total:.2f}  length {length:.1f}",
        flush=True,
    )


def side_by_side(streams):
    """Join streams of pictures; one that is over stays on its last."""
    current = [next(stream) for stream in streams]
    while True:
        widths, gap = [image.width for image in current], 12
        whole = Image.new("RGB", (sum(widths) + gap * (len(widths) - 1), current[0].height))
        whole = Image.new("RGB", (whole.width, max(i.height for i in current)), "white")
        for k, image in enumerate(current):
            whole.paste(image, (sum(widths[:k]) + gap * k, 0))
        yield whole
        new = [next(stream, None) for stream in streams]
        if not any(new):
            return
        current = [image or old for image, old in zip(new, current, strict=True)]


# ---- files ----
INSTALL = "pip install -r benchmark/requirements-video.txt"


@contextlib.contextmanager
def whole_file(path):
    """A temporary path that becomes `path` if all goes well, and vanishes otherwise."""
    temporary = path.with_name(f".{path.stem}.writing{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}; choose --out") from e
    finally:
        if temporary.exists():
            temporary.unlink()


def check_ffmpeg():
    try:
        import imageio_ffmpeg  # noqa: F401
    except ImportError as e:
        raise UserError(f"MP4 needs imageio-ffmpeg: {INSTALL} (or give --out FILE.gif)") from e


def mp4_writer(path, fps):
    import imageio.v2

    options = dict(fps=fps, codec="libx264", quality=7, macro_block_size=1)
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # JAX's; ffmpeg is exec'd at once
    return imageio.v2.get_writer(path, format="FFMPEG", ffmpeg_log_level="error", **options)


def write_gif(path, frames, fps):
    """One palette for all frames, made from some of them, without dithering: small files. An octree
    keeps the colour of a small thing (a red cube), which the median cut mixes with others."""
    some = [frames[round(k)] for k in np.linspace(0, len(frames) - 1, 8)]
    montage = Image.new("RGB", (some[0].width, some[0].height * len(some)))
    for k, frame in enumerate(some):
        montage.paste(frame, (0, k * frame.height))
    palette = montage.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    first, *rest = [f.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
    durations = [1000 // fps] * len(rest) + [2000]  # the last one stays for a while
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0, disposal=1)


def write_videos(frames, base, fps, scale):
    """Write an endless supply of pictures as MP4, GIF or both, by the end of `base` -> paths."""
    kinds = [base.suffix] if base.suffix in (".mp4", ".gif") else [".mp4", ".gif"]
    base = base.with_suffix("") if base.suffix in kinds else base
    paths = [base.with_name(base.name + kind) for kind in kinds]
    small = []
    with contextlib.ExitStack() as stack:
        files = {p.suffix: stack.enter_context(whole_file(p)) for p in paths}
        writer = None
        if ".mp4" in files:
            writer = stack.enter_context(mp4_writer(files[".mp4"], fps))
        for frame in frames:
            if writer:  # H.264 wants even sizes
                even = frame.crop(
                    (0, 0, frame.width + frame.width % 2, frame.height + frame.height % 2)
                )
                writer.append_data(np.asarray(even))
            if ".gif" in files:
                size = (round(frame.width * scale), round(frame.height * scale))
                small.append(frame.resize(size, Image.Resampling.LANCZOS))
        if small:
            write_gif(files[".gif"], small, fps)
    return paths


def record(runs, base, options):
    """Videos of the runs, side by side."""
    streams = [frames_of(run, options) for run in runs]
    frames = side_by_side(streams)
    paths = write_videos(frames, base, options.fps, min(1, options.gif_size / options.size))
    for run in runs:
        if run.host is not None:
            run.host.close()
    for path in paths:
        print(f"written to {path} ({path.stat().st_size / 1e6:.2f} MB)")


def follow(options, base):
    """A video of each checkpoint, as it is written; ends with the runs."""
    files = [Path(run) / "checkpoint.msgpack" for run in options.runs]
    ends = [Path(run) / "result.json" for run in options.runs]
    seen = None
    while True:
        over = all(end.is_file() for end in ends)
        stamps = [f.stat().st_mtime_ns for f in files if f.is_file()]
        if len(stamps) == len(files) and stamps != seen:
            runs = [open_run(run, options) for run in options.runs]
            record(runs, base.with_name(f"{base.stem}_{runs[0].step}{base.suffix}"), options)
            seen = stamps
        elif over:
            return
        time.sleep(2)


# ---- what a method has learned, all over a maze ----
class Look(NamedTuple):
    """A method's own functions of one raw observation (D,)."""

    value: Callable  # (obs, chunk) -> the critics' value of it
    draw: Callable  # (obs, key) -> (noise of the prior, action that the flow makes of it)


def look_of(run):
    """How to ask the script's method; a script of another name has to be added here."""
    script, args, state = run.script, run.args, run.state
    jax, jnp = script.jax, script.jnp
    size = run.act_dim
    nets, params = script.make_networks(args, size), state.params
    seen = lambda obs: (obs - state.obs_mean) / state.obs_std
    noise = lambda key, *shape: jax.random.normal(key, shape)
    if script.ALGO == "gsflow":

        def draw(obs, key):
            x = script.sample_prior(params, nets, seen(obs), key)
            return x, script.flow_endpoint(params, nets, seen(obs), x, args.flow_steps)

        return Look(lambda obs, a: nets.critic(params["critic"], seen(obs), a).mean(), draw)
    if script.ALGO == "flowq":

        def draw(obs, key):
            x = noise(key, size)
            return x, script.flow_endpoint(state.ema, nets, seen(obs), x, args)

        return Look(lambda obs, a: nets.critic(state.target_critic, seen(obs), a).min(), draw)
    if script.ALGO == "fmq":

        def draw(obs, key):
            x = noise(key, args.horizon * size)
            return x, script.sample_chunk(params, nets, args, seen(obs), x)

        return Look(lambda obs, a: nets.critic(params["critic"], seen(obs), a).mean(), draw)
    if script.ALGO == "sac_flow":

        def value(obs, chunk):
            inputs = (params["critic"], state.stats["critic"], seen(obs)[None], chunk[None])
            return nets.critic(*inputs)[0].mean()

        def draw(obs, key):
            eps = noise(key, args.flow_steps + 1, 1, nets.dim)
            actor = (params["actor"], state.stats["actor"], nets, args, seen(obs)[None])
            path, _ = script.rollout(*actor, eps, args.sigma_inference)
            return eps[0, 0], args.action_scale * jnp.tanh(path.x[-1, 0])

        return Look(value, draw)
    raise UserError(
        f"see.py does not know the critic and the flow of '{script.ALGO}': add them to look_of"
    )


def ask(run, points, samples, with_draws=False):
    """At each of the points (M, 2): the critics' value of the policy's actions (M,), the actions
    (M, samples, A), and if asked for noises and the flow's actions, the first of each chunk."""
    jax, look, size = run.script.jax, look_of(run), run.act_dim

    def at(inputs):
        obs, keys = inputs[0], jax.random.split(inputs[1], samples)
        chunks = jax.vmap(lambda key: run.policy(run.state, obs, key))(keys)
        value = jax.vmap(look.value, in_axes=(None, 0))(obs, chunks).mean()
        found = value, chunks[:, :size]
        if with_draws:
            noises, actions = jax.vmap(look.draw, in_axes=(None, 0))(obs, keys)
            found += noises[:, :size], actions[:, :size]
        return found

    keys = jax.random.split(jax.random.key(0), len(points))
    obs = np.asarray(points, np.float32)
    if not run.env:  # a walker as it stands at the start of an episode, moved there
        obs = np.tile(np.asarray(run.host.reset(seed=0)[0], np.float32), (len(points), 1))
        obs[:, :2] = points
    found = jax.jit(lambda *x: jax.lax.map(at, x, batch_size=64))(obs, keys)
    return [np.asarray(x) for x in found]


def value_map(run, view):
    """(points, values) to colour the floor of a maze with."""
    points, _ = view.free_points(6)
    return points, ask(run, points, 4)[0]


def plot(runs, path, episodes):
    """A row per run: value map; point mazes: field of actions, samples of prior, flow and policy;
    walkers: the ways of some episodes."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from e
    mazes = [maze_of(run) for run in runs]
    rows, columns = mazes[0].maze_map.shape
    panels = 3 if any(run.env for run in runs) else 2
    size = (4.85 * panels, (4.6 * rows / columns + 0.5) * len(runs))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(runs), panels, squeeze=False)
    for run, maze, row in zip(runs, mazes, axes, strict=True):
        plot_row(run, maze, row, figure, episodes)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    print(f"written to {path} ({path.stat().st_size / 1e6:.2f} MB)")


def maze_of(run):
    """The maze, in the words of the scripts' point mazes: maze_map, ij_to_xy, start_xy, goal_xy."""
    if hasattr(run.env, "maze_map"):
        return run.env
    host = run.host
    if run.env or not host.has_wrapper_attr("maze_map"):
        raise UserError(f"--plot draws mazes, and {run.task.name} is none: leave it out")
    start_xy = np.array(host.reset(seed=0)[0][:2])
    name = "goal_xy" if host.has_wrapper_attr("goal_xy") else "cur_goal_xy"  # D4RL's, OGBench's
    place = host.get_wrapper_attr("ij_to_xy")  # of one cell, the point mazes' of several
    return SimpleNamespace(
        maze_map=host.get_wrapper_attr("maze_map"),
        ij_to_xy=lambda cells: np.array([place(cell) for cell in cells]),
        start_xy=start_xy,
        goal_xy=host.get_wrapper_attr(name),
    )


def draw_ways(run, axis, number):
    """Where a walker's first episodes lead: green those that end in success."""
    ways, succeeded = {}, {}
    for episode, _, _, success, _ in play_host(run, number, None):
        ways.setdefault(episode, []).append(np.array(run.host.unwrapped.data.qpos[:2]))
        succeeded[episode] = success
    for episode, way in ways.items():
        axis.plot(*np.array(way).T, lw=1.2, c="#2ca02c" if succeeded[episode] else "#d62728")
    there = int(sum(succeeded.values()))
    axis.set_title(f"ways of {number} episodes, {there} of them to the goal", fontsize=10)


def plot_row(run, maze, axes, figure, episodes):
    view = MazeView(maze, 480)
    rows, columns = maze.maze_map.shape
    extent = [view.low[0], view.low[0] + columns * view.unit]
    extent += [view.low[1], view.low[1] + rows * view.unit]

    points, lattice = view.free_points(6)
    picture = np.full((rows * 6, columns * 6), np.nan)
    picture[lattice[:, 1], lattice[:, 0]] = ask(run, points, 8)[0]
    image = axes[0].imshow(picture, origin="lower", extent=extent, cmap="viridis")
    figure.colorbar(image, ax=axes[0], shrink=0.8)
    axes[0].set_title(f"{run.title}: value of the policy's action", fontsize=10)
    if run.env:
        draw_actions(run, view, axes[1:])
    else:
        draw_ways(run, axes[1], episodes)
    for axis in axes:
        walls = np.where(maze.maze_map == 1, 0.25, np.nan)
        axis.imshow(walls, origin="lower", extent=extent, cmap="gray", vmin=0, vmax=1)
        axis.plot(*maze.goal_xy, "*", c="#2ca02c", ms=13, mec="white")
        axis.plot(*maze.start_xy, "o", mfc="none", c="black", ms=8)
        axis.set(xlim=extent[:2], ylim=extent[2:], aspect="equal", xticks=[], yticks=[])


def draw_actions(run, view, axes):
    """A point maze's mean action in each place, and samples of prior, flow and policy."""
    points, _ = view.free_points(2)
    mean = ask(run, points, 16)[1].mean(axis=1)
    length = np.linalg.norm(mean, axis=1)
    arrows = dict(angles="xy", scale_units="xy", scale=0.75, width=0.005, cmap="plasma")
    axes[0].quiver(*points.T, *mean.T, length, **arrows)
    axes[0].set_title("mean of 16 actions; short: they disagree", fontsize=10)

    points, _ = view.free_points(1)
    _, actions, noises, flow = ask(run, points, 48, with_draws=True)
    reach = view.unit / 4.4  # a box [-1, 1]^2 of actions in each cell
    for samples, color, size, name in (
        (noises, "#b9c2cc", 1, "prior"),
        (flow, "#ff7f0e", 2, "flow"),
        (actions, "#1f77b4", 2, "policy"),
    ):
        spots = points[:, None] + reach * np.clip(samples, -2, 2)
        axes[1].scatter(*spots.reshape(-1, 2).T, s=size, c=color, lw=0, label=name)
    corners = reach * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]])
    for point in points:
        axes[1].plot(*(point + corners).T, c="#dfe3e8", lw=0.6, zorder=0)
    axes[1].set_title("samples in each cell: prior, flow, policy", fontsize=10)
    axes[1].legend(fontsize=7, loc="lower right", markerscale=4)


# ---- main ----
def main(options):
    if not options.runs:
        raise UserError("which run? python benchmark/see.py runs/RUN")
    for name in ("episodes", "every", "size", "gif_size", "fps", "max_steps"):
        low = dict(size=64, gif_size=16).get(name, 1)
        if getattr(options, name) is not None and getattr(options, name) < low:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is {getattr(options, name)}, but must be at least {low}")
    default = Path(options.runs[0]) / ("policy.png" if options.plot else "video")
    out = Path(options.out) if options.out else default
    if options.plot and options.follow:
        raise UserError("--follow makes videos: leave out --plot")
    if options.plot and out.suffix != ".png":
        raise UserError(f"--plot writes a PNG, not {out.name}: give --out FILE.png")
    if not options.plot and out.suffix != ".gif":
        check_ffmpeg()
    if options.follow:
        return follow(options, out)
    runs = [open_run(run, options) for run in options.runs]
    return plot(runs, out, options.episodes) if options.plot else record(runs, out, options)


def main_of(argv=None):
    try:
        main(tyro.cli(Args, description=__doc__, args=argv))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main_of())
