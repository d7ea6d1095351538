"""What XLA makes of one dispatch: kernels, products, loops, host transfers, memory. Runs nothing.

    python benchmark/hlo.py                    # every method at its paper's settings, this machine
    python benchmark/hlo.py --target h100      # compiled for an H100, which need not be there
    python benchmark/hlo.py --methods GSFlow --hlo-dir /tmp/hlo     # and the programs as text

The programs are the ones that training runs: the scripts' own `Program`, many updates in one
dispatch; rows "online" also act, step a JAX environment and store. Counted in the optimised HLO:

  fusions, products    instructions of the program, wherever they stand
  loops known          loops whose number of iterations XLA knows
  loops unknown        the others: before each iteration a GPU's host waits for the predicate; one
                       is the dispatch's own, whose length is an argument
  branches             conditionals: here, too, the host waits
  host                 infeeds, outfeeds, sends, receives, callbacks, buffers in host memory
  calls                custom calls that are neither products nor callbacks
  launches             instructions that launch something, per update: a loop's once per iteration
                       (unknown: one), a conditional's on all branches
  GFLOP                of the products, per update, counted in the same way
  MiB                  arguments, results and temporaries of a dispatch, dataset left out

--target h100 needs no GPU, but JAX's CUDA plugin: pip install jax-cuda12-plugin==VERSION
jax-cuda12-pjrt==VERSION nvidia-cuda-nvcc-cu12, VERSION being JAX's; without its library cuBLAS and
without autotuning, products are Triton kernels, and how fast they are is not to be seen here.
"""

import collections
import dataclasses
import math
import re
import sys
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import speed
import tyro

H100 = """gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  device_memory_size: 84929347584 memory_bandwidth: 3352320000000
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 7 } runtime_version { major: 12 minor: 9 }"""
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True)
class Args:
    methods: tuple[str, ...] = ()  # rows of these only (default: all whose script is here)
    target: Literal["here", "h100"] = "here"  # compile for this machine or for an H100
    num_seeds: int = 1  # vmapped seeds
    tiny: bool = False  # tiny networks
    hlo_dir: str | None = None  # also write each program's text into this directory


# ---- reading HLO ----
class Instruction(NamedTuple):
    """A line of the text: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes

    def attribute(self, name):
        """The computations that an attribute names."""
        found = re.search(rf"\b{name}=(?:{{([^}}]*)}}|%?([\w.-]+))", self.rest)
        return re.findall(r"[\w.-]+", found[1] or found[2]) if found else []


LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while")
FREE += ("conditional", "call", "partition-id", "replica-id", "opt-barrier", "iota", "domain")
HOST = ("infeed", "outfeed", "send", "recv", "send-done", "recv-done")


def read(text):
    """HLO text -> ({computation: instructions}, the name of the one where it starts)."""
    computations, entry = {}, None
    for line in text.splitlines():
        if head := re.match(r"^(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            own = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif found := LINE.match(line):
            own.append(Instruction(*found.groups()))
    return computations, entry


def trip_count(loop):
    """Iterations of a while instruction, or None."""
    found = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
    return int(found[1]) if found else None


def executed(computations, entry):
    """Yield (instruction, its computation, how often it runs, whether inside of a fusion); loops of
    unknown length run once, and all branches are taken."""

    def visit(name, times, fused):
        for x in (own := computations[name]):
            yield x, own, times, fused
            if x.opcode == "while":
                inner = times * (trip_count(x) or 1)
                yield from visit(x.attribute("body")[0], inner, fused)
                yield from visit(x.attribute("condition")[0], inner, fused)
            elif x.opcode == "conditional":
                names = ("branch_computations", "true_computation", "false_computation")
                for branch in (b for n in names for b in x.attribute(n)):
                    yield from visit(branch, times, fused)
            elif x.opcode in ("call", "async-start"):
                for called in x.attribute("to_apply") + x.attribute("calls"):
                    yield from visit(called, times, fused)
            elif x.opcode == "fusion":
                yield from visit(x.attribute("calls")[0], times, True)

    return visit(entry, 1, False)


def is_product(x):
    target = call_target(x)
    return x.opcode in ("dot", "convolution") or bool(re.search("gemm|matmul|conv", target))


def call_target(x):
    found = re.search(r'custom_call_target="([^"]*)"', x.rest)
    return found[1] if x.opcode == "custom-call" and found else ""


def is_host(x):
    on_host = x.opcode not in ("tuple", "get-tuple-element", "while") and ":S(5)" in x.shape
    return x.opcode in HOST or "callback" in call_target(x) or on_host


def product_flops(x, computation):
    """2 x size of the result x contracted sizes of a dot; a library's product says its dimensions
    in its configuration. A convolution counts as nothing: there are none."""
    sizes = lambda shape: [int(n) for n in re.search(r"\[([\d,]*)\]", shape)[1].split(",") if n]
    dims = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', x.rest)
    if not dims:
        return 0
    left = re.search(r"%?([\w.-]+)[,)]", x.rest)[1]
    left = sizes(next(y.shape for y in computation if y.name == left))
    contracted = math.prod(left[int(i)] for i in re.findall(r"\d+", dims[1]))
    return 2 * math.prod(sizes(x.shape)) * contracted


def count(text, updates=1):
    """Counts of a program's HLO text, see above; `updates`: those in one iteration of its loop."""
    computations, entry = read(text)
    seen, total = {}, collections.Counter()
    for x, own, times, fused in executed(computations, entry):
        seen[x.name] = x  # names are unique in a program
        launched = not fused and x.opcode not in FREE
        total["launches"] += times * launched / updates
        if is_product(x):
            total["flops"] += times * product_flops(x, own) / updates
    loops = [trip_count(x) for x in seen.values() if x.opcode == "while"]
    calls = [x for x in seen.values() if x.opcode == "custom-call"]
    return dict(
        fusions=sum(x.opcode == "fusion" for x in seen.values()),
        products=sum(map(is_product, seen.values())),
        known=len(loops) - loops.count(None),
        unknown=loops.count(None),
        branches=sum(x.opcode == "conditional" for x in seen.values()),
        host=sum(map(is_host, seen.values())),
        calls=sum(not is_product(x) and not is_host(x) for x in calls),
        launches=round(total["launches"]),
        flops=total["flops"],
    )


# ---- programs ----
def abstract(tree, device):
    """Shapes in place of arrays, on a device that need not be there."""
    place = jax.sharding.SingleDeviceSharding(device)
    struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    return jax.tree.map(struct, tree)


def target_device(target):
    if target == "here":
        return jax.devices()[0]
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")  # what is computed on the way
    names = dict(platform="cuda", topology="1x1x1", target_config=H100)
    return topologies.get_topology_desc("", **names).devices[0]


def compile_program(program, carry, device):
    """The executable of a dispatch of the script's `Program`; on a CPU without the slow passes of
    LLVM, which come after all that is counted here."""
    carry, n, inputs = (abstract(x, device) for x in (carry, jnp.int32(1), program.inputs))
    layout = jax.tree.map(lambda x: x.sharding, carry)
    dispatch = jax.jit(program.repeat, donate_argnums=0, out_shardings=layout)
    options = FAST if device.platform == "cpu" else None
    return dispatch.lower(carry, n, *inputs).compile(compiler_options=options)


def measure(name, bench, device):
    """Counts of one method, with its sizes in MiB."""
    program, carry, updates = speed.dispatch(name, bench.tiny, num_seeds=bench.num_seeds)
    data = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.inputs))
    params = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(carry["state"].params))
    executable = compile_program(program, carry, device)
    if bench.hlo_dir:
        file = Path(bench.hlo_dir) / f"{name.replace(' ', '_').lower()}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(executable.as_text())
    memory = executable.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak += memory.temp_size_in_bytes - data
    return count(executable.as_text(), updates) | dict(params=params / 2**20, peak=peak / 2**20)


COLUMNS = dict(
    fusions="fusions", products="products", known="loops known", unknown="loops unknown",
    branches="branches", host="host", calls="calls", launches="launches", flops="GFLOP",
    params="parameters, MiB", peak="MiB",
)  # fmt: skip


def main(bench):
    known = speed.known_dispatches()
    if unknown := set(bench.methods) - set(known):
        print(f"error: no method {', '.join(unknown)}; there are: {', '.join(known)}")
        return 2
    try:
        device = target_device(bench.target)
    except NotImplementedError:
        version = jax.__version__
        print(f"error: --target h100 needs: pip install jax-cuda12-plugin=={version} "
              f"jax-cuda12-pjrt=={version} nvidia-cuda-nvcc-cu12")  # fmt: skip
        return 2
    print(f"compiled for {device.device_kind}, jax {jax.__version__}, {bench.num_seeds} seed(s)\n")
    print("| program | " + " | ".join(COLUMNS.values()) + " |")
    print("|---" * (1 + len(COLUMNS)) + "|")
    for name in bench.methods or known:
        values = measure(name, bench, device)
        values["flops"] = values["flops"] / 1e9
        cells = [f"{v:.3g}" if isinstance(v, float) else f"{v:,}" for v in map(values.get, COLUMNS)]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
