"""Is it the actor or the critic of a run of fmq.py, and what do coarse steps do to its samples?

    python benchmark/fmq_samples.py runs/RUN --steps 1 2 --scales 1 0.5 --eval-episodes 50
    python benchmark/fmq_samples.py runs/RUN --critic runs/OTHER --eval-episodes 50

Samples are drawn in every number of --steps (jumps of a flow map, Euler steps of --actor flow;
default: the run's) from noise of every deviation in --scales (default 1). A table has, at states of
the data, how far the chunks of a state spread (deviation, mean over their dimensions), how far
their mean lies from the chunk in the data, and their values. Then the best of N chunks of each acts
in the environment, chosen by the run's critic or by that of another run on the same data, --critic.
All other arguments are those of the script with --evaluate.
"""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from gsflow_student import load, load_script


def read_words(script, argv):
    """RUN and this script's flags -> (run, critic's run or None, steps or [], scales, the rest)."""
    values, rest, name = {"--critic": [], "--steps": [], "--scales": []}, [], None
    script.need(argv and argv[0][:1] != "-", "give the directory of a run of fmq.py first")
    for word in argv[1:]:
        name = word if word[:2] == "--" else name
        if name not in values:
            rest.append(word)
        elif word != name:
            values[name].append(word)
    number = lambda kind, name: [script.ask(kind, word) for word in values[name]]
    script.need(len(values["--critic"]) < 2, "--critic takes one directory of a run")
    steps, scales = number(int, "--steps"), number(float, "--scales") or [1.0]
    script.need(min([1, *steps]) > 0 and min(scales) >= 0, "--steps from 1 on, --scales from 0 on")
    return argv[0], next(iter(values["--critic"]), None), steps, scales, rest


def make_policies(script, nets, args, steps, scales, critic=None):
    """Mode -> (state, obs, key) -> the best of N chunks (H * A,), drawn in so many steps from noise
    of that deviation; `critic`: parameters in place of the run's."""

    def policy(steps, scale):
        def act(state, obs, key):
            obs = (obs - state.obs_mean) / state.obs_std
            noise = jax.random.normal(key, (args.num_samples, args.horizon * nets.act_dim))
            params = state.params if critic is None else state.params | {"critic": critic}
            few = SimpleNamespace(flow_steps=steps)
            return script.best_of_n(params, nets, few, obs, scale * noise, state.pessimistic)

        return act

    return {f"steps_{k}_noise_{scale:g}": policy(k, scale) for k in steps for scale in scales}


def print_samples(script, nets, args, state, data, steps, scales, rows=512, draws=16):
    """A table, a row per number of steps and deviation of the noise."""
    starts = np.arange(len(data["actions"]) - args.horizon)
    inside = ~np.any([data["terminals"][starts + i] for i in range(args.horizon)], axis=0)
    starts = np.random.default_rng(0).choice(starts[inside], rows)
    windows = [data["actions"][starts + i] for i in range(args.horizon)]
    chunks = jnp.concatenate(windows, axis=-1)
    obs = (data["observations"][starts] - state.obs_mean) / state.obs_std
    noise = jax.random.normal(jax.random.key(0), (draws, *chunks.shape))
    print("| steps | noise | spread | mean's distance from the data | Q | Q, best of 8 |")
    print("|---|---|---|---|---|---|")
    for k in steps:
        for scale in scales:
            few = SimpleNamespace(flow_steps=k)
            samples = script.sample_chunk(state.params, nets, few, obs[None], scale * noise)
            q = nets.critic(state.params["critic"], obs[None], samples)
            q = script.aggregate(q, state.pessimistic)
            off = float(jnp.sqrt(jnp.mean((samples.mean(axis=0) - chunks) ** 2)))
            best = q.reshape(-1, 8, rows).max(axis=1).mean()
            spread = samples.std(axis=0).mean()
            print(f"| {k} | {scale:g} | {spread:.3f} | {off:.3f} | {q.mean():.2f} | {best:.2f} |")


def main(argv):
    """Both tables; returns the exit code."""
    if {"-h", "--help"} & {*argv}:
        print(__doc__)
        return 0
    script = load_script("fmq")
    try:
        run, other, steps, scales, rest = read_words(script, argv)
        args, nets, state, data = load(script, run)
        steps = steps or [args.flow_steps]
        critic = None if other is None else load(script, other)[2].params["critic"]
        same = critic is None or jax.tree.map(jnp.shape, critic) == jax.tree.map(
            jnp.shape, state.params["critic"]
        )
        script.need(same, f"the critic of {other} has other sizes than that of {run}")
        state = state if critic is None else state.replace(params=state.params | {"critic": critic})
        print_samples(script, nets, args, state, data, steps, scales)
    except script.UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    script.evaluation_policies = lambda nets, args: make_policies(
        script, nets, args, steps, scales, critic
    )
    return script.command_line(script.main, script.Args, ["--evaluate", run, *rest])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
