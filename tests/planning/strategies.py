"""Random workloads, limits and layouts for Hypothesis."""

from hypothesis import strategies as st

from ooc_ntk.planning.budget import Limits
from ooc_ntk.planning.workload import Derivation, ParameterBlock, Workload

MIB = 2**20


def blocks_of(sizes):
    """Blocks of two parameters each (one where only one column is left), of the given sizes."""
    found, start = [], 0
    for index, size in enumerate(sizes):
        names = (f"layer{index}.weight", f"layer{index}.bias") if size > 1 else (f"layer{index}.weight",)
        found.append(ParameterBlock(f"layer{index}", names, start, start + size))
        start += size
    return tuple(found)


def sizes_of(blocks):
    """Scalars of every parameter: all but one in the weight, one in the bias."""
    sizes = {}
    for block in blocks:
        if len(block.parameters) == 2:
            sizes[block.parameters[0]] = block.columns - 1
            sizes[block.parameters[1]] = 1
        else:
            sizes[block.parameters[0]] = block.columns
    return sizes


def small_workload(**changes):
    """A trace kernel of 200 samples and 50,000 parameters; any field may be changed."""
    sizes = changes.pop("sizes", (30_000, 20_000))
    fields = {
        "kernel": "trace",
        "train_samples": 200,
        "test_samples": 0,
        "outputs": 4,
        "rows_per_sample": 4,
        "entries_per_sample": 1,
        "blocks": blocks_of(sizes),
        "sample_bytes": 1000,
        "baseline_bytes": 200 * MIB,
        "model_bytes": 4 * sum(sizes),
        "derivation": Derivation("loop", 8, 0.01, 0.004, 4 * MIB, MIB),
    }
    return Workload(**{**fields, **changes})


def ample(**changes):
    """Limits that nothing here exceeds."""
    return Limits(**{"host": 2**40, "device": 2**40, "disk": 2**44, **changes})


@st.composite
def workloads(draw, largest=300):
    """Workloads of up to ``largest`` train samples, on the CPU or a GPU."""
    kernel = draw(st.sampled_from(["trace", "pseudo", "output:0", "full"]))
    outputs = draw(st.integers(1, 12))
    rows = outputs if kernel in ("trace", "full") else 1
    sizes = draw(st.lists(st.integers(1, 60_000), min_size=1, max_size=5))
    chain = draw(st.floats(1e-5, 0.1))
    return Workload(
        kernel=kernel,
        train_samples=draw(st.integers(1, largest)),
        test_samples=draw(st.integers(0, largest // 2)),
        outputs=outputs,
        rows_per_sample=rows,
        entries_per_sample=outputs if kernel == "full" else 1,
        blocks=blocks_of(sizes),
        sample_bytes=draw(st.integers(1, 10**6)),
        baseline_bytes=draw(st.integers(100 * MIB, 600 * MIB)),
        model_bytes=4 * sum(sizes),
        derivation=Derivation(
            method=draw(st.sampled_from(["loop", "vmap"])),
            batch_size=draw(st.integers(1, 64)),
            seconds_per_sample=chain + draw(st.floats(0, 0.1)),
            chain_seconds_per_sample=chain,
            working_bytes=draw(st.integers(0, 50 * MIB)),
            activation_bytes=draw(st.integers(0, 10 * MIB)),
        ),
        precision=draw(st.sampled_from(["float32", "float64"])),
        device=draw(st.sampled_from(["cpu", "cuda"])),
        seed=draw(st.integers(0, 2**64 - 1)),
    )


@st.composite
def limits_around(draw, workload):
    """Limits from far too small to ample: a share of what the workload is made of, on top of the process itself."""
    share = draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 2.0, 100.0]))
    jacobian, kernel = workload.jacobian_bytes, workload.kernel_bytes
    host = workload.baseline_bytes + draw(st.sampled_from([0, 60, 80, 200])) * MIB + int(share * jacobian)
    disk = draw(st.sampled_from([1, 3, 2**24])) * MIB + int(draw(st.sampled_from([0.5, 1.5, 4.0])) * kernel)
    device = (
        workload.model_bytes
        + int(draw(st.sampled_from([0.0, 0.1, 1.0, 10.0])) * jacobian)
        + draw(st.sampled_from([0, 100])) * MIB
    )
    return Limits(host=host, device=device, disk=disk)
