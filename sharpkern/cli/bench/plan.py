"""The sections of a sitting, in order of worth, and the time that each may take."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """A part of the bench that runs in processes of its own.

    Attributes:
        name: what ``--section`` takes, and the key in the record.
        title: for the table.
        module: what the process imports; its ``cases(bench)`` returns the section's cases by name.
        limit: seconds for the whole section on a GPU.
        patience: seconds that a case may give no row before its process is ended and the next case begun.
        lanes: processes at once; more than one only where nothing is timed.
        gated: whether it times kernels, which have to have passed their check of correctness.
        cpu: whether it has something to do without a GPU.
    """

    name: str
    title: str
    module: str
    limit: float
    patience: float
    lanes: int = 1
    gated: bool = False
    cpu: bool = True


# Where correctness is checked, and hence what a gated section waits for.
GATE = "correctness"

# Ten minutes on a lent machine end at the 600th second: these limits and the look at the machine add up to 9½.
SECTIONS = (
    Section("ceilings", "Ceilings: copy and matrix product", "sharpkern.cli.bench.ceilings", 30, 30),
    Section(GATE, "Correctness against float64", "sharpkern.cli.bench.correctness", 105, 80, lanes=8),
    Section("streaming", "Streaming kernels", "sharpkern.cli.bench.streaming", 90, 30, gated=True),
    Section("head", "LM head and cross-entropy", "sharpkern.cli.bench.head", 35, 25, gated=True),
    Section("model", "Whole model", "sharpkern.cli.bench.model", 120, 90, gated=True),
    Section("passes", "Several step sizes in one pass", "sharpkern.cli.bench.passes", 65, 40, gated=True),
    Section("linear", "Linear layer", "sharpkern.cli.bench.linear", 75, 20, gated=True),
    Section("compiled", "Registers and shared memory", "sharpkern.cli.bench.compiled", 30, 20, gated=True, cpu=False),
)

BUDGET = 570.0


def with_gate(sections: tuple[Section, ...], names: list[str]) -> list[Section]:
    """Return the named sections in the order of the plan, and the gate where one of them needs it.

    Args:
        sections: the plan.
        names: of the sections wanted; none for all.

    Returns:
        The sections to run.

    Raises:
        ValueError: if a name is unknown.
    """
    known = [section.name for section in sections]
    for name in names:
        if name not in known:
            raise ValueError(f"section must be one of {', '.join(known)}, got {name!r}; leave it out for all")
    chosen = [section for section in sections if not names or section.name in names]
    gated = any(section.gated for section in chosen)
    return [section for section in sections if section in chosen or (gated and section.name == GATE)]
