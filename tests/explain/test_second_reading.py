"""Collectives of large programs, read a second time by patterns over lines, which share nothing with `jaxpar._hlo`.

A collective is known here by its channel and the loop that it is in: XLA:TPU repeats one in each fusion that carries
it.
"""

import collections
import lzma
import math
import pathlib
import re

import pytest

from jaxpar import _hlo

DATA = pathlib.Path(__file__).parents[1] / "data"
HARD = {"v5e_128b_x1", "tpu_dynwhile"}  # gathers carried through inner loops; an end that is no constant
FILES = sorted([*DATA.glob("step_time/*.hlo.xz"), *DATA.glob("hlo/tpu_*.txt")])
FILES = [file for file in FILES if file.name.partition(".")[0] not in HARD]

KINDS = re.compile("all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute")
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")
LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
NAME = re.compile(r"%([\w.\-]+)")


def bodies_of(text):
    """The lines of each computation as (name, shape, opcode, rest), and which is the entry."""
    bodies, current, entry = {}, [], ""
    for line in text.splitlines():
        if head := HEAD.match(line):
            current = bodies.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif found := LINE.match(line):
            current.append(found.groups())
    return bodies, entry


def num_bytes(shape, opcode):
    """What a collective results in; of a `-start`, which also names what it takes, the larger: what it gives."""
    shape = re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", shape)
    several = opcode == "all-reduce-start" or not opcode.endswith("-start")
    groups = [shape] if several else re.findall(r"\([^()]+\)", shape[1:-1]) or shape.split(", ")
    return max(sum(map(bytes_of, re.findall(r"(\w+)\[([\d,]*)\]", group))) for group in groups)


def bytes_of(array):
    dtype, dims = array
    return WIDTHS[dtype] * math.prod(map(int, filter(None, dims.split(","))))


def constant(name, body):
    """The number that `name` is, through copies."""
    lines = {line[0]: line for line in body}
    while name in lines and lines[name][2] in ("copy", "bitcast"):
        name = NAME.search(lines[name][3])[1]
    is_number = name in lines and lines[name][2] == "constant"
    return int(lines[name][3].split(")")[0]) if is_number else None


def trips(call, body, bodies):
    """How often a `while` runs: what the compiler wrote, or the counter's start, step and end."""
    if written := re.search(r'known_trip_count":\{"n":"(\d+)"', call):
        return int(written[1])
    condition = bodies[re.search(r"condition=%?([\w.\-]+)", call)[1]]
    inside = bodies[re.search(r"body=%?([\w.\-]+)", call)[1]]
    counter, end = NAME.findall(condition[-1][3])[:2]
    (index,) = (int(rest.split("index=")[1].split(",")[0]) for name, _, _, rest in condition if name == counter)
    (start,) = (line[3] for line in body if line[0] == NAME.search(call)[1])
    (after,) = (line[3] for line in inside if line[0] == NAME.findall(inside[-1][3].split("), ")[0])[index])
    step = next(filter(None, (constant(name, inside) for name in NAME.findall(after))), 1)
    first = constant(NAME.findall(start.split("), ")[0])[index], body) or 0
    return math.ceil((constant(end, condition) - first) / step)


def second_reading(text):
    """Bytes a step by kind: of what is gathered, permuted or exchanged, and of what goes into a reduction."""
    bodies, entry = bodies_of(text)
    channels, todo = {}, [(entry, 1, entry)]
    while todo:
        name, times, home = todo.pop()
        for _, shape, opcode, rest in bodies[name]:
            kind = KINDS.fullmatch(opcode.removesuffix("-start"))
            if kind:
                key = kind[0], home, re.search(r"channel_id=(\d+)", rest)[1]
                channels[key] = max(channels.get(key, 0), times * num_bytes(shape, opcode))
            elif opcode == "while":
                often = times * trips(rest, bodies[name], bodies)
                todo += [(each, often, each) for each in re.findall(r"(?:body|condition)=%?([\w.\-]+)", rest)]
            elif opcode in ("fusion", "call", "async-start"):
                todo += [(each, times, home) for each in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", rest)]
    totals = collections.Counter()
    for (kind, _, _), size in channels.items():
        totals[kind] += size
    return totals


def first_reading(text):
    totals = collections.Counter()
    for each in _hlo.read(text).collectives(_hlo.MeshAxes(names=(), sizes=())):
        spelt = "all-reduce" if "all-reduce" in each.spelling else KINDS.search(each.spelling)[0]
        totals[spelt] += each.bytes * (each.count or 1)
    return totals


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name.partition(".")[0])
def test_two_readings_agree(file):
    text = lzma.decompress(file.read_bytes()).decode() if file.suffix == ".xz" else file.read_text()
    assert first_reading(text) == second_reading(text)
    assert sum(first_reading(text).values()) > 0
