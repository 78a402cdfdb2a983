"""The versions of vLLM whose interface the backend was written against."""

from __future__ import annotations

import re

OLDEST, NEWEST = (0, 20), (0, 33)


def check_version(version: str) -> None:
    """Check vLLM's version.

    Raises:
        ImportError: It is too old, too new, or tells no version.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or not OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        supported = " to ".join(f"{major}.{minor}" for major, minor in (OLDEST, NEWEST))
        raise ImportError(f"flexprefill's attention backend needs vLLM {supported}, this is {version}")
