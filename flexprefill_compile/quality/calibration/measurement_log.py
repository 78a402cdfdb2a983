"""Measurements kept in a file as they are made, so that a search that was stopped goes on where it was.

One JSON object a line: a key that stands for all that a measurement depends on, the setting, and what was measured.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flexprefill_compile import block_masks

from ...errors import UsageError
from .ladder import Measurement


class MeasurementLog:
    """The measurements of a file, and those to come.

    Attributes:
        path: The file, made with the first measurement; None keeps them nowhere.
        num_known: How many measurements the file held.
    """

    def __init__(self, path: Path | None) -> None:
        """Read what there is.

        Raises:
            UsageError: The file can't be read.
        """
        self.path = path
        self._known: dict[str, Measurement] = {}
        if path is not None and path.exists():
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"can't read the measurements in {path}: {error}") from None
            for line in text.splitlines():
                self._read(line)
        self.num_known = len(self._known)

    def find(self, key: str) -> Measurement | None:
        """Return what was measured under a key, if it was."""
        return self._known.get(key)

    def add(self, key: str, setting: Any, measurement: Measurement) -> None:
        """Keep a measurement.

        Args:
            key: From ``hash_of``.
            setting: What was measured, for readers.
            measurement: What came out.

        Raises:
            UsageError: The file can't be written.
        """
        self._known[key] = measurement
        if self.path is None:
            return
        entry = {"key": key, "loss_increase": measurement.loss_increase, "costs": measurement.costs, "setting": setting}
        try:
            ends_line = not self.path.exists() or self.path.read_bytes()[-1:] in {b"", b"\n"}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(("" if ends_line else "\n") + json.dumps(entry) + "\n")
        except OSError as error:
            raise UsageError(f"can't write the measurements to {self.path}: {error.strerror}") from None

    def _read(self, line: str) -> None:
        try:
            entry = json.loads(line)
            self._known[entry["key"]] = Measurement(float(entry["loss_increase"]), tuple(map(float, entry["costs"])))
        except (ValueError, KeyError, TypeError):
            return  # a line that was cut off as the search was stopped


def hash_of(*parts: Any) -> str:
    """Return a short name for some JSON data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def describe_inputs(model: nn.Module, texts: list[Tensor]) -> list[Any]:
    """Return what tells a model's weights, where it runs, and the texts apart, as JSON data. Waits for the device."""
    weights = [(name, list(x.shape), str(x.dtype), x.double().sum().item()) for name, x in model.named_parameters()]
    device = str(next(model.parameters()).device.type)
    return [type(model).__name__, device, hash_of(weights), [hash_of(text.tolist()) for text in texts]]


def describe_code() -> str:
    """Return what tells two versions of the code that chooses blocks apart: all of ``block_masks``."""
    return hash_code(Path(str(block_masks.__file__)).parent)


def hash_code(folder: Path) -> str:
    """Return a short name for the Python files of a folder and its subfolders, wherever the folder lies."""
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*.py")}
    return hash_of({name: file.read_text(encoding="utf-8") for name, file in files.items()})
