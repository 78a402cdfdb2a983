"""Run one case: eager, the oracle and the compiled model have to agree."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from helpers.checked_attention import TableError, attend_checked, check_tables, find_allowed, without_code_generation
from torch import Tensor

from flexprefill_compile.backend import FlexPrefillBackend
from flexprefill_compile.report import Site, SkipReason

from .grammar.case import Case
from .grammar.scope import BLOCK
from .oracle import Attention, allowed_error, describe


class WrongError(AssertionError):
    """The compiled model does not give what it should."""


class InvalidCaseError(Exception):
    """Eager refuses the case, or gives another result than the oracle: the grammar is to blame."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        kind: "right", "wrong", "error" or "invalid".
        message: What was wrong.
        sites: What became of each attention call.
    """

    kind: str
    message: str = ""
    sites: tuple[Site, ...] = ()

    @property
    def is_failure(self) -> bool:
        """Whether there is something to mend."""
        return self.kind in {"wrong", "error"}


@dataclasses.dataclass(frozen=True)
class Call:
    """One FlexAttention call as it ran: which pairs its mask allows, and which its tables compute, (B, H, S, T)."""

    allowed: Tensor
    computed: Tensor


def run_case(case: Case, *, has_code: bool = False) -> Outcome:
    """Run a case and say what became of it.

    Args:
        case: What to run.
        has_code: Whether inductor generates code; else the rewritten graph runs as it is, its tables checked.
    """
    backend = FlexPrefillBackend()
    torch.compiler.reset()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Check(case, backend, has_code).run()
    except InvalidCaseError as error:
        return Outcome("invalid", str(error), backend.report.sites)
    except (WrongError, TableError) as error:
        return Outcome("wrong", str(error), backend.report.sites)
    except Exception as error:
        return Outcome("error", f"{type(error).__name__}: {error}"[:600], backend.report.sites)
    return Outcome("right", "", backend.report.sites)


class Check:
    """The comparisons of one case."""

    def __init__(self, case: Case, backend: FlexPrefillBackend, has_code: bool) -> None:
        self.case = case
        self.backend = backend
        self.has_code = has_code
        self.names = case.load()
        self.calls: list[Call] = []
        self.compiled = torch.compile(
            self.names["model"], backend=backend, dynamic=case.is_dynamic, options=case.options
        )

    def run(self) -> None:
        """Compare outputs for each length, then rows of the batch."""
        for length in self.case.lengths:
            inputs = self.names["make_inputs"](length)
            eager = self._run_eager(inputs)
            attentions = [describe(self.case, self.names, inputs, factor) for factor in (1.0, 0.5)]
            attentions = attentions[: self.case.num_layers]
            self._compare(eager, attentions, None, "eager", InvalidCaseError)
            actual = self._run_compiled(inputs)
            self._compare_layout(actual, eager)
            try:
                self._check_values(actual, inputs, attentions)
            except WrongError:
                self._check_inductor(actual, inputs)
                raise
        self._check_reasons()

    def _check_values(self, actual: Tensor, inputs: dict[str, Any], attentions: list[Attention]) -> None:
        """Compare an output with the oracle, over the pairs that its calls computed."""
        is_dense = self.case.options["gamma"] == 1
        calls = self.calls
        if self.has_code and not is_dense and self.backend.report.num_rewritten:
            calls = self._record_calls(inputs)
        if is_dense or not calls:
            self._compare(actual, attentions, None, "the result", WrongError)
        if not calls:
            return
        if len(calls) != len(attentions):
            raise InvalidCaseError(f"{len(calls)} calls of FlexAttention for {len(attentions)} attentions")
        for call, attention in zip(calls, attentions, strict=True):
            _check_mask(call, attention)
        if not is_dense:
            self._compare(actual, attentions, [call.computed for call in calls], "the result", WrongError)
            if self.case.says_positions:
                self._check_coverage(attentions[0], calls[0])
                self._compare_rows(inputs)

    def _record_calls(self, inputs: dict[str, Any]) -> list[Call]:
        """Run the case without code generation, to see which pairs its tables compute."""
        other = Check(self.case, FlexPrefillBackend(), has_code=False)
        other._run_compiled(inputs)
        return other.calls

    def _run_eager(self, inputs: dict[str, Any]) -> Tensor:
        try:
            return self.names["model"](**inputs)
        except Exception as error:
            raise InvalidCaseError(f"eager: {type(error).__name__}: {error}") from error

    def _run_compiled(self, inputs: dict[str, Any]) -> Tensor:
        self.calls = []
        try:
            if self.has_code:
                return self.compiled(**inputs)
            with without_code_generation(attend=self._attend_and_record):
                return self.compiled(**inputs)
        except Exception:
            self._check_compilable(inputs)
            raise

    def _check_compilable(self, inputs: dict[str, Any]) -> None:
        """Raise if torch.compile fails without this backend too."""
        backend = "inductor" if self.has_code else "eager"
        compiled = torch.compile(self.names["model"], backend=backend, dynamic=self.case.is_dynamic)
        try:
            compiled(**inputs)
        except Exception as error:
            raise InvalidCaseError(f"torch.compile: {type(error).__name__}: {error}") from error

    def _check_inductor(self, actual: Tensor, inputs: dict[str, Any]) -> None:
        """Raise if inductor gives the same without this backend, which rewrote nothing."""
        if not self.has_code or self.backend.report.num_rewritten:
            return
        alone = torch.compile(self.names["model"], backend="inductor", dynamic=self.case.is_dynamic)(**inputs)
        if torch.allclose(alone, actual, rtol=0, atol=0, equal_nan=True):
            raise InvalidCaseError("inductor alone: its code gives another result than eager")

    def _attend_and_record(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, key, _, _, block_mask, _, _, _, captures = arguments
        is_dense = self.case.options["gamma"] == 1
        allowed = find_allowed(query, key, block_mask, captures)
        self.calls.append(Call(allowed, check_tables(allowed, block_mask, is_dense=is_dense)))
        return attend_checked(*arguments, is_dense=is_dense)

    def _compare(
        self,
        output: Tensor,
        attentions: list[Attention],
        computed: list[Tensor] | None,
        what: str,
        error: type[Exception],
    ) -> None:
        """Compare an output with the oracle, but for rows without keys."""
        tail: Callable[[Tensor], Tensor] = self.names["tail"]
        pairs = computed or [None] * len(attentions)
        expected = sum(attention.attend(pair) for attention, pair in zip(attentions, pairs, strict=True))
        has_keys = attentions[0].has_keys.expand(expected.shape)
        poisoned = torch.stack([a.poisoned.expand(expected.shape) for a in attentions]).any(0)
        expected, has_keys, poisoned = (
            tail(x.double().transpose(1, 2).contiguous().transpose(1, 2)) for x in (expected, has_keys, poisoned)
        )
        if output.shape != expected.shape:
            raise error(f"{what} has shape {tuple(output.shape)}, not {tuple(expected.shape)}")
        is_live, is_poisoned = has_keys.bool(), poisoned.bool()
        allowed = sum(allowed_error(a, output.dtype, has_fast_exponential=self.has_code) for a in attentions)
        missing = is_live & is_poisoned & output.isfinite()
        if missing.any():
            raise error(f"{what} is finite where it depends on a number that isn't, at {_first(missing)}")
        compared = is_live & ~is_poisoned & (output.isfinite() | attentions[0].is_finite)
        off = compared & ~((output.double() - expected).abs() <= allowed)
        if off.any():
            largest = float((output.double() - expected).abs()[compared].nan_to_num(torch.inf).max())
            count = f"{int(off.sum())} of {off.numel()} numbers"
            raise error(f"{what} is off by {largest:.2e} ({allowed:.1e} allowed) in {count}, first {_first(off)}")

    def _compare_layout(self, actual: Tensor, eager: Tensor) -> None:
        if (actual.shape, actual.dtype) != (eager.shape, eager.dtype):
            raise WrongError(f"{actual.dtype} {tuple(actual.shape)}, eager: {eager.dtype} {tuple(eager.shape)}")
        strides = [
            [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1] for x in (actual, eager)
        ]
        if strides[0] != strides[1]:
            raise WrongError(f"strides {actual.stride()}, eager {eager.stride()} of {tuple(eager.shape)}")

    def _compare_rows(self, inputs: dict[str, Any]) -> None:
        """Each row of the batch alone computes the blocks that it computes in the batch."""
        calls, batch = self.calls, self.case.batch
        if self.case.is_dynamic or batch == 1 or self.has_code:
            return
        for row in range(batch):
            self._run_compiled(self.case.take_row(inputs, row))
            for call, alone in zip(calls, self.calls, strict=False):
                if not torch.equal(call.computed[row], alone.computed[0]):
                    differing = int((call.computed[row] != alone.computed[0]).sum())
                    raise WrongError(f"row {row} of the batch computes other pairs alone: {differing} differ")

    def _check_coverage(self, attention: Attention, call: Call) -> None:
        """The last block of queries reaches gamma by the paper's estimator, where every head is vertical-slash."""
        options = self.case.options
        is_paper = options.get("estimator") == "flexprefill"
        if options["tau"] > 0 or not is_paper or not self.case.is_one_sequence:
            return
        weights = attention.weights()
        num_queries, num_keys = weights.shape[-2:]
        own = torch.arange(num_keys).sub(self.case.start).clamp(0, num_queries - 1)
        is_valid = attention.visible[..., own, torch.arange(num_keys)]
        last = attention.visible[..., -BLOCK:, :]
        positions = torch.arange(num_queries)[-BLOCK:] + self.case.start
        are_all_valid = is_valid[..., positions].all() and not (last & ~is_valid.unsqueeze(-2)).any()
        if num_queries < BLOCK or not are_all_valid or weights.isnan().any():
            return
        shares = (weights * call.computed)[..., -BLOCK:, :].sum(-1).mean(-1)
        slack = 64 * torch.finfo(self.case.dtype).eps
        if (shares < options["gamma"] - slack).any():
            raise WrongError(f"coverage {float(shares.min()):.4f}, less than gamma {options['gamma']}")

    def _check_reasons(self) -> None:
        """A reason never shows an error of ours."""
        for site in self.backend.report.sites:
            is_internal = site.reason is SkipReason.LOWERING_FAILED and not self.has_code
            shows_error = any(word in site.detail for word in ("Error", "Exception", "Traceback"))
            if is_internal or (shows_error and site.reason is not SkipReason.LOWERING_FAILED):
                raise WrongError(f"the reason shows an internal error: {site.reason}: {site.detail}")


def _check_mask(call: Call, attention: Attention) -> None:
    """What was lifted is the mask itself."""
    differs = (call.allowed != attention.visible) & attention.has_keys
    if differs.any():
        raise WrongError(f"the lifted mask is not the model's, at {_first(differs)}")


def _first(where: Tensor) -> str:
    return str(where.nonzero()[0].tolist())
