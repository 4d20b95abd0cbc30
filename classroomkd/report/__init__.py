"""What runs have recorded, as pages: of one run, of several beside each other, of a table.

``records`` reads a run's folder. ``run_table`` makes rows of its summary, for the terminal too;
``plots`` and ``classes`` make figures on the axes of ``axes``. ``page`` (one run),
``comparison`` (several, each an entry of ``entries`` with its ``differences``) and ``table_page``
(a table of `classroomkd reproduce`, over its ``seeds``, beside what is ``published``) put them
together. ``numbers`` says how a number is printed, and ``markup`` is the HTML around it all.
Nothing here trains or measures.
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
