"""A 7B model in a pipeline on 64 chips that nobody has here: what XLA:TPU makes of pipe 4 × fsdp 4 × tensor 4 on v5p.

Nothing is run. What is to be seen: gradients cross `fsdp` once a step, outside of every loop (`FSDP(reduce="step")`),
and each tick has two permutes over `pipe`.
"""

import collections
import dataclasses

import jaxpar as jp
from models.gpt import config, recipes

MICROBATCHES, SEQUENCES = 8, 256


def main():
    """Compile, and print what moves."""
    base = recipes.recipe(config.LLAMA_7B, batch=SEQUENCES)
    pipe = jp.PP(schedule="1f1b", microbatches=MICROBATCHES)
    strategies = [jp.DP(), jp.FSDP(reduce="step"), recipes.tensor_rules(config.LLAMA_7B), pipe]
    recipe = dataclasses.replace(base, strategies=strategies)
    report = jp.explain(recipe, on=jp.mesh("v5p:4x4x4", pipe=4, fsdp=4, tensor=4))
    for part in ("pipeline", "time", "memory"):
        print(report.table(part))
    found = collections.Counter()
    for row in report.collectives:
        found[row.kind, "+".join(row.axes), row.depth, row.count] += row.bytes
    print("collectives: what, over, loops around it, times, GB each time")
    for (kind, axes, depth, count), size in sorted(found.items(), key=lambda each: -each[1]):
        print(f"  {kind:20} {axes:20} {depth} {count:5} {size / 1e9:8.3f}")


if __name__ == "__main__":
    main()
