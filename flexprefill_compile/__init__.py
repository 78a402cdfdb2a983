"""Sparse prefill for any PyTorch model: ``torch.compile(model, backend="flexprefill")``."""

from flexprefill_compile import block_masks
from flexprefill_compile.config import InvalidOptionError, SparsePrefillConfig
from flexprefill_compile.decorator import sparse_prefill
from flexprefill_compile.explain import explain
from flexprefill_compile.policy import LayerPolicy, ModelShape, Policy
from flexprefill_compile.quality.audit import audit
from flexprefill_compile.quality.audit_report import AuditReport
from flexprefill_compile.quality.calibrate import Calibration, calibrate
from flexprefill_compile.registry import register_estimator
from flexprefill_compile.report import AttentionSkippedError, RewriteReport, SkipReason

__all__ = [
    "AttentionSkippedError",
    "AuditReport",
    "Calibration",
    "InvalidOptionError",
    "LayerPolicy",
    "ModelShape",
    "Policy",
    "RewriteReport",
    "SkipReason",
    "SparsePrefillConfig",
    "audit",
    "block_masks",
    "calibrate",
    "explain",
    "register_estimator",
    "sparse_prefill",
]
