"""Tables and plots from a run's records."""

from classroomkd.report.page import write_report
from classroomkd.report.records import label
from classroomkd.report.results import results_table

__all__ = ["label", "results_table", "write_report"]
