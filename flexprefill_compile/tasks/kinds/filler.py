"""Text that means nothing in particular: sentences and words drawn by chance, in which tasks hide what they ask for."""

from __future__ import annotations

import random
from collections.abc import Callable

Filler = Callable[[random.Random, int], list[str]]

_SUBJECTS = (
    "The old gardener",
    "A tall sailor",
    "The baker's daughter",
    "Our neighbour",
    "The quiet teacher",
    "A travelling painter",
    "The village doctor",
    "My grandfather",
    "The youngest clerk",
    "A tired farmer",
    "The train driver",
    "One of the musicians",
    "The owner of the mill",
    "A visitor from the coast",
    "The night watchman",
    "The woman with the umbrella",
)
_VERBS = (
    "carried",
    "looked for",
    "repaired",
    "sold",
    "forgot",
    "painted",
    "described",
    "borrowed",
    "found",
    "cleaned",
    "wrapped up",
    "admired",
    "gave away",
    "counted",
    "hid",
    "paid for",
)
_OBJECTS = (
    "a wooden ladder",
    "two empty baskets",
    "the brass lamp",
    "a box of candles",
    "an old map",
    "the blue bicycle",
    "a sack of flour",
    "some dry firewood",
    "the broken clock",
    "a pair of boots",
    "the copper kettle",
    "three loaves of bread",
    "a woollen blanket",
    "the garden gate",
    "a jar of honey",
    "the longest rope",
)
_PLACES = (
    "near the river",
    "behind the school",
    "at the market",
    "in the harbour",
    "beside the church",
    "on the hill",
    "under the bridge",
    "at the end of the street",
    "in front of the station",
    "by the fountain",
    "along the canal",
    "inside the barn",
)
_TIMES = (
    "before breakfast",
    "in the afternoon",
    "after the rain",
    "late in the evening",
    "on a Sunday",
    "at first light",
    "during the harvest",
    "when the bells rang",
    "in early spring",
    "while it was snowing",
)
_PLAIN_WORDS = """
apple anchor arrow basket beach bell bird blanket boat bottle bridge brush bucket button cabin candle carpet
castle chain chair cherry circle cloud coat coin corner cotton cousin crown cup curtain desert dinner doctor
door dragon drum eagle engine farmer feather fence field finger flag flower forest fork garden gate ghost
giant glass glove grape guitar hammer harbor hat hill honey horse hotel iron island jacket jewel juice kettle
key king kitchen kite ladder lake lamp leaf lemon letter library lion machine magnet map market meadow metal
milk mirror monkey moon mountain needle nest night novel ocean office onion orange oven paint palace paper
pencil pepper piano pillow planet plate pocket poet potato prince purple queen rabbit radio rain ribbon river
road robot roof rope rose salt sand school shadow sheep ship shirt silver singer snow soap spider spoon spring
station stone storm street sugar summer table teacher temple tent thunder ticket tiger tower train tree tunnel
valley village violin wagon wall water wheel whistle window winter wolf wood yellow
"""
WORDS = tuple(_PLAIN_WORDS.split())


def write_sentences(chance: random.Random, count: int) -> list[str]:
    """Return sentences, each with the blank before it."""
    parts = (_SUBJECTS, _VERBS, _OBJECTS, _PLACES, _TIMES)
    return [f" {' '.join(chance.choice(part) for part in parts)}." for _ in range(count)]


def choose_words(chance: random.Random, count: int) -> list[str]:
    """Return different plain words.

    Raises:
        ValueError: There are not so many.
    """
    return chance.sample(WORDS, count)


def choose_number(chance: random.Random) -> str:
    """Return a number of five digits."""
    return str(chance.randrange(10_000, 100_000))
