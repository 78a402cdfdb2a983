"""Sparse prefill for any PyTorch model: ``torch.compile(model, backend="flexprefill")``."""

from importlib.metadata import version as _version

from flexprefill_compile import block_masks

from .decorator import sparse_prefill
from .deployment.export import export, export_report
from .deployment.layers import compile_layers_once
from .explain import explain
from .integrations import register_transformers
from .quality.audit.audit import audit
from .quality.audit.report import AuditReport
from .quality.calibration.calibrate import Calibration, calibrate
from .report import AttentionSkippedError, RewriteReport, SkipReason
from .settings.config import InvalidOptionError, SparsePrefillConfig
from .settings.policy import LayerPolicy, ModelShape, Policy
from .settings.registry import register_estimator

__version__ = _version("flexprefill-compile")

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
    "compile_layers_once",
    "explain",
    "export",
    "export_report",
    "register_estimator",
    "register_transformers",
    "sparse_prefill",
]
