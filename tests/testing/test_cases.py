"""Which meshes and which combinations a parametrised test runs on."""

import itertools

import pytest

from jaxpar.testing import mesh_shapes, pairwise


@pytest.mark.parametrize(
    ("axes", "devices", "count"), [(("a",), 8, 1), (("a", "b"), 8, 4), (("a", "b", "c"), 8, 10), (("a", "b"), 12, 6)]
)
def test_all_factorisations(axes, devices, count):
    shapes = mesh_shapes(axes, devices)
    assert len(shapes) == count == len(set(shapes))
    for shape in shapes:
        sizes = list(shape.values())
        assert tuple(shape) == axes
        assert int(__import__("math").prod(sizes)) == devices


@pytest.mark.parametrize("shape", mesh_shapes(("data", "fsdp"), 4))
def test_the_names_of_tests_say_the_shape(shape, request):
    assert request.node.name.endswith(f"[data{shape['data']}-fsdp{shape['fsdp']}]")


@pytest.mark.parametrize(("axes", "devices"), [((), 8), (("a", "a"), 8), (("a",), 0)])
def test_meshes_that_cannot_be(axes, devices):
    with pytest.raises(ValueError, match="mesh_shapes"):
        mesh_shapes(axes, devices)


def covered(rows):
    return {((i, row[i]), (j, row[j])) for row in rows for i, j in itertools.combinations(range(len(row)), 2)}


@pytest.mark.parametrize("sizes", [(2, 2), (3, 4), (2, 2, 2), (6, 10, 4), (3, 3, 3, 3), (1, 5, 1)])
def test_every_pair_is_covered(sizes):
    factors = [[f"{name}{index}" for index in range(size)] for name, size in zip("abcd", sizes, strict=False)]
    rows = pairwise(*factors)
    assert covered(rows) == covered(itertools.product(*factors))
    largest = sorted(sizes)[-2:]
    assert largest[0] * largest[1] <= len(rows) <= 1.5 * largest[0] * largest[1] + 2
    assert rows == pairwise(*factors)


def test_only_what_makes_sense():
    makes_sense = lambda a, b, c: not (a == 0 and b == 0) and c != 2
    rows = pairwise(range(3), range(3), range(3), where=makes_sense)
    assert all(makes_sense(*row) for row in rows)
    assert covered(rows) == covered(row for row in itertools.product(range(3), repeat=3) if makes_sense(*row))
    with pytest.raises(ValueError, match="allows no combination"):
        pairwise([1], [2], where=lambda *_: False)


def test_values_need_not_be_hashable():
    assert pairwise([{"a": 1}], [[2], [3]]) == [({"a": 1}, [2]), ({"a": 1}, [3])]
    assert pairwise([1, 2]) == [(1,), (2,)]


@pytest.mark.parametrize("factors", [(), ([],), ([1], [])])
def test_factors_without_values(factors):
    with pytest.raises(ValueError, match="each needs one"):
        pairwise(*factors)
