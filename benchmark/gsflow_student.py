"""What does the student of a run of gsflow.py lose against its teacher, and where?

    python benchmark/gsflow_student.py runs/RUN --eval-episodes 50

First, at states of the data: the width of the noise (deviation), how far actions spread over it (at
a state, mean over action dimensions), how far the student's lie from the teacher's for the same
noise, and their values. What the student is off by is split into the part that all noises of a
state share and the rest.

Then an evaluation of each way to act with these networks: noise from N(0, I) or from the prior,
through the one-step student or the teacher's flow, once or as the best of N by the critic.
Arguments behind the run are those of the script with --evaluate.
"""

import importlib.util
import sys
from pathlib import Path

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np

ALGOS = Path(__file__).resolve().parent.parent / "algos"


def load_script(name="gsflow"):
    spec = importlib.util.spec_from_file_location(name, ALGOS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    cloudpickle.register_pickle_by_value(module)  # the simulators' processes cannot import it
    return module


def noises_of(nets):
    """Name -> networks with which the script's `sample_prior` draws that noise."""
    return dict(normal=nets._replace(decoder=None)) | (dict(prior=nets) if nets.decoder else {})


def make_policies(script, nets, args):
    """Mode -> (state, obs, key) -> action (A,). Names: noise, what makes it an action, choice."""

    def policy(prior, actor, count):
        def act(state, obs, key):
            prior_key, action_key = jax.random.split(key)
            obs = jnp.broadcast_to((obs - state.obs_mean) / state.obs_std, (count, len(obs)))
            params = state.ema or state.params
            x = script.sample_prior(params, prior, obs, prior_key)
            actions = actor(params, obs, x, action_key)[:, None]
            how = args.candidate_q_agg
            return script.select_noise(state.params, nets, obs[:1], actions, actions, how)[0]

        return act

    def student(params, obs, x, key):
        return script.sample_action(params, nets, obs, x, args.eval_temperature, key)[0]

    def teacher(params, obs, x, key):
        return script.flow_endpoint(params, nets, obs, x, args.flow_steps)

    noises = noises_of(nets)
    actors, counts = dict(student=student, teacher=teacher), dict(one=1, best=args.num_candidates)
    return {
        f"{noise}_{actor}_{choice}": policy(noises[noise], actors[actor], counts[choice])
        for noise in noises
        for actor in actors
        for choice in counts
    }


def load(script, run_dir):
    """Arguments, networks, state of the first seed, and dataset of a run."""
    args = script.read_args(run_dir, [], script.Args())
    task = script.parse_task(args.env_id, args.dataset_dir)
    args = script.resolve(args, task)
    data, _ = script.load_dataset(task, args)
    obs_dim, act_dim = data["observations"].shape[1], data["actions"].shape[1]
    state = script.start_states(args, obs_dim, act_dim, jnp.zeros(obs_dim), jnp.ones(obs_dim))
    tree, _ = script.load_checkpoint(run_dir, replay=False)
    state = script.restore(state, tree["state"], run_dir)
    state = jax.tree.map(lambda x: jnp.asarray(x)[0], state)
    return args, script.make_networks(args, act_dim), state, data


def print_distances(script, run_dir, rows=512, draws=16):
    """A table, a row per noise and actor, of the run's first seed."""
    args, nets, state, data = load(script, run_dir)
    params = state.ema or state.params
    index = np.random.default_rng(0).choice(len(data["actions"]), rows)
    obs = (data["observations"][index] - state.obs_mean) / state.obs_std
    obs = jnp.broadcast_to(obs, (draws, *obs.shape))

    rms = lambda x: float(jnp.sqrt((x**2).mean()))
    print("| noise | width | actor | spread | off by, shared | off by, rest | Q | Q, best of 4 |")
    print("|---|---|---|---|---|---|---|---|")
    for noise, prior in noises_of(nets).items():
        x = script.sample_prior(params, prior, obs, jax.random.key(0))
        student, _ = script.sample_action(params, nets, obs, x, 0.0, jax.random.key(1))
        teacher = script.flow_endpoint(params, nets, obs, x, args.flow_steps)
        shared = (student - teacher).mean(axis=0)
        off = [f"{rms(shared):.3f}", f"{rms(student - teacher - shared):.3f}"]
        for actor, actions in dict(teacher=teacher, student=student).items():
            q = nets.critic(state.params["critic"], obs, actions).mean(axis=0)
            best = q.reshape(-1, 4, rows).max(axis=1).mean()
            row = [noise, f"{x.std():.2f}", actor, f"{actions.std(axis=0).mean():.3f}"]
            row += off if actor == "student" else ["", ""]
            print(f"| {' | '.join([*row, f'{q.mean():.2f}', f'{best:.2f}'])} |")


def main(argv):
    """Both tables; returns the exit code."""
    if {"-h", "--help"} & {*argv}:
        print(__doc__)
        return 0
    script = load_script()
    try:
        script.need(argv and argv[0][:1] != "-", "give the directory of a run of gsflow.py first")
        print_distances(script, argv[0])
    except script.UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    script.evaluation_policies = lambda nets, args: make_policies(script, nets, args)
    return script.command_line(script.main, script.Args, ["--evaluate", *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
