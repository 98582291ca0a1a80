"""What pictures say must be so: which device holds which tile is compared with what JAX does with the arrays."""

import importlib.util
import json
import sys
import time
import xml.etree.ElementTree as ET

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import jaxpar as jp
from jaxpar import _draw, _palette
from jaxpar._draw_grid import Side, as_text
from models.gpt import llama_70b

RULES = {"column": ["up*"], "row": ["down"]}


def parameters():
    """Two matrices and a vector."""
    return {"up": jnp.ones((64, 256)), "down": jnp.ones((256, 16)), "bias": jnp.ones((256,))}


@pytest.fixture(scope="module")
def plan():
    return jp.plan(parameters, jp.mesh(data=2, fsdp=2, tensor=2), [jp.DP(), jp.FSDP(), jp.TP(**RULES)])


STRATEGIES = {
    "data": ({"data": 8}, [jp.DP()]),
    "zero": ({"data": 8}, [jp.ZeRO(1)]),
    "fsdp": ({"fsdp": 8}, [jp.FSDP()]),
    "tensor": ({"tensor": 8}, [jp.TP(**RULES)]),
    "fsdp, tensor": ({"fsdp": 4, "tensor": 2}, [jp.FSDP(), jp.TP(**RULES)]),
    "all": ({"data": 2, "fsdp": 2, "tensor": 2}, [jp.DP(), jp.FSDP(), jp.TP(**RULES)]),
}


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("path", ["up", "down", "up_thin", "bias"])
def test_tiles_are_where_jax_puts_them(name, path):
    axes, strategies = STRATEGIES[name]
    plan = jp.plan(lambda: {**parameters(), "up_thin": jnp.ones((3, 2048))}, jp.mesh(**axes), strategies)
    record = plan.find(path)
    for panel in _draw._panels(plan, record):
        spec = getattr(record, panel.fields[0])
        held = plan.sharding(spec).devices_indices_map(record.shape)
        tiles = {device.id: tuple(part.indices(size)[:2] for part, size in zip(at, record.shape, strict=True))
                 for device, at in held.items()}  # fmt: skip
        assert tiles == drawn_tiles(panel.grid, record.shape)
        assert all(panel.grid.num_copies == list(tiles.values()).count(tile) for tile in tiles.values())


def drawn_tiles(grid, shape):
    """Each device with the first and the last index of its tile along each dim, read off the picture."""
    sides = [grid.rows, grid.columns][-len(shape) :]
    found = {}
    for row in grid.rows.parts():
        for column in grid.columns.parts():
            tile = [
                flat(part, side, size)
                for part, side, size in zip([row, column][-len(shape) :], sides, shape, strict=True)
            ]
            found |= dict.fromkeys(grid.holders(row, column), tuple(tile))
    return found


def flat(part, side, size):
    sizes = [number for _, number in side.cuts]
    place = int(np.ravel_multi_index(part, sizes)) if sizes else 0
    step = size // int(np.prod(sizes, dtype=int))
    return place * step, (place + 1) * step


def test_devices_are_numbered_as_in_the_mesh():
    devices = np.array(jax.devices())[::-1].reshape(4, 2)
    mesh = Mesh(devices, ("fsdp", "tensor"))
    plan = jp.plan(parameters, mesh, [jp.FSDP(), jp.TP(**RULES)])
    (panel, _) = _draw._panels(plan, plan.find("up"))
    assert panel.grid.holders((0,), (0,)) == [7]
    assert panel.grid.holders((3,), (1,)) == [0]


def test_text(plan):
    lines = str(plan.draw("up")).splitlines()
    assert lines[12:27] == [
        "up  float32 64×256, 64.0 KiB",
        "  stored, gradient, optimiser state: [fsdp, tensor]  16.0 KiB a device",
        "    rows 64 = fsdp 2 × 32, columns 256 = tensor 2 × 128",
        "    ┌──────┬──────┐",
        "    │ 0, 4 │ 1, 5 │",
        "    ├──────┼──────┤",
        "    │ 2, 6 │ 3, 7 │",
        "    └──────┴──────┘",
        "    2 copies: data 2",
        "  used: [-, tensor]  32.0 KiB a device",
        "    rows 64, columns 256 = tensor 2 × 128",
        "    ┌────────────┬────────────┐",
        "    │ 0, 2, 4, 6 │ 1, 3, 5, 7 │",
        "    └────────────┴────────────┘",
        "    4 copies: data 2 × fsdp 2",
    ]
    assert lines[27] == "  all-gather weight over fsdp 32.0 KiB, forward pass"
    assert len(lines) - 27 == len(plan.follow("up").moves)


def test_overview_has_the_mesh_and_the_largest_leaves(plan):
    text = str(plan.draw())
    assert text.index("mesh  cpu:8") < text.index("\nup  ") < text.index("\ndown  ")
    assert text.endswith("and 1 smaller leaves, 1.2% of the bytes: plan.draw(path) draws any")


def test_unknown_path(plan):
    with pytest.raises(jp.ShardingError) as error:
        plan.draw("upp")
    assert str(error.value) == "upp: the plan has no such leaf. Did you mean 'up'? See plan.records for its 3 paths."


@pytest.mark.parametrize("shape", [(), (8,), (3, 3, 64, 128), (64, 8, 16)], ids=str)
def test_any_number_of_dims(shape):
    """A scalar, a vector, a convolution, heads."""
    plan = jp.plan(lambda: {"w": jnp.ones((64, 64)), "x": jnp.ones(shape)}, jp.mesh(fsdp=8), [jp.FSDP()])
    assert ET.fromstring(_draw.scenes.svg(plan.draw("x").scene, alone=True)).tag.endswith("svg")
    assert "×".join(map(str, shape)) in str(plan.draw("x"))


def test_one_device():
    plan = jp.plan(parameters, jp.mesh(data=1, allow_unused=True), [jp.DP()])
    assert "│ 0 │" in str(plan.draw("up"))


def test_equal_layers_fold():
    def factory():
        return {"blocks": [{"q": jnp.ones((64, 64)), "k": jnp.ones((64, 64)), "v": jnp.ones((64, 64))}] * 3}

    plan = jp.plan(factory, jp.mesh(fsdp=8), [jp.FSDP()])
    assert "blocks.[0-2].k, blocks.[0-2].q and 1 more  float32 64×64, 9 of these, 16.0 KiB each" in str(plan.draw())


@pytest.fixture(scope="module")
def large():
    return llama_70b().on(jp.mesh("v5p:8x16x16", data=4, fsdp=256, tensor=2)).plan


def test_large_plan_is_drawn_at_once(large):
    begin = time.process_time()
    drawing = large.draw()
    svg = _draw.scenes.svg(drawing.scene, alone=True)
    assert time.process_time() - begin < 1
    assert len(svg) < 200_000
    assert max(map(len, drawing.text.splitlines())) < 150
    assert "80 layers stacked, one is drawn" in drawing.text
    assert "1024 copies: data 4 × fsdp 256" in drawing.text


def test_large_png_fits_in_a_notebook(large):
    data, metadata = large.draw()._repr_mimebundle_()
    assert data["image/png"].startswith(b"\x89PNG")
    assert len(data["image/png"]) * 4 / 3 + len(json.dumps(data["text/plain"])) < 200_000
    assert metadata["image/png"].keys() == {"width", "height"}


@pytest.mark.parametrize(("cuts", "most", "expected"), [
    ((("fsdp", 8),), 10, [(place,) for place in range(8)]),
    ((("fsdp", 256),), 16, [(0,), (1,), (2,), (3,), (None,), (255,)]),
    ((("data", 2), ("fsdp", 64)), 8, [(0, 0), (0, 1), (0, None), (0, 63), (1, 0), (1, 1), (1, None), (1, 63)]),
], ids=str)  # fmt: skip
def test_many_parts_fold(cuts, most, expected):
    assert Side(caption="", cuts=cuts, most=most).parts() == expected


def test_folded_text(large):
    assert as_text(_draw._mesh_grid(large))[1:5] == [
        "│  0   │  1   │",
        "│  2   │  3   │",
        "│  ⋮   │  ⋮   │",
        "│ 510  │ 511  │",
    ]


def test_save(plan, tmp_path):
    drawing = plan.draw()
    for ending in ("png", "svg", "html"):
        drawing.save(tmp_path / f"plan.{ending}")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert ET.parse(tmp_path / "plan.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    page = (tmp_path / "plan.html").read_text()
    assert "<svg" in page
    assert "<script" not in page
    assert "src=" not in page
    with pytest.raises(
        jp.ShardingError, match=r"plan\.jpg: a picture is written as \.png, \.svg or \.html, not '\.jpg'\."
    ):
        drawing.save(tmp_path / "plan.jpg")


def test_without_matplotlib(plan, tmp_path, monkeypatch):
    """Text, SVG and HTML are there; a PNG says what is missing; a notebook shows HTML."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    for module in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    drawing = plan.draw()
    data, _ = drawing._repr_mimebundle_()
    assert data.keys() == {"text/plain", "text/html"}
    drawing.save(tmp_path / "plan.svg")
    with pytest.raises(ModuleNotFoundError) as error:
        drawing.save(tmp_path / "plan.png")
    assert str(error.value) == (
        "a PNG is painted by matplotlib, which is not installed: pip install 'jaxpar[notebook]'. Or save the picture "
        "as .svg or .html, which need nothing."
    )


def test_an_axis_keeps_its_colour():
    every = _palette.hues(["data", "fsdp", "tensor", "context", "expert", "pipe", "x", "y"])
    assert len(set(every.values())) == 8
    for axis in ("data", "fsdp", "tensor"):
        assert _palette.hues([axis])[axis] == every[axis]
    assert _palette.hues(["x", "y"]) == _palette.hues(["y", "x"])


def test_html_table_says_what_the_text_says(plan):
    page = plan._repr_mimebundle_()["text/html"]
    tree = ET.fromstring(page.replace("<br>", "<br/>"))
    rows = [["".join(cell.itertext()) for cell in row] for row in tree.iter("tr")]
    assert rows[0] == ["path", "shape", "spec", "per device", "decided by", "moves a step"]
    assert [row[:4] for row in rows[1:]] == [
        ["bias", "float32 256", "whole", "1.0 KiB"],
        ["down", "float32 256x16", "[tensor, fsdp]", "4.0 KiB"],
        ["up", "float32 64x256", "[fsdp, tensor]", "16.0 KiB"],
    ]
    assert _palette.hues(["fsdp"])["fsdp"] in page
    assert "<script" not in page


def test_html_life_says_what_the_text_says(plan):
    story = plan.follow("up")
    tree = ET.fromstring(story._repr_mimebundle_()["text/html"])
    said = [" ".join("".join(cell.itertext()) for cell in row) for row in tree.iter("tr")]
    assert said == [" ".join(line.split()) for line in str(story).splitlines()[1:]]


def test_optimizer_state_apart_from_the_parameters():
    plan = jp.plan(parameters, jp.mesh(data=8), [jp.ZeRO(1)], optimizer=optax.adam(1e-3))
    stored, state = _draw._panels(plan, plan.find("up"))
    assert (stored.title, stored.grid.num_copies) == ("stored, used, gradient", 8)
    assert (state.title, state.grid.num_copies) == ("optimiser state", 1)
