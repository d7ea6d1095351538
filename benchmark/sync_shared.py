"""Copy the shared blocks of one script into the others, or say where they differ.

    python benchmark/sync_shared.py gsflow     # edit algos/gsflow.py first, then this
    python benchmark/sync_shared.py --check    # exit code 1 where a block is not the same

A block stands between "# ==== shared: NAME ====" and "# ==== end shared: NAME ====". A script has
those blocks that it uses; the ones of the same name are the same to the byte.
"""

import re
import sys
from pathlib import Path

ALGOS = Path(__file__).resolve().parent.parent / "algos"
BLOCK = re.compile(r"^# ==== shared: (.+?) ====\n.*?^# ==== end shared: \1 ====\n", re.S | re.M)


def blocks(text):
    """{name: text} of the shared blocks of a script."""
    return {match[1]: match[0] for match in BLOCK.finditer(text)}


def differences():
    """(block, first script that has it, another whose text differs) for all such pairs."""
    first, found = {}, []
    for path in sorted(ALGOS.glob("*.py")):
        for name, text in blocks(path.read_text()).items():
            script, expected = first.setdefault(name, (path.name, text))
            if text != expected:
                found.append((name, script, path.name))
    return found


def main(arguments):
    """Run the command line -> exit code."""
    if arguments == ["--check"]:
        found = differences()
        for name, one, other in found:
            print(f"block '{name}' differs between {one} and {other}")
        return int(bool(found))
    source = ALGOS / f"{arguments[0].removesuffix('.py')}.py" if len(arguments) == 1 else None
    if source is None or not source.is_file():
        names = ", ".join(sorted(path.stem for path in ALGOS.glob("*.py")))
        print(f"error: give --check or the script to copy from: {names}", file=sys.stderr)
        return 2
    wanted = blocks(source.read_text())
    for path in sorted(ALGOS.glob("*.py")):
        text = path.read_text()
        new = BLOCK.sub(lambda match: wanted.get(match[1], match[0]), text)
        if new != text:
            path.write_text(new)
            print(f"{path.name}: blocks copied from {source.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
