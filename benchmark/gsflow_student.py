"""What does the student of a run of gsflow.py lose against its teacher, and where?

    python benchmark/gsflow_student.py runs/RUN                 # a table, an evaluation per row
    python benchmark/gsflow_student.py runs/RUN --eval-episodes 50

The same networks act in six ways, which take the student's way apart: noise from the prior or from
N(0, I), through the one-step student or the teacher's flow, once or as the best of N by the critic.
Arguments behind the run are those of the script with --evaluate.
"""

import importlib.util
import sys
from pathlib import Path

import cloudpickle
import jax
import jax.numpy as jnp

SCRIPT = Path(__file__).resolve().parent.parent / "algos" / "gsflow.py"


def load_script():
    spec = importlib.util.spec_from_file_location("gsflow", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gsflow"] = module
    spec.loader.exec_module(module)
    cloudpickle.register_pickle_by_value(module)  # the simulators' processes cannot import it
    return module


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

    normal = nets._replace(decoder=None)
    noises = {"normal": normal} | ({"prior": nets} if nets.decoder is not None else {})
    actors, counts = dict(student=student, teacher=teacher), dict(one=1, best=args.num_candidates)
    return {
        f"{noise}_{actor}_{choice}": policy(noises[noise], actors[actor], counts[choice])
        for noise in noises
        for actor in actors
        for choice in counts
    }


def main(argv):
    script = load_script()
    script.evaluation_policies = lambda nets, args: make_policies(script, nets, args)
    script.command_line(script.main, script.Args, ["--evaluate", *argv])


if __name__ == "__main__":
    main(sys.argv[1:])
