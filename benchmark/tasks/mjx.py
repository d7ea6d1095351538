"""MuJoCo tasks in MJX, MuJoCo's engine in JAX: thousands of environments stepped on a GPU.

    python algos/gsflow.py --env-id antmaze-large --env-backend mjx    inside this repository
    python algos/sac_flow.py --env-id Hopper-v5 --env-backend mjx
    python algos/sac_flow.py --env-id benchmark/tasks/mjx.py:Hopper-v5        the same, by its path

OGBench's antmaze-{medium,large,giant} with their single tasks, and Gymnasium's Hopper, Walker2d,
HalfCheetah, Ant, Humanoid and HumanoidStandup (v5). The official environment's own MuJoCo model is
simulated; what MJX 3.17.0 computes otherwise than MuJoCo (contacts of capsules and spheres) is
replaced. On a CPU this is 9 (Hopper) to 1,000 times (antmaze) slower than the official engine.
"""

import contextlib
import copy
import functools
import re
import sys
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.experimental.functional import FuncEnv


# ---- physics ----
def nearest_points(gap, one, two):
    """Where two segments s * one and t * two, |s|, |t| <= 1, are nearest; `gap` is the first centre
    minus the second. Returns s, t, whether s is at an end, and whether at the upper one."""
    aa, ab, bb = one @ one, -(one @ two), two @ two
    u, v, det = -(one @ gap), two @ gap, aa * bb - ab**2
    parallel = det <= jnp.finfo(det.dtype).eps * aa * bb
    s = jnp.where(parallel, 0, (bb * u - ab * v) / jnp.where(parallel, 1, det))
    at_end, upper, s = jnp.abs(s) > 1, s > 1, jnp.clip(s, -1, 1)
    t = (v - ab * s) / bb
    s = jnp.where(jnp.abs(t) > 1, (u - ab * jnp.sign(t)) / aa, s)
    upper = jnp.where(jnp.abs(s) > 1, s > 1, upper)
    return jnp.clip(s, -1, 1), jnp.clip(t, -1, 1), at_end | (jnp.abs(s) > 1), upper


def import_mjx():
    """MJX, MuJoCo's engine in JAX, with three colliders replaced by what MuJoCo's own do: MJX
    aligns the tangents of a capsule's contact with a plane only beyond 30 degrees off the normal,
    and finds the nearest points of capsules to five digits."""
    try:
        with contextlib.redirect_stdout(None):  # it says that it has no warp
            from mujoco import mjx
            from mujoco.mjx._src.collision_driver import _COLLISION_FUNC
            from mujoco.mjx._src.collision_primitive import _sphere_sphere, collider
            from mujoco.mjx._src.math import make_frame
            from mujoco.mjx._src.types import GeomType
    except ImportError as e:
        raise ImportError(
            "MJX needs its package: pip install mujoco==3.17.0 mujoco-mjx==3.17.0"
        ) from e

    def balls(one, centre1, two, centre2):
        dist, pos, normal = _sphere_sphere(centre1, one.size[0], centre2, two.size[0])
        return dist, pos, make_frame(normal)

    @collider(ncon=2)
    def plane_capsule(plane, cap):
        normal, axis = plane.mat[:, 2], cap.mat[:, 2]
        tangent = axis - normal * (normal @ axis)
        norm = jnp.linalg.norm(tangent)
        tangent = tangent / jnp.maximum(norm, 1e-6)
        frame = jnp.stack([normal, tangent, jnp.cross(normal, tangent)])
        frame = jnp.where(norm > 1e-6, frame, make_frame(normal))
        ends = cap.pos + jnp.stack([axis, -axis]) * cap.size[1]
        dist = (ends - plane.pos) @ normal - cap.size[0]
        return dist, ends - (cap.size[0] + dist / 2)[:, None] * normal, jnp.stack([frame, frame])

    @collider(ncon=1)
    def sphere_capsule(ball, cap):
        axis, length = cap.mat[:, 2], cap.size[1]
        t = jnp.clip((ball.pos - cap.pos) @ axis, -length, length)
        return balls(ball, ball.pos, cap, cap.pos + t * axis)

    @collider(ncon=1)
    def capsule_capsule(one, two):
        half1, half2 = (cap.mat[:, 2] * cap.size[1] for cap in (one, two))
        s, t, *_ = nearest_points(one.pos - two.pos, half1, half2)
        return balls(one, one.pos + s * half1, two, two.pos + t * half2)

    _COLLISION_FUNC[GeomType.PLANE, GeomType.CAPSULE] = plane_capsule
    _COLLISION_FUNC[GeomType.SPHERE, GeomType.CAPSULE] = sphere_capsule
    _COLLISION_FUNC[GeomType.CAPSULE, GeomType.CAPSULE] = capsule_capsule
    return mjx


def official_env(gym_id):
    """The official environment without wrappers: models, limits and constants come from it."""
    gymnasium.logger.min_level = gymnasium.logger.ERROR  # OGBench's spaces set off warnings
    if gym_id.startswith("antmaze"):
        import ogbench  # noqa: F401  registers the mazes
    return gymnasium.make(gym_id).unwrapped


class MjxState(NamedTuple):
    qpos: jax.Array
    qvel: jax.Array
    qacc: jax.Array  # of the last evaluation; the constraint solver starts from it
    x: jax.Array  # position along x by which a locomotion task pays
    derived: jax.Array  # inertias, velocities and forces that it observes, of the last evaluation
    success: jax.Array  # did the last transition reach the goal? (mazes)


class Mjx(FuncEnv):
    """A MuJoCo environment in MJX: the official model; the rest is its subclasses'.

    What MuJoCo derives from positions (body positions, contact forces, ...) is, after a step, that
    of the last evaluation within the last Runge-Kutta step, and so it is here: `derive` reads it.
    """

    noise, gaussian = 0.1, True  # of the start: uniform on positions; on velocities perhaps normal

    def __init__(self, gym_id: str):
        super().__init__()
        self.mjx = import_mjx()
        self.official = official_env(gym_id)
        self.max_episode_steps = gymnasium.spec(gym_id).max_episode_steps
        self.observation_space = self.official.observation_space
        self.action_space = self.official.action_space
        self.init_qpos, self.dt = self.official.init_qpos, self.official.dt
        model = self.make_model()
        # MJX lacks the iterative solver that Humanoid's model asks for, and runs line searches to
        # their limit, 50 by default, though a few iterations find the minimum.
        model.opt.solver, model.opt.ls_iterations = 2, 10  # Newton's method
        self.model = self.mjx.put_model(model)
        self.data = self.mjx.make_data(self.model)

    def make_model(self):
        return copy.copy(self.official.model)

    def model_at(self, qpos):
        """The model when the robot is there."""
        return self.model

    def derive(self, data):
        """`x` and `derived` of a state."""
        return data.qpos[0], jnp.zeros(0)

    def simulate(self, state, action):
        """The steps of MuJoCo in one of the environment, by the model's integrator: semi-implicit
        Euler (HalfCheetah), or Runge-Kutta as a loop over its four evaluations, compiled once."""
        mjx, h = self.mjx, self.model.opt.timestep
        integrate = functools.partial(mjx._src.forward._integrate_pos, self.model.jnt_type)
        tableau = jnp.array([[0, 1 / 6], [1 / 2, 1 / 3], [1 / 2, 1 / 3], [1, 1 / 6]])

        def step(_, state):
            model, data = self.model_at(state.qpos), self.data.replace(ctrl=action)
            if model.opt.integrator == 0:
                start = dict(qpos=state.qpos, qvel=state.qvel, qacc_warmstart=state.qacc)
                new = mjx.step(model, data.replace(**start))
                return state._replace(qpos=new.qpos, qvel=new.qvel, qacc=new.qacc)

            def evaluate(carry, ab):
                qvel, qacc, mean_qvel, mean_qacc, _ = carry
                qpos = integrate(state.qpos, qvel, ab[0] * h)
                qvel = state.qvel + ab[0] * h * qacc
                new = mjx.forward(model, data.replace(qpos=qpos, qvel=qvel, qacc_warmstart=qacc))
                means = mean_qvel + ab[1] * qvel, mean_qacc + ab[1] * new.qacc
                new = mjx.rne_postconstraint(model, new)  # contact forces on bodies, if observed
                return (qvel, new.qacc, *means, self.derive(new)), None

            zeros = jnp.zeros_like(state.qvel)
            carry = (state.qvel, state.qacc, zeros, zeros, (state.x, state.derived))
            (_, qacc, qvel, mean_qacc, (x, derived)), _ = jax.lax.scan(evaluate, carry, tableau)
            qpos, qvel = integrate(state.qpos, qvel, h), state.qvel + h * mean_qacc
            return state._replace(qpos=qpos, qvel=qvel, qacc=qacc, x=x, derived=derived)

        return jax.lax.fori_loop(0, self.official.frame_skip, step, state)

    def at(self, qpos, qvel):
        """State after a reset to these positions and velocities."""
        data = self.data.replace(qpos=qpos, qvel=qvel)
        for part in (self.mjx.kinematics, self.mjx.com_pos, self.mjx.com_vel):
            data = part(self.model, data)
        return MjxState(qpos, qvel, jnp.zeros_like(qvel), *self.derive(data), jnp.asarray(False))

    def initial(self, rng: Any, params: Any = None) -> MjxState:
        keys, shapes = jax.random.split(rng), (self.init_qpos.shape, (self.model.nv,))
        qpos = jax.random.uniform(keys[0], shapes[0], minval=-1)
        draw = jax.random.normal if self.gaussian else jax.random.uniform
        qvel = draw(keys[1], shapes[1]) if self.gaussian else draw(keys[1], shapes[1], minval=-1)
        return self.at(self.init_qpos + self.noise * qpos, self.noise * qvel)

    def transition(self, state, action, rng=None, params=None) -> MjxState:
        return self.simulate(state, action)


# ---- ant mazes ----
MJX_MAZES = ("antmaze-medium", "antmaze-large", "antmaze-giant")
EDGES = [(j, *corner) for j in range(3) for corner in ((-1, -1), (1, -1), (-1, 1), (1, 1))]
EDGE_AXIS = np.eye(3)[[e[0] for e in EDGES]]  # the axis along which each edge of a box runs
EDGE_SIDE = np.array([np.insert(e[1:], e[0], 0) for e in EDGES])  # and where it lies on the others


def sphere_box(centre, radius, size):
    """Distance, position and normal (towards the box) of a contact, all in the box's frame."""
    gap = jnp.clip(centre, -size, size) - centre
    dist = jnp.linalg.norm(gap)
    depths = jnp.concatenate([size + centre, size - centre])  # below the faces, where inside
    inward = jnp.asarray(np.concatenate([np.eye(3), -np.eye(3)]))[depths.argmin()]
    normal = jnp.where(dist > 1e-15, gap / jnp.maximum(dist, 1e-15), inward)
    dist = jnp.where(dist > 1e-15, dist, -depths.min())
    return dist - radius, centre + normal * (radius + dist) / 2, normal


def capsule_box(centre, half, size):
    """Where on a capsule's segment centre + t * half, |t| <= 1, MuJoCo puts its two contacts with a
    box, in the box's frame -> (t of the first, step to the second, whether there is a second).

    The first is the point nearest to the box's surface: an end over a face, or the point nearest to
    an edge. The second lies as far along the segment as it runs along the face or edge.
    """
    ends = centre + jnp.array([[-1.0], [1.0]]) * half
    outside = jnp.abs(ends) > size
    face_dist = (jnp.maximum(jnp.abs(ends) - size, 0) ** 2).sum(1)
    face_dist = jnp.where(outside.sum(1) <= 1, face_dist, jnp.inf)
    end = face_dist.argmin()

    edges, gap = EDGE_AXIS * size, EDGE_SIDE * size - centre
    box_t, t, corner, upper = jax.vmap(nearest_points, (0, 0, None))(gap, edges, half)
    apart = gap + box_t[:, None] * edges - t[:, None] * half
    edge_dist = (apart**2).sum(1)
    k = edge_dist.argmin()
    on_face = face_dist[end] - 1e-15 <= edge_dist[k]

    # from an end over a face: towards the other end, until the segment leaves the face
    sign = 1 - 2 * end
    exits = jnp.stack([size - ends[end], -size - ends[end]]) / (sign * half)
    exits = jnp.where((exits > 0) & ~outside[end], exits, jnp.inf)
    face_second = sign * jnp.minimum(exits.min(), 2)

    # from a corner: `odd` is the axis on which the segment runs otherwise than on the other two
    t, box_t, edge = t[k], box_t[k], jnp.asarray(EDGE_AXIS)[k] > 0
    side = jnp.where(edge, upper[k], jnp.asarray(EDGE_SIDE)[k] > 0)
    away = (half > 0) != side
    across = 2 * size / jnp.abs(half)
    sign = jnp.where(away.sum() == 1, 1, -1)
    odd = away == (sign > 0)
    along_edge = jnp.minimum(1 - sign * t, jnp.where(odd, across, jnp.inf).min())
    along_face = jnp.minimum(1 + sign * t, jnp.where(odd, jnp.inf, across).min())
    is_along_edge = 2 * jnp.where(odd, half**2, 0).sum() > half @ half
    corner_second = sign * jnp.where(is_along_edge, along_edge, -along_face)
    corner_has = (away.sum() > 0) & (away.sum() < 3)

    # from inside an edge: over the face with which the segment makes the smaller angle
    over = jnp.where(edge, -1, jnp.abs(half)).argmax()
    sign = jnp.where(away[over], 1, -1)
    rest = 1 - box_t * jnp.where((jnp.where(edge, half, 0).sum() > 0) == away[over], 1, -1)
    rest = rest / 2 * jnp.where(edge, across, 0).sum()
    edge_second = sign * jnp.minimum(jnp.minimum(1 - sign * t, across[over]), rest)
    edge_has = (away & ~edge).sum() == 1

    second = jnp.where(corner[k], corner_second, edge_second)
    has_second = jnp.where(corner[k], corner_has, edge_has)
    t = jnp.where(on_face, -1 + 2 * end, t)
    second = jnp.where(on_face, face_second, second)
    return t, second, jnp.where(on_face, outside[end].any(), has_second)


def import_box_colliders():
    """Replace MJX's contacts of spheres and capsules with boxes by MuJoCo's: MJX drops those that
    are apart but within the margin, and has others where a capsule meets an edge of the box."""
    from mujoco.mjx._src.collision_driver import _COLLISION_FUNC
    from mujoco.mjx._src.collision_primitive import collider
    from mujoco.mjx._src.math import make_frame
    from mujoco.mjx._src.types import GeomType

    def contacts(points, radius, box):
        dist, pos, normal = jax.vmap(lambda p: sphere_box(p, radius, box.size))(points)
        return dist, box.pos + pos @ box.mat.T, jax.vmap(make_frame)(normal @ box.mat.T)

    @collider(ncon=1)
    def sphere(ball, box):
        centre = box.mat.T @ (ball.pos - box.pos)
        return jax.tree.map(lambda x: x[0], contacts(centre[None], ball.size[0], box))

    @collider(ncon=2)
    def capsule(cap, box):
        centre, half = box.mat.T @ (cap.pos - box.pos), box.mat.T @ cap.mat[:, 2] * cap.size[1]
        t, step, second = capsule_box(centre, half, box.size)
        points = centre + jnp.stack([t, t + jnp.where(second, step, 0)])[:, None] * half
        dist, pos, frame = contacts(points, cap.size[0], box)
        return dist.at[1].set(jnp.where(second, dist[1], 1.0)), pos, frame

    _COLLISION_FUNC[GeomType.SPHERE, GeomType.BOX] = sphere
    _COLLISION_FUNC[GeomType.CAPSULE, GeomType.BOX] = capsule


class MjxAntMaze(Mjx):
    """OGBench's antmaze-{medium,large,giant} with a fixed task.

    Of the walls, four boxes stand where the ant is: in the 2 x 2 cells around it, as often as the
    engine steps. An ant (1.3 wide to each side) cannot touch another one.
    """

    max_active = 20  # contacts, the deepest ones: nine at once is the most that was ever seen

    def __init__(self, gym_id: str, success_timing: str):
        super().__init__(gym_id)
        import_box_colliders()
        self.success_timing = success_timing
        info = self.official.task_infos[self.official._reward_task_id - 1]
        self.start_xy, self.goal_xy = np.array(info["init_xy"]), np.array(info["goal_xy"])

    def make_model(self):
        import mujoco

        spec = mujoco.MjSpec.from_file(self.official.fullpath)
        walls = [geom for geom in spec.geoms if geom.name.startswith("block_")]
        for geom in walls[4:]:
            spec.delete(geom)
        spec.delete(spec.numeric("init_qpos"))  # MJX would take its first entry for the next one
        spec.add_numeric(name="max_contact_points", size=1, data=[self.max_active])
        model = spec.compile()
        self.tiles = np.array([model.geom(geom.name).id for geom in walls[:4]])
        return model

    def model_at(self, qpos):
        unit = self.official._maze_unit
        corner = jnp.floor((qpos[:2] + self.official._offset_x) / unit).astype(int)
        cells = corner + np.array([(0, 0), (1, 0), (0, 1), (1, 1)])
        wall = jnp.asarray(self.official.maze_map == 1)[cells[:, 1], cells[:, 0]]
        height = jnp.where(wall, self.official._maze_height / 2 * unit, -100.0)  # or out of reach
        xy = cells * unit - self.official._offset_x
        tiles = jnp.concatenate([xy, height[:, None]], axis=1)
        return self.model.replace(geom_pos=self.model.geom_pos.at[self.tiles].set(tiles))

    def initial(self, rng: Any, params: Any = None) -> MjxState:
        state_key, xy_key = jax.random.split(rng)
        state = super().initial(state_key)
        xy = self.start_xy + jax.random.uniform(xy_key, (2,), minval=-1, maxval=1)
        return state._replace(qpos=state.qpos.at[:2].set(xy))

    def transition(self, state, action, rng=None, params=None) -> MjxState:
        new = self.simulate(state, action)
        judged = new if self.success_timing == "post" else state
        distance = jnp.linalg.norm(judged.qpos[:2] - self.goal_xy)
        return new._replace(success=distance <= self.official._goal_tol)

    def observation(self, state, rng=None, params=None):
        return jnp.concatenate([state.qpos, state.qvel])

    def reward(self, state, action, next_state, rng=None, params=None):
        return next_state.success.astype(jnp.float32) - 1

    def terminal(self, state, rng=None, params=None):
        return state.success

    def success(self, state):
        return state.success


# ---- locomotion ----
# What Gymnasium's v5 locomotion tasks pay and when they end: `forward` times the velocity along x,
# `lift` times the height, `alive` while healthy, minus `control` * |a|^2 and `contact` * |contact
# forces|^2. Healthy: height and pitch in their ranges, every other coordinate below `limit`.
MJX_TASKS = {
    "Hopper-v5": dict(
        alive=1.0, control=1e-3, height=(0.7, np.inf), pitch=(-0.2, 0.2), limit=100.0,
        clip_velocity=10.0, noise=5e-3,
    ),
    "Walker2d-v5": dict(
        alive=1.0, control=1e-3, height=(0.8, 2.0), pitch=(-1.0, 1.0), clip_velocity=10.0,
        noise=5e-3,
    ),
    "HalfCheetah-v5": dict(control=0.1, ends=False, noise=0.1, gaussian=True),
    "Ant-v5": dict(
        alive=1.0, control=0.5, contact=5e-4, height=(0.2, 1.0), clip_force=1.0, noise=0.1,
        gaussian=True,
    ),
    "Humanoid-v5": dict(
        forward=1.25, alive=5.0, control=0.1, contact=5e-7, height=(1.0, 2.0), noise=1e-2,
    ),
    "HumanoidStandup-v5": dict(
        forward=0.0, lift=1 / 0.003, alive=1.0, control=0.1, contact=5e-7, ends=False, noise=1e-2,
    ),
}  # fmt: skip


class MjxLocomotion(Mjx):
    """Gymnasium's Hopper, Walker2d, HalfCheetah, Ant, Humanoid and HumanoidStandup (v5)."""

    forward, lift, alive, contact, ends, gaussian = 1.0, 0.0, 0.0, 0.0, True, False
    height, pitch, limit = (-np.inf, np.inf), (-np.inf, np.inf), np.inf
    clip_velocity = clip_force = np.inf

    def __init__(self, gym_id: str):
        self.robot = gym_id.removesuffix("-v5")
        for name, value in MJX_TASKS[gym_id].items():
            setattr(self, name, value)
        super().__init__(gym_id)
        self.planar = self.robot in ("Hopper", "Walker2d", "HalfCheetah")

    def derive(self, data):
        force = jnp.clip(data.cfrc_ext[1:], -self.clip_force, self.clip_force).ravel()
        if self.robot == "Ant":
            return data.xpos[1, 0], force
        if self.robot.startswith("Humanoid"):
            mass = self.model.body_mass / self.model.body_mass.sum()
            inertia, velocity = data._impl.cinert[1:].ravel(), data.cvel[1:].ravel()
            derived = jnp.concatenate([inertia, velocity, data.qfrc_actuator[6:], force])
            return mass @ data.xipos[:, 0], derived
        return super().derive(data)

    def transition(self, state, action, rng=None, params=None) -> MjxState:
        new = self.simulate(state, action)
        return new._replace(x=new.qpos[0]) if self.planar else new  # here nothing lags behind

    def observation(self, state, rng=None, params=None):
        qvel = jnp.clip(state.qvel, -self.clip_velocity, self.clip_velocity)
        return jnp.concatenate([state.qpos[1 if self.planar else 2 :], qvel, state.derived])

    def healthy(self, state):
        height, pitch = state.qpos[1:3] if self.planar else (state.qpos[2], 0.0)
        upright = (self.height[0] < height) & (height < self.height[1])
        upright &= (self.pitch[0] < pitch) & (pitch < self.pitch[1])
        others = jnp.concatenate([state.qpos[2:], state.qvel])
        return upright & (jnp.abs(others) < self.limit).all()

    def reward(self, state, action, next_state, rng=None, params=None):
        force = next_state.derived[-(self.model.nbody - 1) * 6 :]
        costs = self.control * (action**2).sum()
        costs += jnp.minimum(self.contact * (force**2).sum(), 10.0)
        earned = self.forward * (next_state.x - state.x) / self.dt + self.lift * next_state.qpos[2]
        return earned + self.alive * (self.healthy(next_state) | (not self.ends)) - costs

    def terminal(self, state, rng=None, params=None):
        return ~self.healthy(state) & self.ends


# ---- what a script calls ----
def make_env(gym_id: str, success_timing: str = "post") -> FuncEnv:
    """The environment of an official id: Hopper-v5, antmaze-large-singletask-task1-v0, ...

    `success_timing` matters in mazes alone: whether the state after a step is judged (post) or the
    one before it (pre). ValueError where MJX does not simulate the task, ImportError without MJX.
    """
    maze = re.fullmatch(r"(.+)-singletask(-task[1-5])?-v0", gym_id)
    if maze[1] not in MJX_MAZES if maze else gym_id not in MJX_TASKS:
        raise ValueError(
            f"MJX simulates {', '.join((*MJX_MAZES, *MJX_TASKS))}, not {gym_id}; use the official "
            "environment, --env-backend host"
        )
    env = MjxAntMaze(gym_id, success_timing) if maze else MjxLocomotion(gym_id)
    if jax.default_backend() == "cpu":
        print(
            "NOTICE: MJX is made for a GPU; on a CPU the official engine, --env-backend host, is "
            "many times faster",
            file=sys.stderr,
        )
    return env


def make_task(name: str, dataset_dir: str) -> dict:
    """Task `name`: an official id as for `make_env`, or antmaze-large, antmaze-large-task3, ...

    There are no data here: --env-backend mjx joins this environment with OGBench's.
    """
    maze = re.fullmatch(r"(antmaze-[a-z]+)(-task[1-5])?", name)
    gym_id = f"{maze[1]}-singletask{maze[2] or '-task1'}-v0" if maze else name
    env = make_env(gym_id)
    return dict(env=env, success=hasattr(env, "success"))
