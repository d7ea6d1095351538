"""What careless users give: each ends in one sentence, exit code 2, and leaves nothing behind.

These come on top of the tables in test_runs.py, test_*_runs.py, test_data.py, test_task_files.py.
"""

import json
import os
import shutil
import sys

import numpy as np
import pytest
from conftest import ROOT, SCRIPTS, load_script
from helpers import finish, launch, only_run, start
from test_runs import TINY, good_file
from test_task_files import own_dataset


def script(name):
    return load_script(ROOT / "algos" / f"{name}.py")


def refused(name, *flags):
    """The sentence with which a script refuses, started in the (empty or filled) directory."""
    before = sorted(os.listdir())
    out, err = launch(script(name), *flags, code=2)
    assert "Traceback" not in out + err and err.startswith("error: ") and err.count("\n") == 1, err
    assert sorted({*os.listdir()} - {"__pycache__"}) == before
    return err


@pytest.fixture(autouse=True)
def _empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- the command line ----
FLAGS = {
    "gsflow": {
        "--env-id=": "unknown task ''",
        "--env-id my_task.py": "unknown task 'my_task.py'",
        "--env-id pointmaze-medium-task6": "close matches",
        "--env-id d4rl/nope": "unknown D4RL task 'nope'",
        "--env-id robomimic/nope": "unknown RoboMimic task 'nope'",
        "--env-id multi-crescent/x": "no task 'x'",
        "--learning-rate inf": "--learning-rate is inf, but must be between 0 and",
        "--target-entropy nan": "--target-entropy is nan",
        "--log-std-min nan": "--log-std-min is nan",
        "--kl-weight nan": "--kl-weight is nan",
        "--latent-dim 0": "--latent-dim is 0",
        "--utd -1": "--utd is -1",
        f"--batch-size 1{'0' * 30}": "but must be between 1 and 2147483647",
        "--offline-steps 30000000000": "but must be between 0 and 2147483647",
        "--num-seeds 3000000000": "--num-seeds is 3000000000",
        "--prior-hidden-dims -3": "--prior-hidden-dims needs layers",
        "--env-backend mjx": "MJX simulates",
        "--dataset=": "cannot read .",
        "--dataset .": "cannot read .",
        "--resume a --evaluate b": "exclude each other",
        "--start-from nowhere": "'nowhere' is not a run directory",
        "--start-from nowhere --resume=": "is not a run directory",
    },
    "flowq": {
        "--ema-decay nan": "--ema-decay is nan",
        "--guidance-lambda inf": "--guidance-lambda is inf",
        "--eval-candidates -4": "--eval-candidates is -4",
        "--dataset-action-clip nan": "--dataset-action-clip is nan",
        "--n-step 99999999999": "--n-step is 99999999999",
        "--resume a --evaluate b": "exclude each other",
        "--dataset=": "cannot read .",
    },
    "fmq": {
        "--eta inf": "--eta is inf",
        "--horizon -1": "--horizon is -1",
        "--qgbs-snr nan": "--qgbs-snr is nan",
        "--learning-starts -1": "--learning-starts is -1",
        "--tau 2": "--tau is 2.0, but must be between 0 and 1",
        "--hidden-dims 64 -64": "--hidden-dims needs layers",
    },
    "sac_flow": {
        "--target-entropy nan": "--target-entropy is nan",
        "--utd nan": "--utd is nan",
        "--noise fixed --sigma inf": "--sigma is inf",
        "--num-envs 0": "--num-envs is 0",
        "--env-id Pendulum-v99": "close matches",
        "--env-id cube-double --mode online --dataset=": "--dataset has no meaning",
        "--gamma -0.5": "--gamma is -0.5",
    },
}
FLAGS = [(name, flags, text) for name, cases in FLAGS.items() for flags, text in cases.items()]


@pytest.mark.parametrize("name,flags,message", FLAGS)
def test_flags(name, flags, message):
    assert message in refused(name, *flags.split())


@pytest.mark.parametrize(
    "name,flags",
    [
        ("gsflow", "--seed 1.5"),
        ("gsflow", "--seed"),
        ("gsflow", "--sed 1"),
        ("gsflow", "--offline-steps 1e6"),
        ("gsflow", "--hidden-dims 64,64"),
        ("gsflow", "--normalize-obs maybe"),
        ("gsflow", "antmaze-large"),
        ("flowq", "--start-from run"),
        ("fmq", "--eval-modes best_of_n"),
        ("sac_flow", "--policy flow"),
        ("sac_flow", "--utd half"),
    ],
)
def test_flags_that_tyro_refuses(name, flags):
    """In a box of its own, which names the flag."""
    _, err = launch(script(name), *flags.split(), code=2)
    assert flags.split()[0] in err and "Traceback" not in err and os.listdir() == []


@pytest.mark.parametrize("out_dir", ["file/runs", "x" * 300])
def test_out_dir(tmp_path, out_dir):
    (tmp_path / "file").touch()
    err = refused("gsflow", *TOY, "--out-dir", out_dir)
    assert "cannot use" in err and "choose --out-dir" in err


def test_package_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "wandb" in refused("gsflow", *TOY, "--wandb-project", "mine")


TOY = ["--env-id", "multi-crescent", *TINY, "--offline-steps", 20, "--eval-interval", 20]


@pytest.mark.parametrize("name,flags", [("flowq", []), ("sac_flow", ["--env-id", "cube-double"])])
def test_no_such_device(name, flags):
    """As a process: JAX is asked for its devices once."""
    environment = os.environ | {"JAX_PLATFORMS": "nonsense"}
    _, err = finish(start(name, *flags, env=environment), code=2)
    assert err.startswith("error: JAX finds no device; see JAX_PLATFORMS: ")
    assert "'nonsense'" in err and err.count("\n") == 1 and os.listdir() == []


# ---- datasets ----
def d4rl(rows=40, **changes):
    """D4RL's layout: time-outs apart from terminals, no masks."""
    data = good_file(rows) | dict(rewards=np.zeros(rows), timeouts=np.zeros(rows))
    data |= dict(next_observations=data["observations"], terminals=np.zeros(rows))
    return {k: v for k, v in (data | changes).items() if k[0] != "q"}


ARRAYS = {  # of an .npz
    "nothing": ({}, "no 'terminals' in it"),
    "no rows": ({k: v[:0] for k, v in good_file().items()}, "'terminals' has shape (0,)"),
    "one row": ({k: v[:1] for k, v in good_file().items()}, "'terminals' has shape (1,)"),
    "objects": (good_file() | {"actions": np.full((40, 2), None)}, "allow_pickle"),
    "complex": (good_file() | {"observations": np.ones((40, 2), complex)}, "not floating point"),
    "images": (good_file() | {"observations": np.ones((40, 2, 2))}, "has shape (40, 2, 2)"),
    "text ends": (good_file() | {"terminals": np.full(40, "no")}, "'terminals' is not floating"),
    "dates": (good_file() | {"actions": np.zeros((40, 2), "M8[s]")}, "'actions' is not floating"),
    "text qpos": (good_file() | {"qpos": np.full((40, 2), "x")}, "'qpos' is not floating"),
    "time-outs": (d4rl(timeouts=np.zeros(39)), "'timeouts' has shape (39,)"),
    "NaN time-outs": (d4rl(timeouts=np.full(40, np.nan)), "'timeouts' is not floating"),
    "rewards": (d4rl(rewards=np.zeros((40, 1))), "'rewards' has shape (40, 1)"),
    "infinite rewards": (d4rl(rewards=np.full(40, np.inf)), "'rewards' is not floating"),
    "successors": (d4rl(next_observations=np.zeros((40, 3))), "another environment"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_a_dataset(name):
    arrays, message = ARRAYS[name]
    np.savez("mine.npz", **arrays)
    err = refused("gsflow", "--dataset", "mine.npz")
    assert "mine.npz" in err and message in err


def text_file(path):
    if path.suffix == ".hdf5":
        pytest.importorskip("h5py")  # not in requirements.txt; without it another sentence
    path.write_text("x,y\n1,2\n")


def array_file(path):
    with open(path, "wb") as file:
        np.save(file, np.zeros((40, 2)))


def cut_file(path):
    np.savez(path, **good_file())
    path.write_bytes(path.read_bytes()[:700])


def groups(path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        file.create_group("data/demo_0")["actions"] = np.zeros((40, 2))


def text_rows(path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for key, value in good_file().items():
            file[key] = value
        del file["actions"]
        file["actions"] = [b"left"] * 40


FILES = {
    "mine.csv": (text_file, "cannot read mine.csv"),
    "mine.npy": (array_file, "cannot read mine.npy"),
    "cut.npz": (cut_file, "cannot read cut.npz"),
    "text.hdf5": (text_file, "cannot read text.hdf5"),
    "groups.hdf5": (groups, "no 'terminals' in it"),
    "rows.h5": (text_rows, "'actions' has shape (40,)"),
    "folder.npz": (os.mkdir, "cannot read folder.npz"),
    "loop.npz": (lambda path: path.symlink_to(path), "cannot read loop.npz"),
}


@pytest.mark.parametrize("file", FILES)
def test_file_of_a_dataset(tmp_path, file):
    make, message = FILES[file]
    make(tmp_path / file)
    assert message in refused("gsflow", "--dataset", file)


def test_hdf5_without_its_package(tmp_path, monkeypatch):
    (tmp_path / "mine.hdf5").touch()
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert "pip install what lacks" in refused("fmq", "--dataset", "mine.hdf5")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
@pytest.mark.parametrize("what", ["dataset", "out_dir", "args.json"])
def test_permissions(tmp_path, what):
    path = own_dataset(tmp_path / "mine.npz") if what == "dataset" else tmp_path / "args.json"
    path.touch()
    (tmp_path if what == "out_dir" else path).chmod(0o500 if what == "out_dir" else 0)
    flags = {"dataset": ["--dataset", path], "out_dir": TOY, "args.json": ["--resume", tmp_path]}
    assert "ermission denied" in refused("gsflow", *flags[what])


# ---- run directories ----
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    launch(script("gsflow"), *TOY, out_dir=directory)
    return only_run(directory)


def rewrite(**changes):
    """Change args.json, as an editor would."""

    def damage(run):
        facts = json.loads((run / "args.json").read_text())
        facts["args"] |= changes
        (run / "args.json").write_text(json.dumps(facts))

    return damage


def retype(**changes):
    """The same by someone who knows what he does."""

    def damage(run):
        rewrite(**changes)(run)
        facts = json.loads((run / "args.json").read_text())
        del facts["args_crc32"]
        (run / "args.json").write_text(json.dumps(facts))

    return damage


def folder(name):
    def damage(run):
        (run / name).unlink()
        (run / name).mkdir()

    return damage


def other_seed(run):
    """The checkpoint of the same run with another seed."""
    tree, facts = script("gsflow").load_checkpoint(run)
    tree["state"]["seed"] = tree["state"]["seed"] + 1
    script("gsflow").save_checkpoint(run, tree, facts)


def other_method(run):
    tree, facts = script("gsflow").load_checkpoint(run)
    del tree["state"]["params"]["velocity"]
    script("gsflow").save_checkpoint(run, tree, facts)


def content(text):
    return lambda run: (run / "args.json").write_bytes(text)


def no_change(run):
    pass


MORE = "--resume run --offline-steps 40"
RUNS = {
    "a file": (no_change, "--resume run/checkpoint.msgpack", "is not a run directory"),
    "the directory of runs": (no_change, "--resume .", "is not a run directory"),
    "another seed": (no_change, "--evaluate run --num-seeds 2", "--num-seeds was 1"),
    "another task": (no_change, f"{MORE} --env-id pointmaze-medium", "--env-id was"),
    "other data": (no_change, f"{MORE} --dataset mine.npz", "--dataset was None"),
    "from too late": (no_change, "--start-from run", "is complete at step 20"),
    "no checkpoint": (
        lambda run: (run / "checkpoint.msgpack").unlink(), MORE, "no intact checkpoint.msgpack"
    ),
    "folder of arguments": (folder("args.json"), MORE, "is not a run directory"),
    "folder of parameters": (folder("checkpoint.msgpack"), MORE, "no intact checkpoint.msgpack"),
    "folder of metrics": (folder("metrics.csv"), MORE, "metrics.csv: Is a directory"),
    "empty arguments": (content(b""), MORE, "damaged or of another version"),
    "cut arguments": (content(b'{"algo": "gsflow", "args": {'), MORE, "damaged"),
    "a list of arguments": (content(b"[1, 2]"), MORE, "damaged or of another version"),
    "a number": (content(b"3"), MORE, "damaged or of another version"),
    "bytes": (content(b"\xff\xfe\x00"), MORE, "damaged or of another version"),
    "no arguments": (content(b'{"algo": "gsflow", "args": null}'), MORE, "damaged"),
    "older version": (content(b'{"algo": "gsflow", "args": {"seed": 0}}'), MORE, "('env_id')"),
    "another rate": (rewrite(learning_rate=1e-5), MORE, "args.json was changed"),
    "text for a number": (retype(batch_size="many"), MORE, "--batch-size is 'many'"),
    "unknown choice": (retype(prior="wavelet"), MORE, "--prior is 'wavelet'"),
    "no task": (retype(env_id="nowhere.py:x"), MORE, "cannot load nowhere.py"),
    "checkpoint of another seed": (other_seed, MORE, "['state']['seed'] is [1], not [0]"),
    "checkpoint of other networks": (other_method, MORE, "does not fit the arguments"),
    "seed, evaluated": (other_seed, "--evaluate run", "['seed'] is [1], not [0]"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")  # tyro's, of the default's type
@pytest.mark.parametrize("name", RUNS)
def test_run_directory(tmp_path, finished, name):
    damage, flags, message = RUNS[name]
    run = shutil.copytree(finished, tmp_path / "run")
    damage(run)
    before = sorted(os.listdir(run))
    assert message in refused("gsflow", *flags.split())
    assert sorted(os.listdir(run)) == before


@pytest.mark.parametrize("name", sorted({*SCRIPTS} - {"gsflow"}))
@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_run_of_another_script(finished, name, flag):
    assert "is a run of gsflow.py; use that script" in refused(name, flag, finished)


# ---- task files ----
HEAD = """
import gymnasium, jax, jax.numpy as jnp, numpy as np
from gymnasium.experimental.functional import FuncEnv

class Env(FuncEnv):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    max_episode_steps = 5
    def initial(self, rng, params=None): return jnp.zeros(2)
    def transition(self, s, a, rng=None, params=None): return s + a
    def observation(self, s, rng=None, params=None): return s
    def reward(self, s, a, next_s, rng=None, params=None): return 0.0
    def terminal(self, s, rng=None, params=None): return jnp.asarray(False)

def rows():
    flat, wide = np.zeros(40, np.float32), np.zeros((40, 2), np.float32)
    return dict(observations=wide, next_observations=wide, actions=wide, rewards=flat,
                masks=flat + 1, terminals=1.0 * (np.arange(40) % 10 == 9))

"""
RETURN = "def make_task(name, dataset_dir):\n    return dict("
TASKS = {
    "fails on import": ("1 / 0", "ZeroDivisionError in "),
    "unknown name": ("def make_task(name, dataset_dir):\n    return {}[name]", "KeyError in "),
    "other arguments": ("def make_task():\n    return {}", "TypeError"),
    "not callable": ("make_task = 3", "TypeError"),
    "nothing": (f"{RETURN}env=None)", "no auto environment"),
    "no step": ("Env.transition = None\n" + RETURN + "env=Env())", "does not work"),
    "no space": ("del Env.action_space\n" + RETURN + "env=Env())", "'action_space'"),
    "no limit": ("del Env.max_episode_steps\n" + RETURN + "env=Env())", "'max_episode_steps'"),
    "observations": (
        "Env.observation = lambda self, s, rng=None, params=None: jnp.zeros(3)\n"
        + RETURN + "env=Env())", "does not work"),
    "reward of two": (
        "Env.reward = lambda self, s, a, n, rng=None, params=None: a[5:9].reshape(7)\n"
        + RETURN + "env=Env())", "does not work"),
    "data alone": (RETURN + "env=Env(), data=rows)", "must return transitions and their source"),
    "no data": (RETURN + "env=Env(), data=lambda: None)", "must return transitions"),
    "list of data": (RETURN + "env=Env(), data=lambda: ([1, 2], 'mine'))", "must return"),
    "data fails": (RETURN + "env=Env(), data=lambda: [][3])", "IndexError"),
    "lacking key": (
        RETURN + "env=Env(), data=lambda: ({'observations': rows()['masks']}, 'mine'))",
        "no 'rewards' in it"),
    "text for steps": (
        RETURN + "env=Env(), defaults={'': dict(log_interval='many')})",
        "--log-interval is 'many': str"),
    "float for steps": (
        RETURN + "env=Env(), defaults={'': dict(log_interval=1e3)})",
        "--log-interval is 1000.0: float"),
    "number as simulator": (
        RETURN + "make_env=3, data=lambda: (rows(), 'mine'))", "TypeError"),
    "not a simulator": (
        RETURN + "make_env=object, data=lambda: (rows(), 'mine'))", "gymnasium.Env"),
    "simulator fails": (
        "def make():\n    raise RuntimeError('no licence')\n"
        + RETURN + "make_env=make, data=lambda: (rows(), 'mine'))", "no licence"),
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_task_file(tmp_path, name):
    text, message = TASKS[name]
    (tmp_path / "task.py").write_text(HEAD + text + "\n")
    assert message in refused("gsflow", "--env-id", "task.py:reach", "--offline-steps", 10)


@pytest.mark.parametrize("name", ["folder.py", "bytes.py"])
def test_not_a_task_file(tmp_path, name):
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "bytes.py").write_bytes(b"\x00\xff\x89PNG")
    assert f"cannot load {name}" in refused("sac_flow", "--env-id", f"{name}:x")


# ---- simulators ----
SIMULATOR = """
import gymnasium, numpy as np, multiprocessing, os, pathlib, signal

class Broken(Exception):
    def __init__(self, one, two):  # cannot travel between processes
        super().__init__(one)

class Env(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    steps = 0
    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}
    def step(self, action):
        self.steps += 1
        if self.steps == 30 and not pathlib.Path("mended").exists():
            if pathlib.Path("dies").exists() and multiprocessing.parent_process():
                os.kill(os.getpid(), signal.SIGKILL)
            raise Broken("the arm fell off", lambda: 0)
        return np.zeros(2, np.float32), 0.0, False, self.steps % 5 == 0, {"success": 0.0}

def make_task(name, dataset_dir):
    return dict(make_env=Env)
"""
ONLINE = "--env-id arm.py:arm --mode online --hidden-dim 8 --d-model 8 --critic-hidden-dims 8"
ONLINE += " --batch-size 8 --flow-steps 2 --learning-starts 10 --log-interval 10 --eval-episodes 1"
ONLINE += " --checkpoint-interval 20 --eval-interval 80 --online-steps 80 --target-entropy 0"


def fails_and_goes_on(tmp_path, messages, *flags):
    """The sentence names the simulator; the checkpoint before it continues to the end."""
    (tmp_path / "arm.py").write_text(SIMULATOR)
    _, err = launch(script("sac_flow"), *ONLINE.split(), *flags, code=2)
    run = only_run("runs")
    sentence = [line for line in err.splitlines() if line.startswith("error: simulator")]
    assert len(sentence) == 1 and "Traceback" not in err, err
    for message in (*messages, f"; --resume {run} goes on"):
        assert message in sentence[0]
    assert 0 < script("sac_flow").load_checkpoint(run)[1]["step"] < 80
    (tmp_path / "mended").touch()
    launch(script("sac_flow"), "--resume", run)
    assert json.loads((run / "result.json").read_text())["steps"] >= 80


@pytest.mark.slow
def test_simulator_that_raises(tmp_path):
    fails_and_goes_on(tmp_path, ["Broken in ", "arm.py:19: the arm fell off"])


@pytest.mark.slow
@pytest.mark.parametrize("dies", [False, True])
def test_simulator_in_a_process(tmp_path, dies):
    """It raises what cannot be pickled, or is killed: no hang, no traceback."""
    if dies:
        (tmp_path / "dies").touch()
    messages = ["(exit -9)"] if dies else ["(exit 0)", "arm.py:19: the arm fell off"]
    fails_and_goes_on(tmp_path, messages, "--num-envs", 2)
