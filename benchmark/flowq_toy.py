"""FlowQ on two modes with a known energy: what each velocity form and schedule samples.

    python benchmark/flowq_toy.py             # trains twelve flows and plain flow matching, minutes

Data: two modes (0, 1) and (0, -1) of equal weight, deviation 0.2; Q(x) = x_2. The posterior
p exp(lambda Q) is known, so each flow's error is. The table gives the upper mode's mass, how far
its mean is shifted, its deviation, and the 1-D Wasserstein distance along x_2 to exact samples, for
flows trained by algos/flowq.py and for the exact velocity field of the same form, which has no
training error. Where grad Q is taken (--grad-at) plays no part, because Q is linear. G is the exact
velocity of the guided path, every row weighted alike; D shifts the inputs only: two negative
controls that no flag of the script selects.
"""

import dataclasses
import functools
import importlib.util
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

HERE = Path(__file__).resolve().parent
FORMS = {"score": "S", "drop-time": "T", "field": "Gb", "posterior": "P", "weighted": "W"}
SCHEDULES = {"t": "t", "t2": "t²", "t2_over_1mt": "t²/(1-t)", "learned": "learned"}
B = np.array([0.0, 1.0])  # the slope of Q


@dataclasses.dataclass(frozen=True)
class Args:
    lambdas: tuple[float, ...] = (1.0, 2.0)  # weights of the energy; the picture shows the first
    offline_steps: int = 6_000  # gradient steps of each flow
    samples: int = 20_000  # samples behind each figure of the table
    seed: int = 0  # of training and sampling
    results: str = "benchmark/results"  # where the table and the picture go


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


energy_toy = load(HERE / "tasks" / "energy_toy.py")


# ---- what is known exactly ----
class Mixture(NamedTuple):
    """Gaussians with one isotropic deviation."""

    weights: np.ndarray  # (K,)
    means: np.ndarray  # (K, D)
    std: float

    def sample(self, rng, n):
        which = rng.choice(len(self.weights), n, p=self.weights)
        return self.means[which] + self.std * rng.standard_normal((n, self.means.shape[1]))


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def tilt_linear(p, b, lam):
    """p exp(lam b.x): every mean moves by lam s^2 b, the heavier side gains weight."""
    gain = lam * p.means @ b + (lam * p.std) ** 2 * (b @ b) / 2
    weights = softmax(np.log(p.weights) + gain)
    return Mixture(weights, p.means + lam * p.std**2 * b, p.std)


def tilt_quadratic(p, matrix, centre, lam):
    """p exp(-lam (x - centre)' matrix (x - centre) / 2) -> (weights, means, covariance)."""
    dim = len(centre)
    covariance = np.linalg.inv(np.eye(dim) / p.std**2 + lam * matrix)
    means = (p.means / p.std**2 + lam * centre @ matrix) @ covariance
    spread = p.std**2 * np.eye(dim) + np.linalg.inv(lam * matrix)
    gap = p.means - centre
    distance = np.einsum("ki,ij,kj->k", gap, np.linalg.inv(spread), gap)
    return softmax(np.log(p.weights) - distance / 2), means, covariance


def velocity(p, x, t):
    """Velocity of plain flow matching, straight paths from N(0, I) to the mixture, at x (N, D)."""
    variance = (t * p.std) ** 2 + (1 - t) ** 2
    gap = x[:, None] - t * p.means  # (N, K, D)
    share = softmax(np.log(p.weights) - (gap**2).sum(-1) / (2 * variance))
    slope = (t * p.std**2 - (1 - t)) / variance
    return (share[..., None] * (p.means + slope * gap)).sum(axis=1)


def h_and_slope(schedule, t):
    """h(t) and h'(t) of a fixed schedule."""
    return {
        "t": (t, 1.0),
        "t2": (t**2, 2 * t),
        "t2_over_1mt": (t**2 / (1 - t), (2 * t - t**2) / (1 - t) ** 2),
    }[schedule]


def guided_field(p, b, lam, c):
    """Field of the forms S, T, Gb: plain velocity plus lam c(t) b."""
    return lambda x, t: velocity(p, x, t) + lam * c(t) * b


def posterior_field(p, b, lam):
    """Field of the form P for a linear Q: plain velocity plus lam c(t) J b, J the slope of the
    unguided flow's guess x + (1-t) u(x, t) of the action, by central differences."""

    def field(x, t):
        def guess(x):
            return x + (1 - t) * velocity(p, x, t)

        d = 1e-5 * np.eye(x.shape[1])
        pulled = [(guess(x + row) - guess(x - row)) @ b / 2e-5 for row in d]
        return velocity(p, x, t) + lam * (1 - t) / max(t, 0.05) * np.stack(pulled, axis=1)

    return field


def control_field(p, b, lam, schedule, exact):
    """Negative controls: the regression's inputs are shifted by lam h (1-t)^2 b. Form G (exact)
    adds the shift's time derivative to the target, form D does not."""

    def field(x, t):
        h, slope = h_and_slope(schedule, t)
        moved = velocity(p, x - lam * h * (1 - t) ** 2 * b, t)
        return moved + exact * lam * (slope * (1 - t) ** 2 - 2 * h * (1 - t)) * b

    return field


def integrate(field, x, steps=200):
    """Midpoint steps from t = 0 to 1."""
    for k in range(steps):
        t, dt = k / steps, 1 / steps
        x = x + dt * field(x + dt / 2 * field(x, t), t + dt / 2)
    return x


def fitted_weights(p, b, lam, bins, rng, samples=200_000):
    """R1: the c(t) per bin that fits the residual of the plain flow, rows weighted by
    exp(lam Q) -> (bin centres, c)."""
    centres = (np.arange(bins) + 0.5) / bins
    if lam == 0:
        return centres, np.zeros(bins)
    c = []
    for t in centres:
        a, eps = p.sample(rng, samples), rng.standard_normal((samples, len(b)))
        residual = a - eps - velocity(p, t * a + (1 - t) * eps, t)
        c.append(softmax(lam * a @ b) @ residual @ b / (lam * b @ b))
    return centres, np.array(c)


def figures(x, exact):
    """Upper mass, shift and deviation of the upper mode, W1 along x_2 to exact samples."""
    upper = x[x[:, 1] > 0, 1]
    w1 = np.abs(np.sort(x[:, 1]) - np.sort(exact[:, 1])).mean()
    return len(upper) / len(x), upper.mean() - 1, upper.std(), w1


# ---- what is trained ----
def train(flowq, form, schedule, lambdas, bench):
    """Flows of one form and schedule, one per lambda, in one vmapped program -> (samples by lambda
    (L, N, 2), and of the first its paths (K + 1, 40, 2))."""
    flags = dict(velocity_form=form, schedule=schedule, offline_steps=bench.offline_steps)
    flags |= dict(env_id="energy-toy", seed=bench.seed, guidance_lambda=lambdas[0])
    task = flowq.parse_task("energy-toy")
    args = flowq.resolve(flowq.Args(**flags), task)
    data = flowq.prepare(energy_toy.toy_dataset(seed=bench.seed), args, task)
    nets = flowq.make_networks(args, 2, task)
    learn = flowq.make_learn(nets, args)
    start = flowq.start_states(args, 1, 2, jnp.zeros(1), jnp.ones(1))
    state = jax.tree.map(lambda x: jnp.concatenate([x] * len(lambdas)), start)

    def run(state, settings, data):
        def step(_, state):
            return learn({"state": state, "sums": {}}, data, settings)["state"]

        return jax.lax.fori_loop(0, args.offline_steps, step, state)

    settings = flowq.Settings(jnp.asarray(lambdas, jnp.float32))
    state = jax.jit(jax.vmap(run, (0, 0, None)))(state, settings, data)

    noise = jax.random.normal(jax.random.key(bench.seed + 1), (bench.samples, 2))
    obs = jnp.zeros((bench.samples, 1))
    sample = jax.jit(jax.vmap(lambda ema: flowq.flow_endpoint(ema, nets, obs, noise, args)))
    x, paths = noise[:40], [noise[:40]]
    ema = jax.tree.map(lambda leaf: leaf[0], state.ema)
    for k in range(args.flow_steps):
        t = jnp.full((40, 1), k / args.flow_steps)
        x = x + nets.velocity(ema, obs[:40], x, t) / args.flow_steps
        paths.append(x)
    return np.asarray(sample(state.ema)), np.asarray(paths)


# ---- picture and table ----
def draw(path, flowq, trained, paths, weights, p, lam, rng):
    """Source data, exact posterior and the trained flows on the same axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

    figure = Figure(figsize=(17, 12.5))
    FigureCanvasAgg(figure)
    axes = figure.subplots(4, 6)
    exact = tilt_linear(p, B, lam).sample(rng, 2_000)
    background = np.linspace(-2, 2, 50)[:, None] * np.ones(2)

    def panel(axis, points, title, colour):
        axis.imshow(background, extent=(-1.3, 1.3, -2, 2), origin="lower", cmap="Greens", alpha=0.5)
        for mean in p.means:
            axis.add_patch(Circle(mean, 2 * p.std, fill=False, lw=0.7))
        if points.ndim == 3:
            axis.plot(points[..., 0], points[..., 1], c=colour, lw=0.5)
            points = points[-1]
        axis.scatter(points[:2_000, 0], points[:2_000, 1], s=1.5, c=colour)
        axis.set(xlim=(-1.3, 1.3), ylim=(-2, 2), aspect="equal")
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=7)

    def caption(x):
        mass, shift, _, w1 = figures(x, tilt_linear(p, B, lam).sample(rng, len(x)))
        return f"upper {mass:.2f}, shift {shift:+.2f}, W1 {w1:.2f}"

    rows = list(FORMS)[:3]
    places = {(f, s): (rows.index(f), 2 + j) for f in rows for j, s in enumerate(SCHEDULES)}
    places |= {("posterior", "t"): (3, 2), ("weighted", "t"): (3, 3)}
    for row in range(4):
        panel(axes[row, 1], exact, f"exact posterior\n{caption(exact)}", "darkorange")
    for (form, schedule), x in trained.items():
        title = f"{FORMS[form]} ({form})" + f", h = {SCHEDULES[schedule]}" * (form in rows)
        panel(axes[places[form, schedule]], x, f"{title}\n{caption(x)}", "C0")
    for empty in (axes[3, 0], *axes[3, 4:]):
        empty.set_axis_off()
    panel(axes[0, 0], p.sample(rng, 2_000), "source data\nupper 0.50, shift 0", "grey")
    panel(axes[1, 0], paths["none"], "paths without guidance", "grey")
    panel(axes[2, 0], paths["score", "t"], "paths of S, h = t", "C0")
    t = np.linspace(0, 0.999, 200)
    for axis, form in ((axes[1, 5], "score"), (axes[2, 5], "field")):
        for schedule, c in flowq.GUIDANCE[form].items():
            axis.plot(t, c(t), label=SCHEDULES[schedule])
        axis.plot(*weights, "k.", ms=3, label="fitted (R1)")
        axis.set_title(f"c(t) of {FORMS[form]}", fontsize=9)
        axis.legend(fontsize=7)
        axis.tick_params(labelsize=7)
    figure.suptitle(
        f"FlowQ, lambda = {lam:g}: W alone aims at the exact posterior. Green: energy-weighted "
        "side; circles: the data's modes. Early guidance picks modes, late guidance pushes samples "
        "off them."
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(bench):
    flowq = load(HERE.parent / "algos" / "flowq.py")
    rng = np.random.default_rng(bench.seed)
    p = Mixture(np.full(2, 0.5), energy_toy.TOY_MEANS, energy_toy.TOY_STD)
    arms = [(f, s) for f in FORMS for s in SCHEDULES if s in flowq.GUIDANCE.get(f, {})]
    arms += [("score", "learned"), ("weighted", "t")]  # weighted rows have no h
    trained, paths = {}, {}
    for form, schedule in arms:
        print(f"training {form}, {schedule}", flush=True)
        trained[form, schedule], paths[form, schedule] = train(
            flowq, form, schedule, bench.lambdas, bench
        )
    print("training without guidance", flush=True)
    plain, paths["none"] = train(flowq, "score", "t", (0.0,), bench)

    lines = [
        "Two modes (0, ±1), deviation 0.2, Q = x_2. Each cell: mass of the upper mode / its shift "
        "/ its deviation / W1 along x_2. `trained`: 3 x 128 GELU, batch 512, "
        f"{bench.offline_steps:,} updates, Adam 1e-3 cosine, averaged policy, 100 Euler steps; "
        f"`field`: exact velocity field, 200 midpoint steps; {bench.samples:,} samples. "
        "All forms are ours; W alone aims at the posterior.",
        "",
        "| lambda | form | h | trained | field |",
        "|---|---|---|---|---|",
    ]
    noise = rng.standard_normal((bench.samples, 2))

    def cell(x, exact):
        return "{:.3f} / {:+.3f} / {:.3f} / {:.2f}".format(*figures(x, exact))

    for i, lam in enumerate(bench.lambdas):
        exact = tilt_linear(p, B, lam).sample(rng, bench.samples)
        again = tilt_linear(p, B, lam).sample(rng, bench.samples)
        nodes, fitted = fitted_weights(p, B, lam, 50, rng)
        if i == 0:
            weights = nodes, fitted
        lines.append(f"| {lam:g} | exact posterior | | | {cell(again, exact)} |")
        field = integrate(guided_field(p, B, 0, lambda t: 0), noise)
        cells = cell(plain[0], exact), cell(field, exact)
        lines.append(f"| {lam:g} | no guidance | | {cells[0]} | {cells[1]} |")
        learned = functools.partial(np.interp, xp=nodes, fp=fitted)
        for form, schedule in arms:
            c = flowq.GUIDANCE.get(form, {}).get(schedule, learned)
            field = {
                "posterior": posterior_field(p, B, lam),
                "weighted": functools.partial(velocity, tilt_linear(p, B, lam)),
            }.get(form, guided_field(p, B, lam, c))
            field = integrate(field, noise)
            name = SCHEDULES[schedule] + " (field: fitted, R1)" * (schedule == "learned")
            name = "" if form in ("posterior", "weighted") else name
            cells = cell(trained[form, schedule][i], exact), cell(field, exact)
            lines.append(f"| {lam:g} | {FORMS[form]} | {name} | {cells[0]} | {cells[1]} |")
        for form, is_exact in (("G (control)", True), ("D (control)", False)):
            field = integrate(control_field(p, B, lam, "t2_over_1mt", is_exact), noise)
            lines.append(f"| {lam:g} | {form} | t²/(1-t) | | {cell(field, exact)} |")
    table = "\n".join(lines)
    print(table)
    results = Path(bench.results)
    results.mkdir(parents=True, exist_ok=True)
    (results / "flowq_toy.md").write_text(table + "\n")
    first = {arm: x[0] for arm, x in trained.items()}
    draw(results / "flowq_toy.png", flowq, first, paths, weights, p, bench.lambdas[0], rng)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
