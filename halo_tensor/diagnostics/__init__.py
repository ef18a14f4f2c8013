"""Looking at a model: which recipe suits it, where a NaN comes from, and what it runs on."""

from halo_tensor.diagnostics.environment import environment
from halo_tensor.diagnostics.nonfinite import NonFiniteError, find_nonfinite
from halo_tensor.diagnostics.report import CANDIDATES, report
from halo_tensor.diagnostics.result import Report

__all__ = ["CANDIDATES", "NonFiniteError", "Report", "environment", "find_nonfinite", "report"]
