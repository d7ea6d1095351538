"""Would the critic choose the same action if teacher and critic computed in bfloat16?

    python benchmark/bfloat16.py runs/RUN                  # a run of gsflow.py

At states of the data N noises go through the teacher's flow, and the critic chooses one of the
actions, as in an update of GSFlow. Two forms of bfloat16: inputs of all products rounded, sums in
float32 (on a GPU JAX's matmul precision BF16_BF16_F32), or parameters and everything between in
bfloat16. On a CPU both are emulated, so this says what they would choose, not how fast.

Printed, for the form and what it is used for: the share of states with the same choice; the value,
by float32, that the other choices lose; what choosing gains over a random candidate; and how many
candidates share the highest value.
"""

import contextlib
import dataclasses
import sys
from unittest import mock

import gsflow_student
import jax
import jax.numpy as jnp
import numpy as np
import tyro

COLUMNS = "form", "bfloat16 in", "N", "same choice", "value lost", "value gained", "equal best"


@dataclasses.dataclass(frozen=True)
class Args:
    run_dir: tyro.conf.Positional[str]  # a run of gsflow.py
    candidates: tuple[int, ...] = (4, 10)  # N
    states: int = 2_000


@contextlib.contextmanager
def rounded_products():
    """Within this, products round their inputs to bfloat16; sums stay in float32."""
    exact = jax.lax.dot_general
    short = lambda x: jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    product = lambda a, b, *rest, **options: exact(short(a), short(b), *rest, **options)
    with mock.patch.object(jax.lax, "dot_general", product):
        yield


def halve(tree):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)


def all_bfloat16(nets):
    """Networks that compute in bfloat16; Euler steps, and the mean of the critics, in float32."""

    def cast(network):
        return lambda params, *inputs: network(halve(params), *halve(inputs)).astype(jnp.float32)

    return nets._replace(velocity=cast(nets.velocity), critic=cast(nets.critic))


def compare(script, nets, args, actor, critic, obs, noises):
    """Rows of the table, as {column: value}; obs (B, D), noises (N, B, A)."""
    obs = jnp.broadcast_to(obs, (*noises.shape[:2], obs.shape[-1]))

    def act(nets):
        return script.flow_endpoint(actor, nets, obs, noises, args.flow_steps)

    def value(nets, actions):
        return script.aggregate(nets.critic(critic, obs, actions), args.candidate_q_agg)

    actions = act(nets)
    exact = value(nets, actions)
    of = lambda choice: jnp.take_along_axis(exact, choice[None], axis=0)[0].mean()
    best = exact.argmax(axis=0)
    for form, context, networks in (
        ("products", rounded_products, nets),
        ("everything", contextlib.nullcontext, all_bfloat16(nets)),
    ):
        with context():
            short = act(networks)
            values = dict(critic=value(networks, actions), both=value(networks, short))
        for part, q in dict(teacher=value(nets, short), **values).items():
            choice, top = q.argmax(axis=0), (q == q.max(axis=0)).sum(axis=0)
            row = form, part, len(noises), (choice == best).mean(), of(best) - of(choice)
            yield dict(zip(COLUMNS, (*row, of(best) - exact.mean(), top.mean()), strict=True))


def main(bench):
    """Print the table; returns the exit code."""
    script = gsflow_student.load_script()
    try:
        args, nets, state, data = gsflow_student.load(script, bench.run_dir)
    except script.UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    observations = data["observations"]
    index = np.random.default_rng(0).permutation(len(observations))[: bench.states]
    obs = (observations[index] - state.obs_mean) / state.obs_std
    actor, critic = state.ema or state.params, state.params["critic"]
    print(f"| {' | '.join(COLUMNS)} |\n" + "|---" * len(COLUMNS) + "|")
    for count in bench.candidates:
        noises = jax.random.normal(jax.random.key(0), (count, len(obs), nets.act_dim))
        for row in compare(script, nets, args, actor, critic, obs, noises):
            cells = [x if isinstance(x, str | int) else f"{x:.4f}" for x in row.values()]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
