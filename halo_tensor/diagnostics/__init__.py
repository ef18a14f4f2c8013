"""Look at a model and a machine: which recipe suits the model, where a NaN comes from, and what the machine runs."""

from halo_tensor.calibration.candidates import CANDIDATES
from halo_tensor.diagnostics.machine import environment
from halo_tensor.diagnostics.nonfinite import NonFiniteError, find_nonfinite
from halo_tensor.diagnostics.reports.api import Report, report

__all__ = ["CANDIDATES", "NonFiniteError", "Report", "environment", "find_nonfinite", "report"]
