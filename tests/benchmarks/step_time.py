"""Step times published of real TPUs, beside what is predicted from a program compiled of the same configuration.

No hardware and no compiler: the texts lie in `tests/data/step_time`, `published.toml` there says what they are. Which
of them were in sight when coefficients were settled is said in `jaxpar/explain/_coefficients.toml`.
"""

import dataclasses
import functools as ft
import lzma
import pathlib
import tomllib

from jaxpar import _hardware, _hlo
from jaxpar._hlo import MeshAxes
from jaxpar.explain._compiled import Compiled
from jaxpar.explain._timeline import Timeline, predict

DATA = pathlib.Path(__file__).parents[1] / "data" / "step_time"
VOCAB, SEQ, HEAD_DIM = 32_000, 2048, 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """One configuration of `published.toml`, which says what the fields are."""

    name: str
    target: str
    batch: int
    embed: int
    heads: int
    mlp: int
    layers: int
    mfu: float

    @property
    def flops(self) -> float:
        """Of the model on one chip, attention in full."""
        attention, mlp = 4 * self.embed * self.heads * HEAD_DIM, 3 * self.embed * self.mlp
        weights = self.layers * (attention + mlp) + VOCAB * self.embed
        scores = 12 * self.layers * self.heads * HEAD_DIM * SEQ
        return self.batch * SEQ * (6 * weights + scores)

    @property
    def seconds(self) -> float:
        """A step."""
        return self.flops / (self.mfu * _hardware.parse(self.target).peak_flops("bfloat16"))

    @ft.cached_property
    def predicted(self) -> Timeline:
        """From the text alone, as `jaxpar explain --hlo` does."""
        text = lzma.decompress((DATA / f"{self.name}.hlo.xz").read_bytes()).decode()
        hardware, axes = _hardware.parse(self.target), MeshAxes(names=(), sizes=())
        found = predict(_hlo.read(text), Compiled(name=self.name, text=text, hardware=hardware, axes=axes))
        assert found is not None
        return found


def published() -> list[Published]:
    """Those whose text is here."""
    tables = tomllib.loads((DATA / "published.toml").read_text(encoding="utf-8"))
    return [Published(name=name, **table) for name, table in tables.items() if (DATA / f"{name}.hlo.xz").exists()]


def main() -> None:
    """Print the table."""
    print(f"{'':20}{'published':>11}{'predicted':>11}{'error':>8}{'low to high':>18}{'exposed':>11}   MFU, both")
    for case in published():
        found = case.predicted
        error = found.step_seconds / case.seconds - 1
        print(
            f"{case.name:20}{case.seconds:9.2f} s{found.step_seconds:9.2f} s{error:+8.1%}"
            f"{found.low:8.2f} to {found.high:5.2f} s{found.exposed_communication_seconds:9.2f} s"
            f"   {case.mfu:.1%} {case.mfu / (1 + error):.1%}"
        )


if __name__ == "__main__":
    main()
