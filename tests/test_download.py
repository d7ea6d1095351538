"""Tests of benchmark/download.py against a server on this machine, broken in several ways."""

import hashlib
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

BENCHMARK = Path(__file__).resolve().parent.parent / "benchmark"
sys.path.insert(0, str(BENCHMARK))
import download

NAME = "walker2d-medium-v2"
FILE = "walker2d_medium-v2.hdf5"
BODY = download.SIGNATURES[".hdf5"] + np.random.default_rng(0).bytes(300_000)


class Server(http.server.ThreadingHTTPServer):
    """Serves BODY at any path that `bodies` does not name; the first part of a path says how."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies, self.asked = {}, []  # path -> bytes; (method, path, Range)
        self.daemon_threads = True
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def address(self, path):
        return f"http://127.0.0.1:{self.server_port}/{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        how, _, _ = self.path[1:].partition("/")
        body = self.server.bodies.get(self.path[1:], BODY)
        span = self.headers.get("Range")
        self.server.asked.append((self.command, self.path[1:], span))
        if how == "missing":
            return self.send_error(404)
        if how == "hub":  # a hub's answer: elsewhere, with the checksum of what is there
            self.send_response(302)
            self.send_header("Location", self.path.replace("/hub", "/good", 1))
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(BODY).hexdigest()}"')
            self.send_header("Content-Length", "0")
            return self.end_headers()
        start = int(span[6:-1]) if span and how != "norange" else 0
        if start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if self.command == "GET":
            most = 100_000 if how in ("cuts", "norange") else len(body)
            self.wfile.write(body[start : start + most])


@pytest.fixture
def server(monkeypatch):
    """A server; D4RL's original and mirror, and OGBench's, point at it."""
    found = Server()
    d4rl = download.load_file(BENCHMARK / "tasks" / "d4rl.py")
    monkeypatch.setattr(d4rl, "URL", found.address("good"))
    monkeypatch.setattr(d4rl, "MIRROR", found.address("good/mirror"))
    yield found
    found.shutdown()
    found.server_close()


def point(monkeypatch, server, original, mirror="missing"):
    """Let D4RL's two addresses behave as their first path entries say."""
    d4rl = download.load_file(BENCHMARK / "tasks" / "d4rl.py")
    monkeypatch.setattr(d4rl, "URL", server.address(original))
    monkeypatch.setattr(d4rl, "MIRROR", server.address(mirror))
    return [f"{original}/gym_mujoco_v2/{FILE}", f"{mirror}/{FILE}"]


def fetch(directory, *names):
    return download.main([*(names or (f"d4rl/{NAME}",)), "--dataset-dir", str(directory)])


def parts(directory):
    return sorted(p.name for p in (directory / "d4rl").glob("*.part"))


def test_a_file_and_what_is_there_already(server, tmp_path, capsys):
    assert fetch(tmp_path) == 0
    assert (tmp_path / "d4rl" / FILE).read_bytes() == BODY
    assert os.listdir(tmp_path / "d4rl") == [FILE]
    requests = len(server.asked)
    assert fetch(tmp_path) == 0 and len(server.asked) == requests
    assert "already there (0.3 MB)" in capsys.readouterr().out


def test_the_mirror_comes_second(server, tmp_path, monkeypatch):
    original, mirror = point(monkeypatch, server, "missing", "good")
    assert fetch(tmp_path) == 0
    assert server.asked == [("GET", original, None), ("GET", mirror, None)]
    assert (tmp_path / "d4rl" / FILE).read_bytes() == BODY and parts(tmp_path) == []


def test_a_cut_connection_goes_on_by_itself(server, tmp_path, monkeypatch):
    original, _ = point(monkeypatch, server, "cuts")
    assert fetch(tmp_path) == 0
    assert (tmp_path / "d4rl" / FILE).read_bytes() == BODY
    ranges = [None, "bytes=100000-", "bytes=200000-", "bytes=300000-"]
    assert server.asked == [("GET", original, span) for span in ranges]


def test_a_second_run_goes_on_where_the_first_stopped(server, tmp_path, monkeypatch):
    original, _ = point(monkeypatch, server, "good")
    target = tmp_path / "d4rl" / FILE
    target.parent.mkdir()
    part = download.part_of(target, server.address(original))
    part.write_bytes(BODY[:123_456])
    assert fetch(tmp_path) == 0 and target.read_bytes() == BODY
    assert server.asked == [("GET", original, "bytes=123456-")]
    # all had come, but the name was not given yet
    target.unlink()
    part.write_bytes(BODY)
    assert fetch(tmp_path) == 0 and target.read_bytes() == BODY
    assert [method for method, *_ in server.asked[1:]] == ["GET", "HEAD"]
    # the file at that address is shorter now
    target.unlink()
    part.write_bytes(BODY + b"more")
    assert fetch(tmp_path) == 0 and target.read_bytes() == BODY
    assert os.listdir(target.parent) == [FILE]


def test_a_server_without_ranges_starts_over_and_is_given_up(server, tmp_path, monkeypatch, capsys):
    point(monkeypatch, server, "norange")
    assert fetch(tmp_path) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert f"only 100,000 of {len(BODY):,} bytes came" in err and "HTTP 404" in err
    assert not (tmp_path / "d4rl" / FILE).exists()
    assert [(tmp_path / "d4rl" / p).stat().st_size for p in parts(tmp_path)] == [100_000]
    assert [method for method, *_ in server.asked] == ["GET"] * 3  # twice, and the mirror


def test_the_hub_s_checksum_is_compared(server, tmp_path, monkeypatch, capsys):
    """It stands in the answer that redirects; a part goes on through the redirection too."""
    original, _ = point(monkeypatch, server, "hub")
    assert fetch(tmp_path) == 0 and (tmp_path / "d4rl" / FILE).read_bytes() == BODY
    (tmp_path / "d4rl" / FILE).unlink()
    part = download.part_of(tmp_path / "d4rl" / FILE, server.address(original))
    part.write_bytes(BODY[:7_000])
    assert fetch(tmp_path) == 0 and (tmp_path / "d4rl" / FILE).read_bytes() == BODY
    assert server.asked[-1] == ("GET", original.replace("hub", "good"), "bytes=7000-")
    (tmp_path / "d4rl" / FILE).unlink()
    wrong = BODY[:-1] + bytes([BODY[-1] ^ 1])
    server.bodies[f"good/gym_mujoco_v2/{FILE}"] = wrong
    assert fetch(tmp_path) == 2
    assert "SHA-256 is wrong" in capsys.readouterr().err
    assert os.listdir(tmp_path / "d4rl") == []


def test_what_is_no_dataset_is_refused(server, tmp_path, capsys):
    server.bodies[f"good/gym_mujoco_v2/{FILE}"] = b"<html>The server is down for repair.</html>"
    server.bodies[f"good/mirror/{FILE}"] = b"<html>Log in.</html>"
    assert fetch(tmp_path) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith(f"error: cannot download {FILE}") and err.count("not a .hdf5 file") == 2
    assert os.listdir(tmp_path / "d4rl") == []


def test_ogbench_has_two_files(server, tmp_path, monkeypatch):
    import ogbench.utils

    monkeypatch.setattr(ogbench.utils, "DATASET_URL", server.address("missing"))
    monkeypatch.setattr(download, "OGBENCH_MIRROR", server.address("good"))
    npz = download.SIGNATURES[".npz"] + b"zip"
    files = [f"cube-double-play-v0{suffix}.npz" for suffix in ("", "-val")]
    server.bodies |= {f"good/{file}": npz for file in files}
    assert fetch(tmp_path, "cube-double-task3") == 0
    assert sorted(os.listdir(tmp_path)) == sorted(files)
    assert [p for _, p, _ in server.asked if p.startswith("good")] == [f"good/{f}" for f in files]


def test_names(tmp_path):
    short = download.files_of("antmaze-large", tmp_path)
    for name in ("antmaze-large-navigate-v0", "antmaze-large-navigate-singletask-task2-v0"):
        assert download.files_of(name, tmp_path) == short
    assert [path.name for path, _ in short] == [
        "antmaze-large-navigate-v0.npz", "antmaze-large-navigate-v0-val.npz"
    ]  # fmt: skip
    assert short[0][1] == [
        "https://rail.eecs.berkeley.edu/datasets/ogbench/antmaze-large-navigate-v0.npz",
        "https://huggingface.co/datasets/zhouzypaul/ogbench_datasets/resolve/main/"
        "antmaze-large-navigate-v0.npz",
    ]


@pytest.mark.parametrize(
    ("names", "part"),
    [
        ((), "which dataset"),
        (("antmaze-lage",), "antmaze-large"),
        (("d4rl/antmaze-huge-v2",), "unknown D4RL task 'antmaze-huge-v2'"),
        (("HalfCheetah-v5",), "HalfCheetah"),
        (("d5rl/antmaze-large-play-v2",), "unknown suite 'd5rl'"),
        (("energy_toy/energy-toy",), "unknown suite 'energy_toy'"),
        ((f"d4rl/{NAME}", "qqq"), "unknown task 'qqq'"),  # before the first byte is fetched
    ],
)
def test_bad_names_get_one_sentence(names, part, server, tmp_path, capsys):
    assert download.main([*names, "--dataset-dir", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert part in err and err.startswith("error: ") and err.count("\n") == 1 and not out
    assert server.asked == [] and os.listdir(tmp_path) == []


def test_unwritable_directory(server, tmp_path, capsys):
    (tmp_path / "plain").write_text("a file")
    assert fetch(tmp_path / "plain") == 2
    err = capsys.readouterr().err
    assert "cannot write" in err and "--dataset-dir" in err and err.count("\n") == 1


def test_no_room(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: type("", (), {"free": 10}))
    assert fetch(tmp_path) == 2
    assert "no room for 0 MB" in capsys.readouterr().err
    assert os.listdir(tmp_path / "d4rl") == []


def test_two_downloads_of_one_file(server, tmp_path, monkeypatch, capsys):
    """The second says so at once and leaves the first one's part alone."""
    original, _ = point(monkeypatch, server, "good")
    part = download.part_of(tmp_path / "d4rl" / FILE, server.address(original))
    part.parent.mkdir()
    with open(part, "ab") as file:
        download.fcntl.flock(file, download.fcntl.LOCK_EX)
        file.write(BODY[:5])
        file.flush()
        assert fetch(tmp_path) == 2
    assert "another process is downloading" in capsys.readouterr().err
    assert part.read_bytes() == BODY[:5] and server.asked == []


def test_dry_run(server, tmp_path, monkeypatch, capsys):
    original, mirror = point(monkeypatch, server, "missing", "good")
    assert download.main([f"d4rl/{NAME}", "--dataset-dir", str(tmp_path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'd4rl' / FILE} (0.3 MB)" in out
    assert server.address(original) in out and server.address(mirror) in out
    assert {method for method, *_ in server.asked} == {"HEAD"} and os.listdir(tmp_path) == []


def test_as_a_program(tmp_path):
    arguments = [sys.executable, str(BENCHMARK / "download.py"), "d4rl/x-v2"]
    done = subprocess.run(
        [*arguments, "--dataset-dir", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
