"""What would come out wrong over several ranks is one clear sentence on every rank, and nothing hangs."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.distributed import mistakes
from helpers.distributed.pool import RankPool


@pytest.mark.parametrize("name", mistakes.WRONG)
def test_what_can_not_be_spread_is_an_error(ranks: RankPool, name: str) -> None:
    for message in ranks.run(mistakes.refuse_model, name):
        assert message.startswith("SequenceParallelError: sequence_parallel can't spread attention call"), message
        assert name in message


def test_a_mask_of_the_stretch_alone_is_an_error(ranks: RankPool) -> None:
    for message in ranks.run(mistakes.refuse_given_mask):
        assert "its mask is given for the stretch alone: (200, 200)" in message


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "sequence_parallel must be None, a ProcessGroup, a DeviceMesh of one dimension"),
        ("two dimensions", "sequence_parallel must be None, a ProcessGroup, a DeviceMesh of one dimension"),
        ("no such dimension", "a dimension of its mesh: one of tp, sp"),
        ("not initialised", "call torch.distributed.init_process_group first"),
    ],
)
def test_a_group_has_to_be_one(ranks: RankPool, value: Any, text: str) -> None:
    for message in ranks.run(mistakes.refuse_option, value):
        assert message.startswith("InvalidOptionError"), message
        assert text in message


@pytest.mark.parametrize(
    ("about", "text"),
    [
        ("length", "the ranks hold stretches of 200, 196 tokens; they must be equal"),
        ("options", "the ranks have different options"),
        ("graph", "the ranks run different graphs"),
        ("past", "the ranks have different keys and values of earlier chunks; call gather_cache after each"),
    ],
)
def test_ranks_that_disagree_all_say_so(ranks: RankPool, about: str, text: str) -> None:
    for message in ranks.run(mistakes.disagree, about):
        assert message.startswith("RanksDisagreeError"), message
        assert text in message
