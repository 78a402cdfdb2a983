"""One case: a script that makes inputs and attends, and the settings to compile it with."""

from __future__ import annotations

import dataclasses
import linecache
from collections.abc import Callable
from typing import Any

import torch

from .choices import Choices
from .flex import FlexCode, draw_flex
from .forms import FormCode, draw_sdpa, draw_written_out
from .scope import BLOCK, Scope
from .tensors import Operands, draw_operands, draw_poison, draw_tail

_IMPORTS = """\
import functools
import math

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """Attention as code, and what is known of it.

    Attributes:
        source: Defines ``make_inputs(S)``, ``operands``, ``compute_mask``, ``attend`` and ``model``.
        options: The options of the backend.
        lengths: Numbers of queries, one after the other, of which the first compiles.
        is_dynamic: Whether to compile with ``dynamic=True``.
        form: What was drawn: scale, softcap and mask for the oracle.
        batch: How many rows it has.
        batched: The inputs whose first dimension is the batch.
        num_layers: How many attention calls the model makes.
        is_one_sequence: Whether no mask packs several sequences into a row.
        says_positions: Whether the mask tells where the queries stand among the keys.
        start: How many keys come before the first query.
        dtype: Of query, key and value.
        tape: The choices that made it.
    """

    source: str
    options: dict[str, Any]
    lengths: list[int]
    is_dynamic: bool
    form: FormCode | FlexCode
    batch: int
    batched: frozenset[str]
    num_layers: int
    is_one_sequence: bool
    says_positions: bool
    start: int
    dtype: torch.dtype
    tape: tuple[int, ...]

    def load(self) -> dict[str, Callable[..., Any]]:
        """Run the source and return what it defines."""
        name = f"<case {hash(self.source)}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(keepends=True), name)
        names: dict[str, Any] = {}
        exec(compile(self.source, name, "exec"), names)
        return names

    def take_row(self, inputs: dict[str, Any], row: int) -> dict[str, Any]:
        """Return the inputs of one row of the batch."""
        return {name: x[row : row + 1] if name in self.batched else x for name, x in inputs.items()}


def draw_case(choices: Choices) -> Case:
    """Draw a case."""
    scope = Scope(choices)
    operands = draw_operands(scope)
    poison = draw_poison(scope)
    kind = choices.pick(["sdpa"] * 5 + ["written out"] * 4 + ["flex"])
    draw = {"sdpa": draw_sdpa, "written out": draw_written_out, "flex": draw_flex}[kind]
    form: FormCode | FlexCode = draw(scope)
    num_layers = 2 if choices.chance(10) else 1
    second_length = choices.between(BLOCK + 1, 3 * BLOCK)
    write = _write_flex if isinstance(form, FlexCode) else _write_form
    source = "\n\n".join(
        [
            _IMPORTS,
            _write_inputs(scope, poison),
            _write_function("operands", operands.arguments, [*operands.lines, "return query, key, value"]),
            *write(scope, form, operands),
            _write_model(scope, form, operands, num_layers, draw_tail(scope)),
        ]
    )
    return Case(
        source=source,
        options=_draw_options(choices),
        lengths=[scope.length, second_length] if scope.is_dynamic else [scope.length],
        is_dynamic=scope.is_dynamic,
        form=form,
        batch=scope.sizes.batch,
        batched=frozenset(name for name, x in scope.inputs.items() if x.is_batched),
        num_layers=num_layers,
        is_one_sequence=scope.is_one_sequence,
        says_positions=scope.says_positions,
        start=scope.sizes.start,
        dtype=getattr(torch, scope.dtype),
        tape=tuple(choices.tape),
    )


def _draw_options(choices: Choices) -> dict[str, Any]:
    """Draw settings: gamma 1 in half of the cases."""
    options = {"gamma": choices.pick([1.0, 1.0, 0.5, 0.8, 0.95]), "block_size": BLOCK, "min_length": 1}
    options["min_budget"] = choices.pick([0, 0, 16, 40])
    options["tau"] = choices.pick([0.0, 0.1, 1.0])
    options["check_masks"] = choices.chance(20)
    if options["tau"] < 1:  # tau is the paper's estimator's own; the default one does without
        options["estimator"] = "flexprefill"
    if choices.chance(20):
        options["estimator"] = choices.pick(["auto", "xattention", "sampled", "streaming", "dense"])
    if choices.chance(10):
        options["dense_last"] = BLOCK
    return options


def _write_function(name: str, arguments: list[str], lines: list[str]) -> str:
    body = "".join(f"    {line}\n" for line in lines)
    return f"def {name}({', '.join(arguments)}):\n{body}"


def _write_inputs(scope: Scope, poison: list[str]) -> str:
    makers = [f"{name} = {x.source}" for name, x in scope.inputs.items()]
    result = f"return dict({', '.join(f'{name}={name}' for name in scope.inputs)})"
    head = [
        "torch.manual_seed(0)",
        f"randn = functools.partial(torch.randn, dtype=torch.{scope.dtype})",
        f"T = {scope.sizes.start} + S + {scope.sizes.extra}",
    ]
    return _write_function("make_inputs", ["S"], [*head, *makers, *poison, result])


def _mask_arguments(scope: Scope, operands: Operands) -> list[str]:
    return [name for name in scope.inputs if name not in operands.arguments]


def _write_form(scope: Scope, form: FormCode, operands: Operands) -> list[str]:
    arguments = ["query", "key", *_mask_arguments(scope, operands)]
    lines = ["return None"] if form.mask is None else form.mask.lines
    return [
        _write_function("compute_mask", arguments, lines),
        _write_function("attend", ["query", "key", "value", "mask"], form.lines),
    ]


def _write_flex(scope: Scope, form: FlexCode, operands: Operands) -> list[str]:
    captures = _mask_arguments(scope, operands)
    pairs = [
        "b, h = torch.arange(query.shape[0])[:, None, None, None], torch.arange(query.shape[1])[:, None, None]",
        "i, j = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])",
    ]
    mods = [
        *("def mask_mod(b, h, i, j):", f"    return {form.mask_mod}"),
        *("def score_mod(score, b, h, i, j):", f"    return {form.score_mod}"),
    ]
    return [
        _write_function("compute_mask", ["query", "key", *captures], [*pairs, f"return {form.mask_mod}"]),
        _write_function("compute_bias", ["query", "key", *captures], [*pairs, f"return {form.bias or '0.0'}"]),
        _write_function("attend", ["query", "key", "value", *captures], [*mods, *form.lines]),
    ]


def _write_model(scope: Scope, form: FormCode | FlexCode, operands: Operands, num_layers: int, tail: str) -> str:
    others = _mask_arguments(scope, operands)
    lines = [f"query, key, value = operands({', '.join(operands.arguments)})"]
    last = ", ".join(["query", "key", "value", *others])
    if isinstance(form, FormCode):
        lines.append(f"mask = compute_mask({', '.join(['query', 'key', *others])})")
        last = "query, key, value, mask"
        if form.key_heads:
            lines += [f"{x} = {form.key_heads.format(x=x)}" for x in ("key", "value")]
    lines.append(f"out = attend({last})")
    if num_layers > 1:
        lines.append(f"out = out + attend(0.5 * {last})")
    return (
        _write_function("model", list(scope.inputs), [*lines, "return tail(out)"])
        + "\n\n"
        + _write_function("tail", ["out"], [f"return {tail}"])
    )
