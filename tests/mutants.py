"""Do the quick tests notice small mistakes? Each mutation below changes one place of a script, in a
copy of the repository, and the tests named with it must fail there.

    python tests/mutants.py                      # all; a table, exit code 1 if one is missed
    python tests/mutants.py --only last-three    # some
    python tests/mutants.py --list               # names, places and tests
    python tests/mutants.py --jobs 2             # two at a time, each in a copy of its own

Not part of pytest, whose test_mutants.py only checks that the texts below still stand in the
scripts. Texts that have changed: one sentence, exit code 2, as where the tests fail by themselves.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 600  # seconds for the tests of a mutation


class Mutant(NamedTuple):
    """One mistake. The old text occurs once in the script, or in the shared block of each."""

    name: str
    place: str  # a script, or a shared block's name: then in every script that has the block
    old: str
    new: str
    tests: str  # node ids below tests/, without .py, separated by spaces


NORMALISE = (
    'for name in ("obs", "next_obs"):\n            batch[name]',
    ('for name in ("obs",):\n            batch[name]'),
)
WIRED = "test_wiring::"
TD, LEARN = WIRED + "test_td_target_and_keys", WIRED + "test_batches_and_keys"
ACT, PHASES = WIRED + "test_exploring_actions", WIRED + "test_phases_and_stored_rows"
MODES, EPISODES = WIRED + "test_modes_of_evaluation", WIRED + "test_episodes_of_evaluation"
LOOP, ROWS = WIRED + "test_training_loop", "test_replay::test_saved_rows_are_those_of_the_ring"

MUTANTS = [
    # ---- gsflow.py ----
    Mutant("gsflow-target-net", "gsflow", "nets.critic(state.target_critic, next_obs, next_action)",
           'nets.critic(params["critic"], next_obs, next_action)', f"{TD}[gsflow]"),
    Mutant("gsflow-next-obs", "gsflow", "nets.critic(state.target_critic, next_obs, next_action)",
           "nets.critic(state.target_critic, obs, next_action)", f"{TD}[gsflow]"),
    Mutant("gsflow-target-lag", "gsflow", 'optax.incremental_update(params["critic"], state.target',
           'optax.incremental_update(state.params["critic"], state.target',
           "test_gsflow_losses::test_target_critic_follows_the_new_critic"),
    Mutant("gsflow-ema-acts", "gsflow", "obs_std, state.ema or state.params",
           "obs_std, state.params",
           "test_gsflow_losses::test_averaged_networks_act_distil_and_make_targets"),
    Mutant("gsflow-ema-target", "gsflow", "sample_prior(actor, nets, next_obs",
           "sample_prior(params, nets, next_obs",
           "test_gsflow_losses::test_averaged_networks_act_distil_and_make_targets"),
    Mutant("gsflow-entropy-sign", "gsflow", "alpha * distill + q_term + entropy_term",
           "alpha * distill + q_term - entropy_term",
           "test_gsflow_losses::test_gsflow_student_loss_values"),
    Mutant("gsflow-normalise", "gsflow", *NORMALISE, f"{LEARN}[gsflow]"),
    Mutant("gsflow-batch-key", "gsflow", "update(state, batch, update_key, settings)",
           "update(state, batch, batch_key, settings)", f"{LEARN}[gsflow]"),
    Mutant("gsflow-update-key-step", "gsflow", 'purpose_key(state.seed, "update", state.step)',
           'purpose_key(state.seed, "update", 0)', f"{LEARN}[gsflow]"),
    Mutant("gsflow-act-key-time", "gsflow", 'purpose_key(state.seed, "act", time)',
           'purpose_key(state.seed, "act")', f"{ACT}[gsflow]"),
    Mutant("gsflow-explore-temperature", "gsflow", "policy(state, obs, key, args.behavior_temp",
           "policy(state, obs, key, args.eval_temp", f"{ACT}[gsflow]"),
    Mutant("gsflow-eval-temperature", "gsflow", "temperature=args.eval_temperature",
           "temperature=args.behavior_temperature", f"{MODES}[gsflow]"),
    Mutant("gsflow-online-settings", "gsflow", 'online = (data, phase_settings(args, "online"))',
           'online = (data, phase_settings(args, "offline"))', f"{PHASES}[gsflow-jax]"),
    Mutant("gsflow-online-temperature", "gsflow", "(args.online_alpha, args.online_td_temperature)",
           "(args.online_alpha, args.offline_td_temperature)", f"{PHASES}[gsflow-jax]"),
    Mutant("gsflow-utd", "gsflow", "repeat(learn, args.num_envs * args.utd)",
           "repeat(learn, args.num_envs)", f"{PHASES}[gsflow-jax]"),
    Mutant("gsflow-newest-row", "gsflow", "newest = (added - 1) % capacity",
           "newest = added % capacity",
           "test_replay::test_no_window_crosses_the_write_pointer[4-1]"),
    Mutant("gsflow-balanced-half", "gsflow", "< batch_size // 2) & (added > 0)",
           "< batch_size // 3) & (added > 0)", "test_replay::test_balanced_sampling"),
    Mutant("gsflow-n-step-data", "gsflow", "device_data(raw, args.n_step, args.gamma)",
           "device_data(raw, 1, args.gamma)", f"{PHASES}[gsflow-jax]"),
    Mutant("gsflow-n-step-online", "gsflow", "args.batch_size, args.n_step, args.gamma",
           "args.batch_size, 1, args.gamma", f"{LEARN}[gsflow]"),
    Mutant("gsflow-stride", "gsflow", "args.buffer_size, args.num_envs, args.balanced_sampling",
           "args.buffer_size, 1, args.balanced_sampling", f"{LEARN}[gsflow]"),
    # ---- flowq.py ----
    Mutant("flowq-td-key", "flowq", 'keys["td_noise"], nets, args)',
           'keys["flow_noise"], nets, args)', f"{TD}[flowq]"),
    Mutant("flowq-target-net", "flowq", "nets.critic(state.target_critic, next_obs, next_actions)",
           'nets.critic(params["critic"], next_obs, next_actions)', f"{TD}[flowq]"),
    Mutant("flowq-normalise", "flowq", *NORMALISE, f"{LEARN}[flowq]"),
    Mutant("flowq-batch-key", "flowq", "update(state, batch, update_key, settings)",
           "update(state, batch, batch_key, settings)", f"{LEARN}[flowq]"),
    Mutant("flowq-lambda", "flowq", "Settings(jnp.float32(args.guidance_lambda))",
           "Settings(jnp.float32(1.0))", f"{PHASES}[flowq-jax]"),
    Mutant("flowq-guidance-sign", "flowq", "stop_gradient(plain + guidance)",
           "stop_gradient(plain - guidance)",
           "test_flowq_losses::test_policy_loss[0.0-noisy-mean]"),
    Mutant("flowq-ema-acts", "flowq", "flow_endpoint(state.ema, nets, obs, noise, args)",
           'flow_endpoint(state.params["velocity"], nets, obs, noise, args)',
           "test_flowq_losses::test_best_of_n"),
    Mutant("flowq-expectile-side", "flowq", "jnp.where(error > 0, expectile, 1 - expectile)",
           "jnp.where(error < 0, expectile, 1 - expectile)",
           "test_flowq_losses::test_iql_target_and_expectile"),
    Mutant("flowq-rewards", "flowq", 'device_data(raw | {"rewards": rewards}', "device_data(raw",
           "test_flowq_losses::test_prepare_clips_actions_and_transforms_before_the_targets"),
    Mutant("flowq-warmup", "flowq", "jnp.minimum(1, state.step / args.guidance_warmup)",
           "jnp.maximum(1, state.step / args.guidance_warmup)",
           "test_flowq_losses::test_guidance_warmup"),
    # ---- fmq.py ----
    Mutant("fmq-target-net", "fmq", "nets.critic(state.target_critic, obs, chunk), agg)",
           'nets.critic(state.params["critic"], obs, chunk), agg)', f"{TD}[fmq]"),
    Mutant("fmq-next-obs", "fmq", 'obs, agg = batch["next_obs"], state.pessimistic',
           'obs, agg = batch["obs"], state.pessimistic', f"{TD}[fmq]"),
    Mutant("fmq-normalise", "fmq", *NORMALISE, f"{LEARN}[fmq]"),
    Mutant("fmq-explore-mode", "fmq", 'purpose_key(state.seed, "act", time), "best-of-n")',
           'purpose_key(state.seed, "act", time), "one-step")', f"{ACT}[fmq]"),
    Mutant("fmq-act-key-time", "fmq", 'purpose_key(state.seed, "act", time), "best-of-n")',
           'purpose_key(state.seed, "act"), "best-of-n")', f"{ACT}[fmq]"),
    Mutant("fmq-online-objective", "fmq", "make_learn, nets, args, args.online_objective)",
           "make_learn, nets, args)", f"{PHASES}[fmq-jax]"),
    Mutant("fmq-frozen-actor", "fmq", 'u_off = nets.actor(frozen["offline"], obs, x, r, 1.0)',
           'u_off = jax.lax.stop_gradient(nets.actor(params["actor"], obs, x, r, 1.0))',
           "test_fmq_losses::test_fmq_loss_written_out[offline]"),
    Mutant("fmq-critics-online", "fmq", '"min" if args.online_objective == "fmq" else "mean"',
           '"mean"', "test_fmq_data::test_a_flag_decides_how_critics_are_joined_online"),
    Mutant("fmq-valid", "fmq", 'batch["valid"][:, -1] * (q - target)',
           'batch["valid"][:, 0] * (q - target)', "test_fmq_data::test_window_over_an_episode_end"),
    Mutant("fmq-guiding-critic", "fmq", "pull_back(jnp.zeros_like(q).at[0].set(1.0))",
           "pull_back(jnp.zeros_like(q).at[1].set(1.0))",
           "test_fmq_losses::test_only_the_first_critic_guides"),
    Mutant("fmq-sparse-data", "fmq", "raw = prepare(raw, args)", "prepare(raw, args)",
           f"{PHASES}[fmq-jax]"),
    Mutant("fmq-sparse-online", "fmq", "learn, horizon, horizon, args.sparse)",
           "learn, horizon, horizon)", f"{PHASES}[fmq-jax]"),
    Mutant("fmq-pool", "fmq", "args.horizon, args.gamma, args.buffer_size",
           "args.horizon, args.gamma, None", f"{LEARN}[fmq]"),
    # ---- sac_flow.py ----
    Mutant("sac-cost-sign", "sac_flow", "aggregate(next_q, args) - next_cost",
           "aggregate(next_q, args) + next_cost", f"{TD}[sac_flow]"),
    Mutant("sac-target-net", "sac_flow", '(state.target_critic, state.stats["critic"])',
           '(state.params["critic"], state.stats["critic"])', f"{TD}[sac_flow]"),
    Mutant("sac-sigma-of-targets", "sac_flow", 'batch["next_obs"], key, args.sigma_inference)',
           'batch["next_obs"], key, args.sigma)', f"{TD}[sac_flow]"),
    Mutant("sac-sigma-of-acting", "sac_flow", "obs, key, args.sigma_inference)[0][0]",
           "obs, key, args.sigma)[0][0]", f"{MODES}[sac_flow]"),
    Mutant("sac-deterministic", "sac_flow", "functools.partial(policy, deterministic=True)",
           "policy", f"{MODES}[sac_flow]"),
    Mutant("sac-normalise", "sac_flow", 'for k in ("obs", "next_obs")}', 'for k in ("obs",)}',
           f"{LEARN}[sac_flow]"),
    Mutant("sac-batch-key", "sac_flow", 'purpose_key(state.seed, "update", state.step))[1]',
           'purpose_key(state.seed, "update", state.step))[0]', f"{LEARN}[sac_flow]"),
    Mutant("sac-beta-online", "sac_flow", "inputs = data, jnp.float32(args.beta_online)",
           "inputs = data, jnp.float32(args.beta)", f"{PHASES}[sac_flow-jax]"),
    Mutant("sac-sparse-online", "sac_flow", "args.horizon_length, args.sparse, learn_first=",
           "args.horizon_length, False, learn_first=", f"{PHASES}[sac_flow-jax]"),
    Mutant("sac-sparse-data", "sac_flow",
           'raw["rewards"] = -(raw["rewards"] != 0).astype(np.float32)', "pass",
           f"{PHASES}[sac_flow-jax]"),
    Mutant("sac-random-scale", "sac_flow", "return args.action_scale * actions", "return actions",
           f"{ACT}[sac_flow]"),
    Mutant("sac-judge", "sac_flow", 'judge = state if args.mode == "online" else before',
           "judge = state",
           "test_sac_flow_updates::test_one_update_of_each_mode[cube-triple-1]"),
    Mutant("sac-visible-rows", "sac_flow", "args.num_envs * (steps - 1 - due)", "0",
           "test_sac_flow_updates::test_an_update_sees_no_row_newer_than_its_step[1-1-3]"),
    # ---- data, windows, replay ----
    Mutant("observation-scale", "data", 'data["obs"].std(axis=0)', 'data["obs"].std()',
           WIRED + "test_observation_scale"),
    Mutant("episode-ends-of-data", "data", "terminals=ends[keep + 1]", "terminals=ends[keep]",
           "test_data::test_point_maze_relabelling_equals_ogbench"),
    Mutant("n-step-masks", "n-step targets", 'discounts * gamma * rows["masks"][row]',
           "discounts * gamma", "test_replay::test_window_stops_at_success"),
    Mutant("window-masks", "chunks", 'rows["masks"].min(axis=1)', 'rows["masks"][:, -1]',
           "test_sac_flow_updates::test_chunk_masks"),
    Mutant("window-over-the-pointer", "chunks", "num_online - (horizon - 1) * stride, 0)",
           "num_online, 0)", "test_sac_flow_updates::test_ring_seam"),
    # ---- online ----
    Mutant("stored-masks", "online", 'masks=1.0 - out["terminated"]', "masks=1.0 - done",
           f"{PHASES}[gsflow-jax]"),
    Mutant("host-final-obs", "online", 'next_obs[e] = info["final_obs"][e]',
           "next_obs[e] = self.obs[e]", f"{PHASES}[gsflow-host]"),
    Mutant("restart-ends-episodes", "online", "terminals.at[:, newest].set(1.0)",
           "terminals.at[:, newest].set(0.0)", f"{PHASES}[gsflow-host]"),
    Mutant("host-stores-obs", "online", "steps.append((obs, actions, out))",
           "steps.append((self.obs, actions, out))", f"{PHASES}[gsflow-host]"),
    Mutant("host-act-key", "online", "split(obs), added + i * args.num_envs)", "split(obs), added)",
           f"{PHASES}[fmq-host]"),
    Mutant("returns-go-on", "online", "jnp.where(done, 0.0, returns)", "returns",
           f"{PHASES}[gsflow-jax]"),
    Mutant("chunk-goes-on", "online", '* ~(out["terminated"] | out["truncated"])', "",
           "test_fmq_data::test_chunks_run_open_loop_and_end_with_the_episode[jax]"),
    Mutant("env-key-time", "online", 'purpose_key(state.seed, "env", time)',
           'purpose_key(state.seed, "env")', f"{PHASES}[gsflow-jax]"),
    # ---- environments and evaluation ----
    Mutant("time-limit", "environments and evaluation", "(t + 1 >= env.max_episode_steps)",
           "(t >= env.max_episode_steps)", f"{PHASES}[gsflow-jax]"),
    Mutant("obs-before-restart", "environments and evaluation",
           "next_obs=env.observation(new, None)", "next_obs=env.observation(state, None)",
           f"{PHASES}[gsflow-jax]"),
    Mutant("jax-eval-seed", "environments and evaluation",
           'purpose_key(state.seed, "eval", step), 3)', 'purpose_key(0, "eval", step), 3)',
           f"{EPISODES}[jax]"),
    Mutant("host-eval-seed", "environments and evaluation", "ids = [(seeds[s], step, n[s, k])",
           "ids = [(0, step, n[s, k])", f"{EPISODES}[host]"),
    Mutant("host-eval-key", "environments and evaluation", '"eval", step, n, t)',
           '"eval", step, t)', f"{EPISODES}[host]"),
    Mutant("eval-goes-on", "environments and evaluation", "v + alive * gain[k]", "v + gain[k]",
           f"{EPISODES}[jax]"),
    Mutant("eval-closed-loop", "environments and evaluation", "due = t % horizon == 0",
           "due = t >= 0",
           "test_evaluation::test_chunks_modes_and_no_success_on_official_environments"),
    Mutant("host-success-timing", "environments and evaluation",
           "options = dict(success_timing=success_timing)", 'options = dict(success_timing="post")',
           WIRED + "test_success_timing_reaches_the_environments"),
    Mutant("jax-success-timing", "tasks", "PointMaze(maze, task.index, args.success_timing)",
           "PointMaze(maze, task.index)", WIRED + "test_success_timing_reaches_the_environments"),
    # ---- loop, runs, resume ----
    Mutant("phase-enters-again", "training loop",
           "phase.enter(carry) if run.step == phase.start else carry", "phase.enter(carry)", LOOP),
    Mutant("no-restart-at-saves", "training loop",
           "carry = phase.restart(carry) if phase.restart else carry\n", "pass\n", LOOP),
    Mutant("resume-phase", "runs", "next(p for p in phases if step <= p.end)",
           "next(p for p in phases if step < p.end)", WIRED + "test_resume_enters_its_phase"),
    Mutant("resume-restart", "runs", "return (phase.restart(carry) if phase.restart else carry), ",
           "return carry, ", WIRED + "test_resume_enters_its_phase"),
    Mutant("rows-behind-a-checkpoint", "runs", "size = min(self.csv.tell(), self.csv_bytes)",
           "size = self.csv.tell()",
           "test_runs::test_more_online_steps_on_resume_equal_a_longer_run"),
    Mutant("replay-append-position", "runs", "files[-1][1] if files else 0",
           "files[0][1] if files else 0", f"{ROWS}[False]"),
    Mutant("replay-wrap-written", "runs", "at = np.arange(first, added) % capacity",
           "at = np.arange(first, added)", f"{ROWS}[False]"),
    Mutant("replay-wrap-read", "runs", "ring[:, np.arange(first, end) % capacity] = v",
           "ring[:, np.arange(end - first)] = v", f"{ROWS}[False]"),
    Mutant("replay-oldest-file", "runs", "if file[1] > oldest]", "if file[0] >= oldest]",
           f"{ROWS}[False]"),
    Mutant("replay-of-the-previous", "runs", "in (*before, *self.replay_files))",
           "in self.replay_files)", f"{ROWS}[True]"),
    Mutant("replay-checksum", "runs", "zlib.crc32(body) != checksum", "not body",
           "test_corruption::test_damage_is_noticed_or_does_no_harm[10-20.msgpack-byte]"),
    Mutant("replay-not-listed", "runs",
           "save_checkpoint(self.dir, carry, facts)\n        needed",
           "save_checkpoint(self.dir, carry, facts | {'replay_files': before})\n        needed",
           f"{ROWS}[False]"),
    Mutant("ends-before-the-first-row", "online", "np.arange(min(time, args.num_envs))",
           "np.arange(args.num_envs)", f"{PHASES}[gsflow-host]"),
    Mutant("nohup", "runs", "(not ignored)", "1", "test_runs::test_nohup_is_respected"),
    Mutant("memory-of-each-device", "runs", "0.8 * total - devices * data", "0.8 * total - data",
           "test_runs::test_what_fits"),
    Mutant("seed-flag", "runs", "jnp.arange(args.num_seeds, dtype=jnp.int32) + args.seed",
           "jnp.arange(args.num_seeds, dtype=jnp.int32)", WIRED + "test_seeds_begin_at_the_flag"),
    Mutant("last-three", "runs", "self.evals[-3:]", "self.evals[:3]",
           WIRED + "test_last_three_evaluations"),
    Mutant("grid-numbers", "runs", "jnp.float32(v)[arm]", "jnp.float32(v)[0]",
           "test_grid::test_a_function_gets_the_numbers_of_its_arm"),
    Mutant("grid-settings", "runs", "x[arm] if x.ndim else x", "x[0] if x.ndim else x",
           "test_grid::test_a_member_equals_its_single_run"),
    Mutant("grid-order", "runs", "jnp.repeat(jnp.arange(count), args.num_seeds)",
           "jnp.tile(jnp.arange(count), args.num_seeds)",
           "test_grid::test_everything_names_the_members"),
]  # fmt: skip


def places(root, place):
    """The scripts that a mutation changes: {path: (text before the block, block, behind)}."""
    found = {}
    for path in sorted((root / "algos").glob("*.py")):
        text, mark = path.read_text(), f"# ==== shared: {place} ====\n"
        if path.stem == place:
            found[path] = "", text, ""
        elif mark in text:
            begin, end = text.index(mark), text.index(f"# ==== end shared: {place} ====\n")
            found[path] = text[:begin], text[begin:end], text[end:]
    return found


def mutate(root, mutant):
    """{path: parts of the mutated text}; ValueError where the old one is not there just once."""
    texts, found = {}, places(root, mutant.place)
    if not found:
        raise ValueError(f"{mutant.name}: no script or shared block is called '{mutant.place}'")
    for path, (before, block, behind) in found.items():
        if (count := block.count(mutant.old)) != 1:
            raise ValueError(f"{mutant.name}: '{mutant.old}' occurs {count} times in {path.name}")
        texts[path] = before, block.replace(mutant.old, mutant.new), behind
    return texts


def node_ids(mutant):
    return [re.sub("^([^:]+)", r"tests/\1.py", test) for test in mutant.tests.split()]


def complaints(root=ROOT, mutants=MUTANTS):
    """What no longer fits the repository, a sentence each: old texts, tests, syntax."""
    sentences = []
    for mutant in mutants:
        try:
            mutate(root, mutant)
            block = next(iter(places(root, mutant.place).values()))[1]
            before, _, behind = block.partition(mutant.old)  # of the function that it stands in
            function = before.rpartition("\n\n\n")[2], mutant.new, behind.partition("\n\n\n")[0]
            ast.parse("".join(function))
        except (ValueError, SyntaxError) as e:
            sentences.append(str(e) if isinstance(e, ValueError) else f"{mutant.name}: {e}")
        for node in node_ids(mutant):
            file, _, function = node.partition("::")
            path, function = root / file, function.split("[")[0]
            if not path.is_file() or f"\ndef {function}(" not in path.read_text():
                sentences.append(f"{mutant.name}: there is no test {node}")
    return sentences


def run_tests(root, nodes):
    """(exit code of pytest, the first failure in words, seconds)."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "--durations=0"]
    command += ["-p", "no:cacheprovider", "--no-header", *nodes]
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return None, f"no end after {LIMIT} s", time.perf_counter() - start
    failed = re.findall(r"^(?:FAILED|ERROR) (?:tests/)?(.*)", done.stdout, re.M)
    last = (done.stdout + done.stderr).strip().splitlines()[-1:]
    return done.returncode, (failed or last or [""])[0], time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutations")
    parser.add_argument("--list", action="store_true", help="print the table and run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="so many at a time")
    args = parser.parse_args()
    if wrong := complaints():
        stop(wrong)
    unknown = set(args.only or ()) - {mutant.name for mutant in MUTANTS}
    if unknown:
        stop([f"no mutation is called {', '.join(sorted(unknown))}: see --list"])
    chosen = [mutant for mutant in MUTANTS if not args.only or mutant.name in args.only]
    if args.list:
        for mutant in chosen:
            print(f"{mutant.name:<28} {mutant.place:<28} {mutant.tests}")
        return 0

    with tempfile.TemporaryDirectory() as directory:
        roots, ignore = (
            SimpleQueue(),
            shutil.ignore_patterns(".*", "runs", "__pycache__", "results"),
        )
        for i in range(args.jobs):
            shutil.copytree(ROOT, Path(directory) / str(i), ignore=ignore)
            roots.put(Path(directory) / str(i))

        def trial(mutant):
            root = roots.get()
            texts = mutate(root, mutant)
            intact = {path: path.read_text() for path in texts}
            try:
                for path, parts in texts.items():
                    path.write_text("".join(parts))
                return run_tests(root, node_ids(mutant))
            finally:
                for path, text in intact.items():
                    path.write_text(text)
                roots.put(root)

        begin = time.perf_counter()
        nodes = sorted({node for mutant in chosen for node in node_ids(mutant)})
        code, why, seconds = run_tests(Path(directory) / "0", nodes)
        if code != 0:
            stop([f"without any mutation the tests do not pass: {why}"])
        print(f"without any mutation all pass, {seconds:.0f} s", flush=True)
        missed = 0
        with ThreadPoolExecutor(args.jobs) as pool:
            for mutant, (code, why, seconds) in zip(chosen, pool.map(trial, chosen), strict=True):
                missed += code != 1
                verdict = "caught" if code == 1 else "MISSED"
                print(f"{mutant.name:<28} {verdict} {seconds:>5.0f} s  {why[:100]}", flush=True)
    total = time.perf_counter() - begin
    print(f"{len(chosen) - missed} of {len(chosen)} caught, {missed} missed, {total:,.0f} s")
    return int(missed > 0)


def stop(sentences):
    """Say what is wrong; exit code 2."""
    print("\n".join(f"error: {sentence}" for sentence in sentences), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    sys.exit(main())
