"""Download datasets of OGBench, D4RL and RoboMimic, with a bar; a cut download goes on.

    python benchmark/download.py antmaze-large d4rl/antmaze-large-play-v2 robomimic/can-mh
    python benchmark/download.py antmaze-large --dry-run       what it would fetch, and how large

Names are those of --env-id: OGBench's (both files of a dataset, training and validation) and
SUITE/NAME, whose addresses and paths the task file benchmark/tasks/SUITE.py knows. Each file is
tried at its original address, then at a copy on the Hugging Face hub. What has arrived is kept as
`FILE.<code of the address>.part` and the same command goes on from there; FILE appears only when
its length, its first bytes and, where the hub publishes one, its SHA-256 are right.
"""

import dataclasses
import errno
import fcntl
import hashlib
import http.client
import importlib.util
import re
import shutil
import sys
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple

import tyro
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
OGBENCH_MIRROR = "https://huggingface.co/datasets/zhouzypaul/ogbench_datasets/resolve/main"
SIGNATURES = {".npz": b"PK\x03\x04", ".hdf5": b"\x89HDF\r\n\x1a\n"}
TIMEOUT = 20  # seconds without an answer
BLOCK = 1 << 20  # bytes


@dataclasses.dataclass(frozen=True)
class Args:
    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Tasks: antmaze-large, cube-double-task3, d4rl/pen-human-v1, robomimic/can-mh, ..."""
    dataset_dir: str = "~/.ogbench/data"
    """As the scripts' flag: OGBench's directory, from which each suite derives its own."""
    dry_run: bool = False
    """Only print each file, its size where a server tells it, and its addresses."""


class UserError(Exception):
    """Something the user can mend; shown as one sentence, exit code 2."""


class Cut(Exception):
    """The connection ended too early."""


# ---- names ----


def load_file(path: Path):
    """Import a Python file by its path, once."""
    name = f"cleanflow_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def files_of(name: str, dataset_dir: str) -> list[tuple[Path, list[str]]]:
    """The files of a task: (path, addresses in the order in which they are tried)."""
    suite, slash, task = name.partition("/")
    if slash:
        file = HERE / "tasks" / f"{suite}.py"
        module = load_file(file) if file.is_file() else None
        if not (hasattr(module, "url") and hasattr(module, "path")):
            raise UserError(f"unknown suite '{suite}' of '{name}'; there are d4rl and robomimic")
        try:
            return [(module.path(task, dataset_dir), module.url(task))]
        except ValueError as e:
            raise UserError(str(e)) from e
    from ogbench.utils import DATASET_URL

    script = load_file(HERE.parent / "algos" / "gsflow.py")
    stem = name.removesuffix("-v0")  # of a dataset, antmaze-large-navigate-v0, which is no task
    try:
        dataset = script.parse_task(name if "singletask" in name else stem).dataset
    except script.UserError as e:
        raise UserError(str(e)) from e
    if not dataset:
        raise UserError(f"{name} is a task without data")
    directory = Path(dataset_dir).expanduser()
    files = (f"{dataset}.npz", f"{dataset}-val.npz")
    return [(directory / f, [f"{DATASET_URL}/{f}", f"{OGBENCH_MIRROR}/{f}"]) for f in files]


# ---- one request ----


class Redirects(urllib.request.HTTPRedirectHandler):
    """Keep the hub's checksum, which stands in the answer that sends us on."""

    def redirect_request(self, request, file, code, message, headers, new_url):
        new = super().redirect_request(request, file, code, message, headers, new_url)
        if new is not None:
            new.checksum = checksum(headers) or getattr(request, "checksum", None)
            request.checksum = new.checksum
        return new


def checksum(headers) -> str | None:
    """The SHA-256 of a file in the hub's answer, if it names one."""
    tag = headers.get("X-Linked-Etag", "").strip('"')
    return tag if re.fullmatch("[0-9a-f]{64}", tag) else None


class Answer(NamedTuple):
    """What a server says about a file before its bytes come."""

    response: http.client.HTTPResponse
    start: int  # position of the first byte that comes
    total: int | None  # length of the whole file
    sha256: str | None


def ask(address: str, start: int = 0, method: str = "GET") -> Answer:
    """Request a file from byte `start` on; urllib's errors (OSError) where that is refused."""
    headers = {"User-Agent": "CleanFlow"} | ({"Range": f"bytes={start}-"} if start else {})
    request = urllib.request.Request(address, headers=headers, method=method)
    response = urllib.request.build_opener(Redirects).open(request, timeout=TIMEOUT)
    sha256 = getattr(request, "checksum", None) or checksum(response.headers)
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    if response.status == 206 and span:
        return Answer(response, int(span[1]), int(span[2]), sha256)
    length = response.headers.get("Content-Length")  # the server ignores ranges, or none was asked
    return Answer(response, 0, length and int(length), sha256)


# ---- one file ----


def part_of(target: Path, address: str) -> Path:
    """Where what came from an address is kept: never mixed with what came from another."""
    return target.with_name(f"{target.name}.{zlib.crc32(address.encode()):08x}.part")


def receive(address: str, part: Path, target: Path):
    """Bring `part` to its full length, from where it ends, and check it; OSError or Cut."""
    with open(part, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(f"another process is downloading {target}") from e
        try:
            answer = ask(address, file.tell())
        except urllib.error.HTTPError as e:
            if e.code != 416 or not file.tell():
                raise
            answer = ask(address, method="HEAD")  # nothing is left to come, or the file changed
            if answer.total == file.tell():
                return check(part, target, answer)
            answer = ask(address)
        if answer.start > file.tell():
            raise OSError("the server answers with another part than was asked for")
        file.truncate(answer.start)
        with answer.response:
            left = (answer.total or 0) - answer.start
            if left > shutil.disk_usage(part.parent).free:
                if not answer.start:
                    part.unlink()
                raise UserError(f"no room for {left / 1e6:,.0f} MB in {part.parent}")
            bar = tqdm(
                total=answer.total, initial=answer.start, desc=target.name, unit="B",
                unit_scale=True, unit_divisor=1000,
            )  # fmt: skip
            with bar:
                try:
                    while block := answer.response.read(BLOCK):
                        file.write(block)
                        bar.update(len(block))
                except (http.client.IncompleteRead, ConnectionError, TimeoutError) as e:
                    file.write(getattr(e, "partial", b""))
                    raise Cut("the connection was cut") from e
        file.flush()
        if answer.total is not None and file.tell() < answer.total:
            raise Cut(f"only {file.tell():,} of {answer.total:,} bytes came")
        check(part, target, answer)


def check(part: Path, target: Path, answer: Answer):
    """Compare a complete file with what is known of it; OSError, and it is gone, where it differs.

    Its length too: a part can be longer than the file is now.
    """
    with open(part, "rb") as file:
        head = file.read(8)
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest() if answer.sha256 else None
    signature = SIGNATURES.get(target.suffix, b"")
    if answer.total not in (None, part.stat().st_size):
        wrong = "its length is wrong"
    elif not head.startswith(signature):
        wrong = f"what came is not a {target.suffix} file"
    elif sha256 != answer.sha256:
        wrong = "its SHA-256 is wrong"
    else:
        return
    part.unlink()
    raise OSError(wrong)


def download(target: Path, addresses: list[str]):
    """Fetch one file from the first address that gives it whole."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        failures = []
        for address in addresses:
            part = part_of(target, address)
            if failure := attempt(address, part, target):
                failures.append(f"{address}: {failure}")
                continue
            part.replace(target)
            for other in addresses:
                part_of(target, other).unlink(missing_ok=True)
            return
    except OSError as e:
        raise UserError(f"cannot write {target} ({e.strerror or e}); give --dataset-dir") from e
    raise UserError(f"cannot download {target.name} ({'; '.join(failures)})")


def attempt(address: str, part: Path, target: Path) -> str | None:
    """Fetch `part` from one address, going on as long as each connection brings something.

    Returns what went wrong, or None; OSError where the disk is to blame.
    """
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            return receive(address, part, target)
        except Cut as e:
            failure = str(e)
            if part.stat().st_size > before:
                continue
        except urllib.error.HTTPError as e:
            failure = f"HTTP {e.code} {e.reason}"
        except urllib.error.URLError as e:
            failure = str(e.reason)
        except http.client.HTTPException as e:
            failure = repr(e)
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EACCES, errno.EISDIR, errno.EROFS, errno.EDQUOT):
                raise
            failure = str(e)
        if part.exists() and not part.stat().st_size:
            part.unlink()
        return failure


# ---- command line ----


def describe(target: Path, addresses: list[str]):
    """Print a file, its size where a server tells it, and its addresses."""
    size = "size unknown"
    for address in addresses:
        try:
            answer = ask(address, method="HEAD")
        except (OSError, http.client.HTTPException):
            continue
        answer.response.close()
        if answer.total:
            size = f"{answer.total / 1e6:,.1f} MB"
            break
    print(f"{target} ({'already there' if target.exists() else size})")
    print(*(f"  {address}" for address in addresses), sep="\n")


def run(args: Args):
    if not args.names:
        raise UserError("which dataset? For example: python benchmark/download.py antmaze-large")
    files = {}
    for name in args.names:  # every name is looked at before the first byte is fetched
        files |= dict(files_of(name, args.dataset_dir))
    for target, addresses in files.items():
        if args.dry_run:
            describe(target, addresses)
        elif target.exists():
            print(f"{target}: already there ({target.stat().st_size / 1e6:,.1f} MB)")
        else:
            download(target, addresses)
            print(f"{target}: {target.stat().st_size / 1e6:,.1f} MB")


def main(argv: list[str] | None = None) -> int:
    args = tyro.cli(Args, args=argv, description=__doc__)
    try:
        run(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except ImportError as e:
        print(f"error: {e}; pip install -r requirements.txt", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
