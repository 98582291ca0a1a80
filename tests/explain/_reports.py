"""Reports made by hand for tests: the times are invented, sizes and counts are those of real programs."""

from jaxpar.explain import Finding, Flops, Memory, Report, Timeline
from jaxpar.explain._collectives import Row
from jaxpar.explain._memory import Held
from jaxpar.explain._timeline import Event, OpTime

MIB = 2**20
GIB = 2**30


def row(kind="all-gather", axes=("fsdp",), size=64 * MIB, count=1, **fields):
    """A collective; its times follow from its size."""
    group = {"fsdp": 256, "tensor": 8, "data": 2}
    share = 1 - 1 / group.get(axes[0], 8)
    wire = int(size * share * (2 if kind == "all-reduce" else 1))
    seconds = fields.pop("seconds", wire / 90e9)
    return Row(
        **{
            "kind": kind,
            "spelling": kind,
            "axes": axes,
            "bytes": size,
            "wire_bytes": wire,
            "algorithm": "ring over 2 links",
            "count": count,
            "depth": 0,
            "conditional": False,
            "path": "",
            "source": "",
            "expected": None,
            "seconds": seconds,
            "exposed_seconds": 0.1 * seconds * (count or 1),
            "name": f"{kind}.1",
            **fields,
        }
    )


def decoder_16b():
    """A 15.9B decoder, pure FSDP over 256 v5e chips, layers scanned: the worked case, its times invented."""
    layers = 48
    leaves = ("attn.q", "attn.k", "attn.v", "attn.o")
    scanned = [
        row(
            count=layers,
            depth=1,
            path=f"blocks.each.{leaf}.kernel",
            source="decoder.py:112",
            expected=f"weight, {when}",
            name=f"all-gather.{when[0]}{index}",
        )
        for when in ("forward pass of each layer", "backward pass of each layer, which computes the block again")
        for index, leaf in enumerate(leaves)
    ]
    scattered = [
        row(
            "reduce-scatter",
            count=layers,
            depth=1,
            path=f"blocks.each.{leaf}.kernel",
            source="decoder.py:112",
            spelling="fusion all-reduce-scatter",
            expected="gradient, backward pass of each layer",
            name=f"fusion.{index}",
        )
        for index, leaf in enumerate(leaves)
    ]
    ends = [
        row(size=262_144_000, path="embed.embedding", source="decoder.py:40", expected="weight, forward pass"),
        row(size=262_144_000, path="head.kernel", source="decoder.py:61", expected="weight, forward pass"),
        row("reduce-scatter", size=262_144_000, path="head.kernel", expected="gradient, backward pass"),
        row("all-reduce", size=8192, path="norm.scale", source="decoder.py:58", expected="gradient, backward pass"),
        row("all-reduce", size=4, source="train.py:33", expected="sum of the loss"),
        row("all-reduce", size=88, source="train.py:41", expected="norm of the gradients"),
        row(
            "all-gather",
            size=48 * MIB,
            count=layers,
            depth=1,
            source="decoder.py:77",
            expected="",
            path="blocks.each.attn",
        ),
    ]
    total, exposed = 10.1, 1.25
    compute = total - exposed
    return Report(
        name="train_step",
        hardware="TPU v5e 16x16, 256 chips",
        target="v5e:16x16",
        axes={"data": 1, "fsdp": 256},
        num_devices=256,
        compiler="XLA:TPU, jax 0.10.2, libtpu 0.0.42",
        options={"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"},
        strategies=("FSDP(blocks='blocks.*')",),
        num_tokens=6 * 2048 * 256,
        peak_flops=197e12,
        compile_seconds=38.2,
        memory=memory_16b(),
        flops=Flops(
            model=3.11e17,
            model_causal=2.98e17,
            hardware=4.02e17,
            by_path=tuple(
                (f"blocks.each.{leaf}", 8.2e16 - 1e15 * i)
                for i, leaf in enumerate(("mlp.up", "mlp.down", "attn.q", "attn.o"))
            )
            + (("head", 5.9e16), ("embed", 2.1e16)),
            by_dtype=(("bf16", 4.0e17), ("f32", 2e15)),
        ),
        timeline=Timeline(
            step_seconds=total,
            compute_seconds=compute,
            communication_seconds=6.9,
            exposed_communication_seconds=exposed,
            bubble_seconds=0.0,
            low=9.3,
            high=11.2,
            events=tuple(events_16b(total)),
            ops=(
                OpTime(
                    computation="body", name="fusion.1", seconds=0.07, count=96, flops=1e12, bytes=1e8, origin="cycles"
                ),
                OpTime(
                    computation="body", name="custom.1", seconds=0.04, count=48, flops=1e12, bytes=1e8, origin="kernel"
                ),
            ),
            exposed={("body", "all-gather.f0"): 0.31},
            transfers={("body", "all-gather.f0"): (7.4e-4, 66_846_720, "ring over 2 links")},
            notes=("the links of a 16x16 torus are taken to be free of other traffic",),
        ),
        collectives=(*scanned, *scattered, *ends),
        findings=(
            Finding(
                kind="gathered-whole",
                severity="warning",
                reason="an activation of 48.0 MiB is gathered over fsdp in each of 48 layers.",
                place="blocks.each.attn, decoder.py:77",
                remedy='Constrain it where it is made: jp.constrain(x, "batch", "seq", "heads").',
                seconds=0.026,
            ),
            Finding(
                kind="unused-axis",
                severity="note",
                reason="no array is split over data, whose size is 1.",
                place="",
                remedy="Leave the axis out of the mesh.",
            ),
        ),
    )


def memory_16b():
    held = [
        Held(
            kind="activation",
            path="blocks.each",
            bytes=4_831_838_208,
            shape="bf16[48,6,2048,4096]",
            source="decoder.py:101",
        ),
        Held(kind="temporary", path="blocks.each.attn", bytes=1_610_612_736, shape="bf16[6,2048,64,128]"),
        Held(kind="temporary", path="blocks.each.attn.q.kernel", bytes=268_435_456, shape="bf16[4096,64,128]"),
        Held(kind="gradient", path="blocks.each.attn.q.kernel", bytes=1_510_612_736, shape="f32[48,4096,32]"),
        Held(kind="parameter", path="blocks.each.attn.q.kernel", bytes=201_326_592, shape="f32[48,4096,256]"),
        Held(kind="parameter", path="embed.embedding", bytes=47_217_255, shape="f32[125,4096]"),
        Held(kind="optimizer", path="mu.blocks.each.attn.q.kernel", bytes=248_543_847, shape="f32[48,4096,256]"),
        Held(kind="optimizer", path="nu.blocks.each.attn.q.kernel", bytes=248_543_847, shape="f32[48,4096,256]"),
        Held(kind="batch", path="batch.tokens", bytes=98_304, shape="s32[6,2048]"),
        Held(kind="code", path="", bytes=41_943_040),
    ]
    peak = 9_280_236_544
    held.append(Held(kind="unattributed", path="", bytes=peak - sum(each.bytes for each in held)))
    curve = [
        (at, 800_000_000 + int(8.4e9 * min(at, 100) / 100 * (1 if at < 100 else max(0, 1 - (at - 100) / 130))))
        for at in range(0, 231, 3)
    ]
    return Memory(
        peak=peak,
        limit=16_909_336_576,
        argument=745_631_744,
        output=745_533_440,
        temporary=8_995_667_968,
        alias=745_500_000,
        code=41_943_040,
        host=0,
        held=tuple(held),
        curve=tuple(curve),
    )


def events_16b(total):
    """Embedding, the scanned layers forward, the head, the layers backward with recomputation, the update."""

    def compute(start, seconds, name, path, count=1, depth=0):
        return Event(lane="compute", start=start, seconds=seconds, count=count, name=name, path=path, depth=depth)

    def move(start, seconds, name, path, count=1, depth=0):
        return Event(lane="fsdp", start=start, seconds=seconds, count=count, name=name, path=path, depth=depth)

    yield move(0.0, 0.12, "all-gather", "embed.embedding")
    yield compute(0.12, 0.06, "gather", "embed")
    for index, (start, length, passes) in enumerate(((0.2, 2.7, ""), (3.5, 6.2, " again"))):
        inside = (("matmul", "attn.q"), ("attention", "attn"), ("matmul", "attn.o"), ("matmul", "mlp"))
        each = length / (len(inside) * (index + 1))
        for place in range(len(inside) * (index + 1)):
            name, leaf = inside[place % len(inside)]
            yield move(start + place * each, each * 0.7, "all-gather", f"blocks.each.{leaf}", 48, 1)
            wait = each * (0.2 if place == 0 else 0.05)
            yield compute(start + place * each + wait, each - wait, name + passes * 0, f"blocks.each.{leaf}", 48, 1)
    yield compute(2.95, 0.3, "matmul", "head")
    yield move(2.9, 0.15, "all-gather", "head.kernel")
    yield move(9.7, 0.25, "reduce-scatter", "head.kernel")
    yield compute(9.8, total - 9.8, "update", "optimizer")


def llama_70b():
    """A 70B model over 2,048 chips, its 80 layers unrolled: some thousands of rows that must stay readable."""
    leaves = (
        ("attn.q.kernel", 64 * MIB),
        ("attn.k.kernel", 8 * MIB),
        ("attn.v.kernel", 8 * MIB),
        ("attn.o.kernel", 64 * MIB),
        ("mlp.gate.kernel", 224 * MIB),
        ("mlp.up.kernel", 224 * MIB),
        ("mlp.down.kernel", 224 * MIB),
    )
    rows = []
    for layer in range(80):
        for leaf, size in leaves:
            at = {"path": f"blocks.{layer}.{leaf}", "source": "models/gpt/model.py:88"}
            for when in ("forward pass", "backward pass, which computes the block again"):
                rows.append(row(size=size, expected=f"weight, {when}", name=f"ag.{len(rows)}", **at))
            scatter = {"expected": "gradient, backward pass", "name": f"rs.{len(rows)}", **at}
            rows.append(row("reduce-scatter", size=size, **scatter))
            rows.append(
                row(
                    "all-reduce",
                    ("data",),
                    size // 64,
                    expected="gradient, after the backward pass",
                    name=f"ar.{len(rows)}",
                    **at,
                )
            )
        for leaf in ("attn.o", "mlp.down"):
            at = {"path": f"blocks.{layer}.{leaf}", "source": "models/gpt/model.py:91", "name": f"tp.{len(rows)}"}
            rows.append(row("reduce-scatter", ("tensor",), 256 * MIB, expected="activation, forward pass", **at))
    rows.append(
        row("collective-permute", ("data", "fsdp"), 3 * MIB, None, expected="", path="blocks.3.attn", name="cp.1")
    )
    rows.append(row("all-reduce", ("data", "fsdp"), 4, expected="sum of the loss", name="ar.loss"))
    events, at = [], 0.0
    for layer in [*range(80), *reversed(range(80))]:
        for leaf, seconds in (("attn", 0.011), ("mlp", 0.022)):
            events.append(
                Event(
                    lane="fsdp",
                    start=at,
                    seconds=seconds * 0.8,
                    count=1,
                    name="all-gather",
                    path=f"blocks.{layer}.{leaf}",
                    depth=0,
                )
            )
            events.append(
                Event(
                    lane="compute",
                    start=at + seconds * 0.1,
                    seconds=seconds * 0.9,
                    count=1,
                    name="matmul",
                    path=f"blocks.{layer}.{leaf}",
                    depth=0,
                )
            )
            events.append(
                Event(
                    lane="tensor",
                    start=at + seconds * 0.9,
                    seconds=seconds * 0.1,
                    count=1,
                    name="reduce-scatter",
                    path=f"blocks.{layer}.{leaf}",
                    depth=0,
                )
            )
            at += seconds
    events.append(Event(lane="data", start=at, seconds=0.2, count=1, name="all-reduce", path="", depth=0))
    total = at + 0.2
    compute = sum(event.seconds for event in events if event.lane == "compute")
    held = [
        Held(kind=kind, path=f"{prefix}blocks.{layer}.{leaf}", bytes=size // 128, shape="f32[8192,448]")
        for kind, prefix in (("parameter", ""), ("optimizer", "mu."), ("optimizer", "nu."), ("gradient", ""))
        for layer in range(80)
        for leaf, size in leaves
    ]
    held += [
        Held(kind="activation", path=f"blocks.{layer}", bytes=640 * MIB, shape="bf16[1,8192,8192]")
        for layer in range(80)
    ]
    held.append(Held(kind="unattributed", path="", bytes=-12 * MIB))
    peak = sum(each.bytes for each in held)
    by_path = [
        (f"blocks.{layer}.{leaf.rpartition('.')[0]}", size * 6.9e7) for layer in range(80) for leaf, size in leaves
    ]
    hardware = sum(number for _, number in by_path)
    return Report(
        name="models.gpt:llama_70b",
        hardware="TPU v5p 8x16x16, 2048 chips",
        target="v5p:8x16x16",
        axes={"data": 2, "fsdp": 128, "tensor": 8},
        num_devices=2048,
        compiler="XLA:TPU, jax 0.10.2, libtpu 0.0.42",
        strategies=(
            "DP()",
            "FSDP(blocks='blocks.*')",
            "TP(column=['*.q', '*.k', '*.v', '*.gate', '*.up'], row=['*.o', '*.down'])",
        ),
        num_tokens=4_194_304 * 2,
        peak_flops=459e12,
        memory=Memory(
            peak=peak,
            limit=95 * GIB,
            argument=3 * GIB,
            output=3 * GIB,
            temporary=peak - 3 * GIB,
            alias=3 * GIB,
            code=100 * MIB,
            host=0,
            held=tuple(held),
        ),
        flops=Flops(
            model=hardware * 0.75,
            model_causal=hardware * 0.72,
            hardware=hardware,
            by_path=tuple(by_path),
            by_dtype=(("bf16", hardware),),
        ),
        timeline=Timeline(
            step_seconds=total,
            compute_seconds=compute,
            communication_seconds=total * 0.8,
            exposed_communication_seconds=total - compute,
            bubble_seconds=0.0,
            low=total * 0.9,
            high=total * 1.1,
            events=tuple(events),
        ),
        collectives=tuple(rows),
        findings=tuple(
            Finding(
                kind="replicated",
                severity="warning",
                reason=f"blocks.{layer}.norm.scale is whole on every device.",
                place=f"blocks.{layer}.norm.scale",
                remedy="Leave it: it is small.",
            )
            for layer in range(80)
        ),
    )


def nothing():
    """A report of which nothing is known."""
    return Report(name="", hardware="", target="", axes={}, num_devices=1)


def on_a_cpu():
    """What a CPU gives: traffic, memory and FLOPs, no times."""
    full = decoder_16b()
    rows = tuple(
        row(
            each.kind,
            each.axes,
            each.bytes,
            each.count,
            path=each.path,
            source=each.source,
            name=each.name,
            seconds=0.0,
        )
        for each in full.collectives
    )
    return Report(
        name="train_step",
        hardware="8 simulated CPU devices",
        target="cpu:8",
        axes={"fsdp": 8},
        num_devices=8,
        compiler="XLA:CPU, jax 0.10.2",
        memory=full.memory,
        flops=full.flops,
        collectives=rows,
    )
