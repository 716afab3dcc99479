"""Which projection is meant, what fits it, and how large it must be for an error."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ooc_ntk.errors import InputError
from ooc_ntk.planning.projection import (
    BACKENDS,
    KINDS,
    MOST_NONZEROS,
    SMALLEST_BLOCK,
    SPARSE_KINDS,
    EntryMoments,
    PilotMoments,
    Projection,
    check_smaller,
    fitting_dim,
    parsed_fields,
    sketch_digest,
)
from ooc_ntk.planning.projectionkind import PROJECTIONS

DENSE_KINDS = tuple(kind for kind in KINDS if kind not in SPARSE_KINDS)

# --- parsing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "dim"),
    [
        ("sjlt:10240", "sjlt", 10240),
        ("gaussian:64", "gaussian", 64),
        ("Rademacher:7", "rademacher", 7),
        (" shift : 4_096 ", "shift", 4096),
        ("tensorsketch:128", "tensorsketch", 128),
        ("4096", "sjlt", 4096),
    ],
)
def test_parsing(text, kind, dim):
    assert parsed_fields(text) == {"kind": kind, "dim": dim}
    found = Projection.parse(text, seed=3)
    assert (found.kind, found.dim, found.seed) == (kind, dim, 3)
    assert Projection.parse(found.text, seed=3) == found


def test_a_kind_alone_has_no_dim():
    assert parsed_fields("shift") == {"kind": "shift"}
    found = Projection.parse("gaussian", target_error=0.1)
    assert (found.kind, found.dim, found.target_error, found.text) == ("gaussian", None, 0.1, "gaussian")


def test_options_win_over_the_text():
    assert Projection.parse("sjlt:64", dim=32).dim == 32


@pytest.mark.parametrize(
    "text", ["", "  ", ":", "sjlt:many", "sjlt:64:4", "4096 sjlt", "sjlt:-64", "sjlt:6.4", "sjlt:_6"]
)
def test_what_cannot_be_read(text):
    with pytest.raises(
        InputError, match=r"cannot read the projection .*; write kind:dim, for example sjlt:4096"
    ) as got:
        Projection.parse(text)
    assert repr(text) in str(got.value)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "nonzeros"), [("sjlt", 4), ("shift", 4), ("rademacher", 0), ("gaussian", 0), ("tensorsketch", 32)]
)
def test_the_default_of_nonzeros(kind, nonzeros):
    assert Projection(kind, 128).nonzeros == nonzeros
    assert Projection(kind, 128).block == 128 // max(1, nonzeros)


def test_nonzeros_that_are_chosen():
    found = Projection("sjlt", 96, nonzeros=8)
    assert (found.nonzeros, found.block) == (8, 12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "sjtl", "dim": 64}, "unknown projection 'sjtl'; did you mean 'sjlt'?"),
        ({"kind": "gauss", "dim": 64}, "unknown projection 'gauss'; did you mean 'gaussian'?"),
        ({"dim": 64, "backend": "nunba"}, "unknown backend 'nunba'; did you mean 'numba'?"),
        ({"dim": 0}, "projection dim must be a whole number from 1 on, got 0"),
        ({"dim": -64}, "projection dim must be a whole number from 1 on, got -64"),
        ({"dim": 64.0}, "projection dim must be a whole number from 1 on, got 64.0"),
        ({"dim": True}, "projection dim must be a whole number from 1 on, got True"),
        ({"dim": "64"}, "projection dim must be a whole number from 1 on, got '64'"),
        ({"dim": 64, "seed": -1}, "projection seed must be a whole number from 0 on, got -1"),
        ({"dim": 64, "seed": 2**64}, f"projection seed must be a whole number from 0 on, got {2**64}"),
        ({"dim": 64, "seed": None}, "projection seed must be a whole number from 0 on, got None"),
        ({"dim": 64, "seed": 1.5}, "projection seed must be a whole number from 0 on, got 1.5"),
        ({"dim": 64, "nonzeros": -4}, "projection nonzeros must be a whole number from 0 on, got -4"),
        ({"dim": 64, "nonzeros": False}, "projection nonzeros must be a whole number from 0 on, got False"),
        ({"dim": 4 * 33, "nonzeros": 33}, "nonzeros must be at most 32, got 33"),
        ({"kind": "tensorsketch", "dim": 64, "nonzeros": 1}, "a tensorsketch needs at least 2 nonzeros"),
        ({"kind": "gaussian", "dim": 64, "nonzeros": 4}, "a gaussian projection is dense and has no nonzeros, got"),
        ({"kind": "rademacher", "dim": 64, "nonzeros": 1}, "a rademacher projection is dense and has no nonzeros"),
        ({}, "projection 'sjlt' needs a size: write sjlt:4096 (dim=4096), or ask for an error with target_error=0.02"),
        ({"kind": "gaussian"}, "projection 'gaussian' needs a size: write gaussian:4096"),
        ({"dim": 64, "target_error": 0.1}, "give either dim=64 or target_error=0.1, not both"),
        ({"target_error": 0.0}, "target_error must lie between 0 and 1, got 0.0"),
        ({"target_error": 1.0}, "target_error must lie between 0 and 1, got 1.0"),
        ({"target_error": -0.1}, "target_error must lie between 0 and 1, got -0.1"),
        ({"target_error": float("nan")}, "target_error must lie between 0 and 1, got nan"),
    ],
)
def test_what_is_refused(fields, message):
    with pytest.raises(InputError) as got:
        Projection(**fields)
    assert message in str(got.value)


@pytest.mark.parametrize(
    ("kind", "dim", "nonzeros", "near"),
    [
        ("sjlt", 1023, 0, 1024),
        ("sjlt", 1021, 0, 1020),
        ("sjlt", 3, 0, 16),
        ("sjlt", 12, 0, 16),
        ("shift", 50, 8, 48),
        ("shift", 8, 8, 32),
        ("tensorsketch", 1000, 0, 992),
        ("tensorsketch", 64, 0, 128),
    ],
)
def test_a_dim_that_does_not_fit_is_told_the_nearest(kind, dim, nonzeros, near):
    with pytest.raises(InputError) as got:
        Projection(kind, dim, nonzeros=nonzeros)
    each = nonzeros or PROJECTIONS.get(kind).nonzeros
    said = f"a {kind} projection with {each} non-zeros has a dim that is a multiple of {each}, at least {4 * each}, "
    assert str(got.value) == f"{said}got {dim}; the nearest is {near}"
    assert Projection(kind, near, nonzeros=nonzeros).dim == near


@pytest.mark.parametrize("seed", [0, 2**32, 2**64 - 1])
@pytest.mark.parametrize("kind", KINDS)
def test_seeds_of_64_bits(kind, seed):
    assert Projection(kind, 128, seed).seed == seed


def test_it_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Projection("sjlt", 64).dim = 32


# --- what fits -------------------------------------------------------------------------------------------------------


def _fits(kind, dim, nonzeros):
    """By trying."""
    try:
        Projection(kind, dim, nonzeros=nonzeros)
    except InputError:
        return False
    return True


@settings(max_examples=200, deadline=None)
@given(kind=st.sampled_from(KINDS), dim=st.integers(1, 2000) | st.integers(1, 2**40), nonzeros=st.integers(2, 32))
def test_the_fitting_dim_fits_and_nothing_nearer_does(kind, dim, nonzeros):
    nonzeros = nonzeros if kind in SPARSE_KINDS else 0
    near = fitting_dim(kind, dim, nonzeros)
    assert _fits(kind, near, nonzeros)
    for other in range(max(1, dim - abs(near - dim) + 1), dim + abs(near - dim)):
        assert not _fits(kind, other, nonzeros), f"{other} is nearer to {dim} than {near}"
    assert fitting_dim(kind, near, nonzeros) == near


@settings(max_examples=100, deadline=None)
@given(kind=st.sampled_from(SPARSE_KINDS), dim=st.integers(1, 400), nonzeros=st.integers(2, MOST_NONZEROS))
def test_what_fits_is_whole_blocks(kind, dim, nonzeros):
    assert _fits(kind, dim, nonzeros) == (dim % nonzeros == 0 and dim // nonzeros >= SMALLEST_BLOCK)


@pytest.mark.parametrize(("dim", "columns"), [(64, 64), (4096, 1234), (1_000_000, 999_999)])
def test_a_projection_that_is_not_smaller(dim, columns):
    with pytest.raises(InputError) as got:
        check_smaller(dim, columns)
    said = (
        f"a projection to {dim:,} columns is not smaller than the {columns:,} parameters: the exact kernel is cheaper"
    )
    assert str(got.value).startswith(said)
    assert "choose a smaller dim" in str(got.value)


def test_a_projection_that_is_smaller():
    check_smaller(63, 64)


# --- what features share ---------------------------------------------------------------------------------------------

#: Ingredients of a digest, and for each another one.
PROJECTION = Projection("sjlt", 64, seed=5)
INGREDIENTS = {
    "kind": (dataclasses.replace(PROJECTION, kind="shift"), ("a",), ("a", "b"), "model"),
    "dim": (dataclasses.replace(PROJECTION, dim=128), ("a",), ("a", "b"), "model"),
    "seed": (dataclasses.replace(PROJECTION, seed=6), ("a",), ("a", "b"), "model"),
    "high word of the seed": (dataclasses.replace(PROJECTION, seed=5 + 2**32), ("a",), ("a", "b"), "model"),
    "nonzeros": (dataclasses.replace(PROJECTION, nonzeros=8), ("a",), ("a", "b"), "model"),
    "structured": (PROJECTION, (), ("a", "b"), "model"),
    "another structured": (PROJECTION, ("b",), ("a", "b"), "model"),
    "names": (PROJECTION, ("a",), ("a",), "model"),
    "order of names": (PROJECTION, ("a",), ("b", "a"), "model"),
    "structured that is a name": (PROJECTION, (), ("a", "a", "b"), "model"),
    "model": (PROJECTION, ("a",), ("a", "b"), "mode"),
}


def test_the_digest_changes_with_every_ingredient():
    found = [sketch_digest(PROJECTION, ("a",), ("a", "b"), "model")]
    found += [sketch_digest(*each) for each in INGREDIENTS.values()]
    assert len(set(found)) == len(found), dict(zip(("given", *INGREDIENTS), found, strict=True))
    assert all(len(digest) == 32 and set(digest) <= set("0123456789abcdef") for digest in found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_digest_does_not_depend_on_what_computes_it(backend):
    other = dataclasses.replace(PROJECTION, backend=backend)
    assert sketch_digest(other, ("a",), ("b",), "model") == sketch_digest(PROJECTION, ("a",), ("b",), "model")


# --- the size for an error -------------------------------------------------------------------------------------------

SAMPLES, OUTPUTS, PARAMETERS = 7, 3, 11


def _jacobian(seed=0, mean=0.5):
    """(samples, outputs, parameters) with a mean, so that blocks of different samples have something in common."""
    generator = np.random.default_rng(seed)
    return generator.normal(size=(SAMPLES, OUTPUTS, PARAMETERS)) + mean * generator.normal(size=(OUTPUTS, PARAMETERS))


def _lost(jacobian, i, j):
    """``Σ_p (Σ_c J_icp J_jcp)²``, parameter by parameter."""
    return sum(float(jacobian[i, :, p] @ jacobian[j, :, p]) ** 2 for p in range(jacobian.shape[2]))


def _brute(jacobian, *, signs=False):
    """``Σ_ij dim·SE_ij² / ‖K‖²_F``, entry by entry from the blocks ``F_ij`` (DESIGN §9)."""
    count, variance, norm = len(jacobian), 0.0, 0.0
    for i in range(count):
        for j in range(count):
            f_ii, f_jj = jacobian[i] @ jacobian[i].T, jacobian[j] @ jacobian[j].T
            f_ij = jacobian[i] @ jacobian[j].T
            variance += float((f_ii * f_jj).sum() + np.trace(f_ij @ f_ij))
            variance -= 2 * _lost(jacobian, i, j) if signs else 0.0
            norm += float(np.trace(f_ij)) ** 2
    return variance / norm


def _pilot(jacobian, chosen, *, signs=False):
    """Exact moments of some samples."""
    own = np.stack([jacobian[i] @ jacobian[i].T for i in chosen])
    between = {(i, j): jacobian[i] @ jacobian[j].T for i in chosen for j in chosen}

    def means(value):
        mine = [value(i, i) for i in chosen]
        others = [value(i, j) for i, j in itertools.permutations(chosen, 2)]
        return float(np.mean(mine)), float(np.mean(others)) if others else 0.0

    traces = means(lambda i, j: np.trace(between[i, j] @ between[i, j]))
    squares = means(lambda i, j: np.trace(between[i, j]) ** 2)
    heavy = means(lambda i, j: _lost(jacobian, i, j)) if signs else (0.0, 0.0)
    blocks = means(lambda i, j: (between[i, i] * between[j, j]).sum())[1]
    own_blocks = float(np.square(own).sum((1, 2)).mean())
    return PilotMoments(
        EntryMoments(own_blocks + traces[0] - 2 * heavy[0], squares[0]),
        EntryMoments(blocks + traces[1] - 2 * heavy[1], squares[1]),
    )


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_all_samples_as_pilot_give_the_sum_over_all_entries(seed, signs):
    jacobian = _jacobian(seed)
    found = _pilot(jacobian, range(SAMPLES), signs=signs)
    wanted = _brute(jacobian, signs=signs)
    assert found.relative_variance(SAMPLES) == pytest.approx(wanted, rel=1e-12)
    assert found.error(50, SAMPLES) == pytest.approx((wanted / 50) ** 0.5, rel=1e-12)
    twice = dataclasses.replace(found, inflation=2.0)
    assert twice.relative_variance(SAMPLES) == pytest.approx(2 * wanted, rel=1e-12)


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_pilots_of_some_samples_are_right_on_average(size, signs):
    """The mean over every choice of samples is exact, as means over pairs of different samples are unbiased.

    The norm of the kernel is given them, so that the quotient is an average as well.
    """
    jacobian = _jacobian(2)
    every = _pilot(jacobian, range(SAMPLES), signs=signs)
    pilots = []
    for chosen in itertools.combinations(range(SAMPLES), size):
        found = _pilot(jacobian, chosen, signs=signs)
        parts = {
            name: dataclasses.replace(getattr(found, name), square=getattr(every, name).square)
            for name in ("diagonal", "others")
        }
        pilots.append(dataclasses.replace(found, **parts))
    found = np.mean([pilot.relative_variance(SAMPLES) for pilot in pilots])
    assert found == pytest.approx(_brute(jacobian, signs=signs), rel=1e-12)


def test_a_pilot_tells_more_samples_than_it_saw():
    """Half of the samples tell what the brute sum over all of them gives."""
    generator = np.random.default_rng(3)
    few = generator.normal(size=(60, OUTPUTS, PARAMETERS)) + generator.normal(size=(OUTPUTS, PARAMETERS))
    found = _pilot(few[:30], range(30)).relative_variance(60)
    assert found == pytest.approx(_brute(few), rel=0.1)


def test_a_pilot_of_one_sample():
    jacobian = _jacobian(4)[:1]
    found = _pilot(jacobian, [0])
    assert found.relative_variance(1) == pytest.approx(_brute(jacobian), rel=1e-12)


def test_entries_of_one_sample_are_counted_as_such():
    """Of a full kernel, 3 samples of 4 outputs: 12 rows, 36 pairs of outputs of one sample, 96 of different ones."""
    parts = EntryMoments(2.0, 3.0), EntryMoments(5.0, 0.5), EntryMoments(7.0, 0.25)
    found = PilotMoments(*parts, outputs=4)
    wanted = (12 * 2 + 36 * 7 + 96 * 5) / (12 * 3 + 36 * 0.25 + 96 * 0.5)
    assert found.relative_variance(12) == pytest.approx(wanted, rel=1e-12)
    assert found.relative_variance(4) == pytest.approx((4 * 2 + 12 * 7) / (4 * 3 + 12 * 0.25), rel=1e-12)


def test_estimated_squares_below_zero_do_not_hide_the_error():
    found = PilotMoments(EntryMoments(1.0, 1.0), EntryMoments(1.0, -0.001))
    assert found.relative_variance(10**6) == pytest.approx(10**6)


def test_a_kernel_of_zeros_has_no_error():
    nothing = PilotMoments(EntryMoments(0, 0), EntryMoments(0, 0))
    assert nothing.error(64, 100) == 0
    assert nothing.dim_for(Projection("sjlt", target_error=0.1), 100) == 16
    assert nothing.dim_for(Projection("gaussian", target_error=0.1), 100) == 1


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    nonzeros=st.integers(2, MOST_NONZEROS),
    target=st.floats(0.005, 0.9),
    blocks=st.floats(0.1, 50),
    samples=st.integers(1, 10_000),
)
def test_the_dim_for_an_error_is_the_smallest_that_fits(kind, nonzeros, target, blocks, samples):
    """Its error is below the target, that of the next smaller one is not; both within rounding of a float64."""
    nonzeros = nonzeros if kind in SPARSE_KINDS else 0
    moments = PilotMoments(EntryMoments(2 * blocks + 3.0, 4.0), EntryMoments(blocks + 1.5, 2.0))
    projection = Projection(kind, target_error=target, nonzeros=nonzeros)
    dim = moments.dim_for(projection, samples)
    assert _fits(kind, dim, nonzeros)
    assert moments.error(dim, samples) <= target * (1 + 1e-9)
    smaller = dim - max(1, nonzeros)
    assume(smaller > 0 and _fits(kind, smaller, nonzeros))
    assert moments.error(smaller, samples) > target * (1 - 1e-9)


@pytest.mark.parametrize("kind", DENSE_KINDS)
@pytest.mark.parametrize("wanted", [100.0, 100.0005, 100.0011, 100.5, 100.9995])
def test_the_dim_for_an_error_between_two_whole_numbers(kind, wanted):
    """Just above a whole number as well."""
    moments = PilotMoments(EntryMoments(wanted / 4, 1), EntryMoments(0, 0))
    projection = Projection(kind, target_error=0.5)
    dim = moments.dim_for(projection, 1)
    assert moments.error(dim, 1) <= 0.5
    assert moments.error(dim - 1, 1) > 0.5
