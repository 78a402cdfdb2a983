"""Predict the time to the first token on more GPUs from measured lines of two: the formula of docs/many-gpus.md.

Run: torchrun --nproc-per-node 2 -m flexprefill_compile bench-model --lengths 32768 131072 --json ranks.json
     python benchmarks/predict_many_gpus.py ranks.json --lengths 131072 524288 1048576 --ranks 1 2 4 8
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

# Of the bytes that each rank sends, relative to two ranks: (s - 1) / s^2 and (t - 1) / t.
SHARES = {"sequence": lambda ranks: 4 * (ranks - 1) / ranks**2, "tensor": lambda ranks: 2 * (ranks - 1) / ranks}


class Model(NamedTuple):
    """What the lines of two ranks say of a way and a kind; S is the number of tokens.

    Attributes:
        linear: ms a token on one card: projections and the feed-forward net.
        quadratic: ms a token squared on one card: attention.
        exchange: ms a token in collectives on two ranks.
        overhead: ms of a call of two ranks that neither explains.
    """

    linear: float
    quadratic: float
    exchange: float
    overhead: float

    def predict(self, way: str, tokens: int, ranks: int) -> float:
        """Return the time to the first token in ms."""
        alone = self.linear * tokens + self.quadratic * tokens**2
        if ranks == 1:
            return alone
        return alone / ranks + self.exchange * tokens * SHARES[way](ranks) + self.overhead


def fit(rows: list[dict[str, Any]], way: str, kind: str) -> Model:
    """Solve for the four numbers: from two lengths on one card, and from the longest one on two.

    Raises:
        ValueError: There are fewer than two lengths on one card, or none on two.
    """
    alone = {row["tokens"]: row["ms"] for row in rows if row["way"] == "one" and row["kind"] == kind and "ms" in row}
    spread = {row["tokens"]: row for row in rows if row["way"] == way and row["kind"] == kind and "ms" in row}
    if len(alone) < 2 or not spread.keys() & alone.keys():
        raise ValueError(f"{kind}, {way}: two lengths on one card are needed, and one of them on two")
    short, long = min(alone), max(alone)
    quadratic = (alone[long] / long - alone[short] / short) / (long - short)
    linear = alone[short] / short - quadratic * short
    longest = max(spread.keys() & alone.keys())
    exchanged = spread[longest]["collectives"] * spread[longest]["ms"]
    return Model(linear, quadratic, exchanged / longest, spread[longest]["ms"] - alone[longest] / 2 - exchanged)


def main() -> None:
    """Print a line for each way, length and number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="what bench-model wrote on two ranks")
    parser.add_argument("--lengths", type=int, nargs="+", default=[131072, 524288, 1048576], metavar="N")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    options = parser.parse_args()
    rows = json.loads(options.json.read_text())
    print("| way | tokens | GPUs | dense | sparse | sparse over one GPU |\n|---|---|---|---|---|---|")
    for way in SHARES:
        models = {kind: fit(rows, way, kind) for kind in ("dense", "sparse")}
        for tokens in options.lengths:
            alone = models["sparse"].predict(way, tokens, 1)
            for ranks in options.ranks:
                dense, sparse = (models[kind].predict(way, tokens, ranks) for kind in ("dense", "sparse"))
                times = f"{dense / 1e3:.1f} s | {sparse / 1e3:.1f} s"
                print(f"| {way} | {tokens} | {ranks} | {times} | {alone / sparse:.2f}x |")


if __name__ == "__main__":
    main()
