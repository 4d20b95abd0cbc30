"""Tables and plots from a run's records."""

from classroomkd.report.page import write_report
from classroomkd.report.results import results_table

__all__ = ["results_table", "write_report"]
