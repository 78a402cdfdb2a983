"""Run a campaign: ``python -m fuzz --cases 10000 --seed 1``, from the folder of the tests or with it on the path.

It goes on after failures, writes each failing case as a script, and counts what was rewritten, refused and wrong.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path

from .check import Outcome, run_case
from .grammar.case import Case, draw_case
from .grammar.choices import replayed, seeded, shrink


def main() -> None:
    """Run the cases that the command line asks for."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="how many cases to run")
    parser.add_argument("--seed", type=int, default=0, help="of the whole campaign")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--codegen", action="store_true", help="let inductor generate code for each case")
    parser.add_argument("--show", action="store_true", help="print each case before it runs")
    parser.add_argument("--output", type=Path, default=Path("fuzz-failures"), help="folder for failing cases")
    parser.add_argument("--tries", type=int, default=40, help="how many simpler cases to try for each failure")
    arguments = parser.parse_args()

    counts: Counter[str] = Counter()
    started = time.monotonic()
    for number in range(arguments.first, arguments.first + arguments.cases):
        case = draw_case(seeded(arguments.seed, number))
        if arguments.show:
            print(case.source, case.options)
        outcome = run_case(case, has_code=arguments.codegen)
        count(counts, outcome)
        if outcome.is_failure or outcome.kind == "invalid":
            print(f"{arguments.seed}:{number} {outcome.kind}: {outcome.message.splitlines()[0][:200]}", flush=True)
        if outcome.is_failure:
            case, outcome = simplify(case, outcome, has_code=arguments.codegen, most_tries=arguments.tries)
            save(case, outcome, arguments.output / f"case_{arguments.seed}_{number}.py")
        if (number + 1) % 100 == 0:
            report(counts, time.monotonic() - started)
    report(counts, time.monotonic() - started)


def count(counts: Counter[str], outcome: Outcome) -> None:
    """Add an outcome to the counts."""
    counts[outcome.kind] += 1
    for site in outcome.sites:
        counts["rewritten" if site.reason is None else f"dense: {site.reason.value}"] += 1


def report(counts: Counter[str], seconds: float) -> None:
    """Print the counts so far."""
    print(json.dumps({"seconds": round(seconds), **dict(counts.most_common())}), flush=True)


def simplify(case: Case, outcome: Outcome, *, has_code: bool, most_tries: int) -> tuple[Case, Outcome]:
    """Return a simpler case that fails in the same way, and how."""
    found = case, outcome

    def fails(tape: list[int]) -> bool:
        nonlocal found
        simpler = draw_case(replayed(tape))
        its_outcome = run_case(simpler, has_code=has_code)
        if its_outcome.kind != outcome.kind or its_outcome.message[:20] != outcome.message[:20]:
            return False
        found = simpler, its_outcome
        return True

    shrink(case.tape, fails, most_tries)
    return found


def save(case: Case, outcome: Outcome, path: Path) -> None:
    """Write a failing case as a script that compares itself with eager."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sites = "".join(f"# {site.name}: {site.reason or 'rewritten'} {site.detail}\n" for site in outcome.sites)
    message = "".join(f"# {line}\n" for line in outcome.message.splitlines())
    path.write_text(f"# {outcome.kind}\n{message}{sites}# tape {list(case.tape)}\n{case.source}\n\n{_write_run(case)}")


def _write_run(case: Case) -> str:
    return f"""\
if __name__ == "__main__":
    compiled = torch.compile(model, backend="flexprefill", dynamic={case.is_dynamic}, options={case.options})
    with torch.no_grad():
        for length in {case.lengths}:
            inputs = make_inputs(length)
            eager, ours = model(**inputs), compiled(**inputs)
            print("off eager by", (ours - eager).abs().max().item(), "strides", ours.stride(), eager.stride())
"""


if __name__ == "__main__":
    main()
