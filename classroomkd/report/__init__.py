"""Pages made from records: of one run, of several runs compared, of a table.

``records`` reads a run folder. ``run_table`` formats its summary, also for the terminal; ``plots``
and ``classes`` choose what is shown, on the axes of ``axes``, and ``drawing`` draws it. ``page``
(one run), ``comparison`` (several, each an ``Entry`` of ``entries`` with its ``differences``) and
``table_page`` (a table of `classroomkd reproduce`, over its ``seeds``, with ``published`` numbers)
put them together. ``numbers`` formats numbers, ``markup`` writes the HTML, and ``export`` the files
for a paper. Nothing here trains or measures.
"""

from typing import TYPE_CHECKING

from classroomkd.lazy import exports

if TYPE_CHECKING:
    from classroomkd.report.page import write_report
    from classroomkd.report.records import label
    from classroomkd.report.run_table import results_table

__all__ = ["label", "results_table", "write_report"]
if not TYPE_CHECKING:  # with __getattr__, type checkers would accept any name
    __getattr__, __dir__ = exports(
        __name__, {"page": "write_report", "records": "label", "run_table": "results_table"}
    )
