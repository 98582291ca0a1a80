"""131,072 tokens a sequence on 64 chips that nobody has here: Llama-8B on v5p, fsdp 4 × context 8 × tensor 2.

Nothing is run. What is to be seen: it fits, and the keys and values that go round travel while attention computes.
`--layers` compiles a shorter stack: in a scan, a layer moves and computes what any other does.
"""

import argparse
import dataclasses

import jaxpar as jp
from models.gpt import config, recipes

SEQ, SEQUENCES = 131_072, 4


def main():
    """Compile, and print what moves and what of it is waited for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=config.LLAMA_8B.num_layers)
    parser.add_argument("--method", default="ring")
    args = parser.parse_args()

    shape = dataclasses.replace(config.LLAMA_8B, num_layers=args.layers, max_positions=SEQ)
    base = recipes.recipe(shape, batch=SEQUENCES, seq=SEQ)
    recipe = dataclasses.replace(base, strategies=[*base.strategies, jp.CP(method=args.method)])
    report = jp.explain(recipe, on=jp.mesh("v5p:4x4x4", fsdp=4, context=8, tensor=2))
    for part in ("time", "memory"):
        print(report.table(part))
    print("over context: what, bytes, times a step, loops around it, and ms a step, of which waited for")
    for row in sorted(report.collectives, key=lambda row: -row.seconds * (row.count or 1)):
        if "context" in row.axes:
            took = 1e3 * row.seconds * (row.count or 1)
            print(
                f"  {row.kind:18} {row.bytes / 2**20:8.1f} MiB {row.count:6} {row.depth} "
                f"{took:8.1f} {1e3 * row.exposed_seconds:8.1f}  {row.source}"
            )
    print(*report.notes, *report.unread, sep="\n")


if __name__ == "__main__":
    main()
