"""What runs have recorded, as pages: of one run, or of several beside each other.

Data goes one way. ``records`` reads a run's folder; ``results`` makes rows of its summary, for the
terminal too; ``plots`` and ``classes`` make figures in the style of ``figures``; ``page`` (one run)
and ``comparison`` (several, each an entry of ``entries`` with its ``differences``) put them
together, ``numbers`` says how a number is printed, and ``document`` is the HTML around it all.
``tensorboard`` writes records for that viewer while a run
goes on. Nothing here trains or measures: what a page says stands in the run's folder.
"""

from typing import TYPE_CHECKING

from classroomkd.lazy import exports

if TYPE_CHECKING:
    from classroomkd.report.page import write_report
    from classroomkd.report.records import label
    from classroomkd.report.run_table import results_table

__all__ = ["label", "results_table", "write_report"]
if not TYPE_CHECKING:  # checkers would take every name to be there
    __getattr__, __dir__ = exports(
        __name__, {"page": "write_report", "records": "label", "run_table": "results_table"}
    )
