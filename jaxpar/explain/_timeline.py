"""When each operation of a step runs: computation, communication, and what of it hides behind the other."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """Something that a device does for a while, or equal things in a row.

    Attributes:
        lane: `"compute"`, or the collective's axes joined by a comma, `"fsdp"`.
        start: Seconds since the step began.
        seconds: How long, all repetitions together.
        count: Repetitions that are drawn as one: a loop's iterations.
        name: `"all-gather"`, `"matmul"`, `"attention"`.
        path: Where in the model.
        depth: Loops around it.
    """

    lane: str
    start: float
    seconds: float
    count: int
    name: str
    path: str
    depth: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpTime:
    """How long one instruction is taken to run each time, and by which reckoning.

    Attributes:
        computation: That holds it.
        name: The instruction.
        seconds: Each time.
        count: Times a step; a loop whose trip count is not known counts once.
        flops: Each time.
        bytes: Read and written, each time.
        origin: `"cycles"` (the compiler's own), `"roofline"`, `"kernel"` (a custom call by its own FLOPs and bytes) or
            `"link"` (communication).
    """

    computation: str
    name: str
    seconds: float
    count: int
    flops: float
    bytes: float
    origin: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
    """A predicted step.

    Attributes:
        step_seconds: The whole step.
        compute_seconds: The device computes.
        communication_seconds: Something is on a link, hidden or not.
        exposed_communication_seconds: The device waits for a link: `step_seconds` less `compute_seconds` and
            `bubble_seconds`.
        bubble_seconds: The device waits for another stage of a pipeline.
        low: Of `step_seconds`, as far as the coefficients are uncertain.
        high: The same, upwards.
        events: What a picture shows, folded: some hundreds at most.
        ops: Every instruction that takes time.
        exposed: Exposed seconds of each collective by `(computation, instruction)`, all runs together.
        transfers: Seconds of each collective, each time, wire bytes and the algorithm, by `(computation, instruction)`.
        notes: What was assumed, and what could not be told.
    """

    step_seconds: float
    compute_seconds: float
    communication_seconds: float
    exposed_communication_seconds: float
    bubble_seconds: float
    low: float
    high: float
    events: tuple[Event, ...]
    ops: tuple[OpTime, ...] = ()
    exposed: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    transfers: dict[tuple[str, str], tuple[float, int, str]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
