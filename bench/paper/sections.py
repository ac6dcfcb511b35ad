"""Each figure's section of the README here, from its results: ``python bench/paper/sections.py`` writes them."""

from functools import partial
from pathlib import Path

import figure2
import figure3
import figure4
import figure5
from readme import with_tables
from scaffold import Figure, read_rows, runtime

README = Path(__file__).parent / "README.md"
FIGURES = (figure2.FIGURE, figure3.FIGURE, figure4.FIGURE, figure5.FIGURE)


def section(figure: Figure) -> str:
    """Return the picture of a figure, how long it took, and what it shows."""
    picture = f"![{figure.about}](results/{figure.name}.png)"
    made = f"`python bench/paper/{figure.name}.py`, {runtime(figure.name)}; numbers: [CSV](results/{figure.name}.csv)."
    return "\n\n".join([picture, made, figure.findings(read_rows(figure.name))])


SECTIONS = {figure.name: partial(section, figure) for figure in FIGURES}


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8"), SECTIONS), encoding="utf-8")
