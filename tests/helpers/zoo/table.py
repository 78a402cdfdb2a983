"""docs/models.md: a row for each family of the zoo, from what its checks found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import transformers

from helpers.zoo.checks import TOLERANCE, Phase
from helpers.zoo.models import WINDOW, Family

# Of the phases of zoo_checks, those with a column; padding on the left runs the graph of padding on the right.
COLUMNS = {"prefill": "prefill", "padded right": "padded", "second chunk": "second chunk"}

PAGE = """# Models

{right} of {total} families of causal language models in transformers give right results under the backend
at `gamma = 1`. In {rewritten} of them every attention call of a prefill is rewritten, in {padded} with padding too,
in {chunked} also in a second chunk of the prompt. Measured with {versions}, float32, CPU.
`{command}` writes this page.

Each family is a tiny model: random weights, each kind of layer that its config has, windows of {window} tokens if it
has windows. Its logits are compared with those of the uncompiled model, for a prompt of 150 tokens; for two prompts of
different lengths, the shorter one padded on the right and on the left (real tokens only); and for a second chunk of 70
tokens after the first. A prefill without cache and a decode step are compared too for {thorough}.
"Right" is a relative error of the logits below {tolerance:g}: rounding stays below it, one key too many or too few
does not.
{how}

- *Calls* is the number of attention calls of the uncompiled model in a prefill: fused calls, and softmaxes of scores
  that the model writes out itself.
- *Rewritten* calls run sparse below `gamma = 1`. The columns are a plain prefill, a padded batch and the second chunk.
- Calls left dense run as the model wrote them. Their results are right too, but they gain nothing. Prompts shorter than
  `min_length` and decode steps are always dense.

{table}

## Left out

{left_out}
"""

VERSIONS = "transformers {transformers}, torch {torch}"
HOW = {
    False: "Rewritten graphs run without code generation. Their tables are checked against their masks pair by pair.",
    True: "Rewritten graphs are compiled by inductor.",
}


class Row(NamedTuple):
    """A line of the table, as text."""

    family: str
    class_name: str
    calls: str
    prefill: str
    padded: str
    second_chunk: str
    left_dense: str


def describe_family(family: Family, phases: Mapping[str, Phase]) -> Row:
    """Count what was rewritten in each phase that has a column, and say why the rest was not."""
    shown = {column: phases[name] for name, column in COLUMNS.items()}
    reasons: dict[str, list[str]] = {}
    for column, phase in shown.items():
        for reason in phase.reasons:
            reasons.setdefault(reason, []).append(column)
    left_dense = [f"{', '.join(columns)}: {reason}" for reason, columns in reasons.items()]
    if breaks := phases["prefill"].graph_breaks:
        left_dense.append(f"{breaks} graph break{'s' * (breaks > 1)} in a prefill")
    counts = (f"{phase.rewritten} of {phase.calls}" for phase in shown.values())
    return Row(family.name, family.class_name, str(phases["prefill"].calls), *counts, "; ".join(left_dense))


def describe_failure(family: Family, error: Exception) -> Row:
    """Say that a family runs wrong, or not at all."""
    message = next(iter(str(error).splitlines()), "")[:150]
    return Row(family.name, family.class_name, "?", *[""] * 3, f"**fails**: {type(error).__name__}: {message}")


def is_complete(row: Row, *columns: str) -> bool:
    """Tell whether every attention call was rewritten in the given columns."""
    counts = [getattr(row, column).split(" of ") for column in columns]
    return all(len(count) == 2 and count[0] == count[1] != "0" for count in counts)


def installed_versions() -> dict[str, str]:
    """Return what the rows depend on beside this project."""
    return {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}


def format_page(
    rows: Sequence[Row], left_out: Mapping[str, Sequence[str]], *, thorough: str, how: str, command: str
) -> str:
    """Return the text of docs/models.md.

    Args:
        rows: The table.
        left_out: For each reason, the model types that are no families.
        thorough: The families of which all was checked, as text.
        how: Of HOW, what ran the graphs.
        command: What was typed.
    """
    return PAGE.format(
        right=sum("**fails**" not in row.left_dense for row in rows),
        total=len(rows),
        rewritten=sum(is_complete(row, "prefill") for row in rows),
        padded=sum(is_complete(row, "prefill", "padded") for row in rows),
        chunked=sum(is_complete(row, "prefill", "padded", "second_chunk") for row in rows),
        versions=VERSIONS.format(**installed_versions()),
        thorough=thorough,
        how=how,
        command=command,
        window=WINDOW,
        tolerance=TOLERANCE,
        table="\n".join(
            [
                "| family | class | calls | prefill | padded | second chunk | left dense, and why |",
                "|---|---|---|---|---|---|---|",
                *map(format_row, rows),
            ]
        ),
        left_out="\n".join(f"- {reason}: {', '.join(names)}" for reason, names in left_out.items()),
    )


def format_row(row: Row) -> str:
    """Return a line of the table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
