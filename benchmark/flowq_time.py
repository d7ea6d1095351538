"""Time of an update against K, the flow's number of steps: FlowQ and two other policy losses.

    python benchmark/flowq_time.py            # K = 1, 2, 5, 10, 20, 50; minutes on a CPU core

Three ways to let a critic guide the same flow net, all with one flow-matching loss on the batch:
FlowQ puts grad Q into the target; the Diffusion-QL style raises Q of actions sampled in K steps, by
backpropagation through all of them; the EDP style raises Q of actions denoised in one step. First
panel: the policy's update alone (what the paper calls constant). Second: with the td critic, whose
targets need K steps whatever the policy's loss is. Third: with the iql critic, which samples none.
Same nets, one batch on the device, many updates in one program, compile time apart; the repeats go
round all settings in turn, so that a slow minute of the machine meets all of them; medians.
"""

import csv
import dataclasses
import importlib.util
import sys
import time
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

SCRIPT = Path(__file__).resolve().parent.parent / "algos" / "flowq.py"
METHODS = ("FlowQ", "DQL-style", "EDP-style")
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
PANELS = {"policy": "policy update alone", "td": "with td critic", "iql": "with iql critic"}


@dataclasses.dataclass(frozen=True)
class Args:
    flow_steps: tuple[int, ...] = (1, 2, 5, 10, 20, 50)  # K
    obs_dim: int = 29  # observation size (antmaze: 29)
    act_dim: int = 8  # action size (antmaze: 8)
    batch_size: int = 256  # rows of the batch
    hidden_dims: tuple[int, ...] = (256, 256, 256)  # widths of every net
    repeats: int = 5  # timed dispatches of each setting; the median counts
    seconds: float = 0.5  # shortest dispatch that is timed
    clock: Literal["wall", "processor"] = "wall"
    """processor: time of all cores, for a CPU that other jobs share; ratios are fair on one core"""
    results: str = "benchmark/results"  # where table, CSV and picture go


def load_flowq():
    spec = importlib.util.spec_from_file_location("flowq", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["flowq"] = module
    spec.loader.exec_module(module)
    return module


def policy_loss(flowq, method, params, state, batch, eps, t, key, settings, nets, args):
    """The method's loss for the velocity net."""
    if method == "FlowQ":
        return flowq.policy_loss(params, state, batch, eps, t, settings, nets, args)[0]
    obs, x = batch["obs"], flowq.path_point(batch, eps, t)
    velocity = nets.velocity(params["velocity"], obs, x, t)
    if method == "DQL-style":
        noise = jax.random.normal(key, eps.shape)
        actions = flowq.flow_endpoint(params["velocity"], nets, obs, noise, args)
    else:
        actions = jnp.clip(x + (1 - t) * velocity, -1, 1)
    q = nets.critic(state.target_critic, obs, actions).mean(axis=0)
    scale = jax.lax.stop_gradient(jnp.abs(q).mean() + 1e-6)
    return jnp.mean((velocity - (batch["actions"] - eps)) ** 2) - q.mean() / scale


def make_step(flowq, method, panel, batch, settings, nets, args):
    """One update of what the panel trains: state -> state."""
    trained = {"policy": ["velocity"], "td": ["velocity", "critic"]}
    trained = trained.get(panel, ["velocity", "critic", "value"])

    def step(state):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), state.step), 4)
        eps = jax.random.normal(keys[0], batch["actions"].shape)
        t = jax.random.uniform(keys[1], (args.batch_size, 1), maxval=1 - 1e-3)

        def loss(params):
            params = state.params | params
            total = policy_loss(
                flowq, method, params, state, batch, eps, t, keys[2], settings, nets, args
            )
            if panel != "policy":
                target = flowq.td_target(params, state, batch, keys[3], nets, args)
                total += flowq.critic_loss(params, batch, target, nets)[0]
            if panel == "iql":
                total += flowq.value_loss(params, state, batch, nets, args)[0]
            return total

        params, opt_state = dict(state.params), dict(state.opt_state)
        for name, grads in jax.grad(loss)({name: params[name] for name in trained}).items():
            adam = flowq.optimizer(args, name)
            move, opt_state[name] = adam.update(grads, opt_state[name])
            params[name] = optax.apply_updates(params[name], move)
        critic, target_critic = params["critic"], state.target_critic
        if panel != "policy":
            target_critic = optax.incremental_update(critic, target_critic, args.tau)
        ema = optax.incremental_update(params["velocity"], state.ema, 1 - args.ema_decay)
        changes = dict(params=params, opt_state=opt_state, ema=ema, target_critic=target_critic)
        return state.replace(**changes, step=state.step + 1)

    return step


class Timed:
    """One setting: a compiled loop of updates and its measurements."""

    def __init__(self, flowq, panel, method, flow_steps, bench):
        critic = "iql" if panel == "iql" else "td"
        flags = dict(env_id="antmaze-large", flow_steps=flow_steps, critic=critic)
        flags |= dict(hidden_dims=bench.hidden_dims, batch_size=bench.batch_size)
        task = flowq.parse_task("antmaze-large")
        args = flowq.resolve(flowq.Args(**flags), task)
        keys = jax.random.split(jax.random.key(0), 3)
        obs_shape = (bench.batch_size, bench.obs_dim)
        batch = dict(
            obs=jax.random.normal(keys[0], obs_shape),
            next_obs=jax.random.normal(keys[1], obs_shape),
            actions=jax.random.uniform(keys[2], (bench.batch_size, bench.act_dim), minval=-1),
            returns=-jnp.ones(bench.batch_size),
            discounts=jnp.full(bench.batch_size, 0.99),
        )
        nets = flowq.make_networks(args, bench.act_dim, task)
        settings = flowq.Settings(jnp.float32(args.guidance_lambda))
        mean, std = jnp.zeros(bench.obs_dim), jnp.ones(bench.obs_dim)
        self.state = flowq.init_state(args, bench.obs_dim, bench.act_dim, mean, std, 0)
        self.name, self.seconds = (panel, method, flow_steps), []
        self.clock = CLOCKS[bench.clock]

        def repeat(state, n, batch):
            step = make_step(flowq, method, panel, batch, settings, nets, args)
            return jax.lax.fori_loop(0, n, lambda i, s: step(s), state)

        start = time.perf_counter()
        program = jax.jit(repeat).lower(self.state, jnp.int32(1), batch).compile()
        self.compile_seconds = time.perf_counter() - start
        self.program = lambda state, n: jax.block_until_ready(program(state, jnp.int32(n), batch))
        self.program(self.state, 2)
        start = self.clock()
        self.program(self.state, 4)
        self.updates = max(4, int(4 * bench.seconds / (self.clock() - start)) + 1)

    def measure(self):
        start = self.clock()
        self.program(self.state, self.updates)
        self.seconds.append((self.clock() - start) / self.updates)


def draw(path, rows, bench):
    """Seconds per 10,000 updates against K, one panel each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (panel, title) in zip(axes, PANELS.items(), strict=True):
        for method in METHODS:
            points = [(r["K"], r["s_per_10k"]) for r in rows if r["setting"] == (panel, method)]
            axis.loglog(*zip(*points, strict=True), marker="o", label=method)
        axis.set(title=title, xlabel="flow steps K")
        axis.set_xticks(bench.flow_steps, [str(k) for k in bench.flow_steps], minor=False)
        axis.minorticks_off()
    axes[0].set_ylabel("seconds per 10,000 updates")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(bench):
    flowq, results = load_flowq(), Path(bench.results)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}"
    timed = []
    for panel in PANELS:
        for method in METHODS:
            timed += [Timed(flowq, panel, method, k, bench) for k in bench.flow_steps]
            print(f"compiled {panel}, {method}", flush=True)
    for _ in range(bench.repeats):
        for setting in timed:
            setting.measure()
    median = {x.name: 1e4 * float(np.median(x.seconds)) for x in timed}
    rows = []
    for x in timed:
        panel, method, k = x.name
        rows.append(
            dict(
                setting=(panel, method),
                K=k,
                s_per_10k=median[x.name],
                over_first=median[x.name] / median[panel, method, bench.flow_steps[0]],
                over_dql=median[x.name] / median[panel, "DQL-style", k],
                slowest_over_fastest=max(x.seconds) / min(x.seconds),
                compile_s=x.compile_seconds,
            )
        )
    lines = [
        f"{device}; observation {bench.obs_dim}, action {bench.act_dim}, batch {bench.batch_size}, "
        f"nets {' x '.join(map(str, bench.hidden_dims))}; {bench.clock} time, median of "
        f"{bench.repeats}.",
        "",
        f"| updated | method | K | s / 10,000 updates | over K = {bench.flow_steps[0]} | over "
        "DQL-style | slowest / fastest repeat | compile s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        (panel, method), first = r["setting"], f"{r['s_per_10k']:,.1f} | {r['over_first']:.2f}"
        last = f"{r['slowest_over_fastest']:.2f} | {r['compile_s']:.1f}"
        lines.append(
            f"| {PANELS[panel]} | {method} | {r['K']} | {first} | {r['over_dql']:.2f} | {last} |"
        )
    print("\n".join(lines))
    results.mkdir(parents=True, exist_ok=True)
    (results / "flowq_time.md").write_text("\n".join(lines) + "\n")
    with open(results / "flowq_time.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["panel", "method", *[k for k in rows[0] if k != "setting"]])
        table.writerows([*r["setting"], *[v for k, v in r.items() if k != "setting"]] for r in rows)
    draw(results / "flowq_time.png", rows, bench)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
