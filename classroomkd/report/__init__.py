"""Pages made from records: of one run, of several runs compared, of a table.

``records`` reads a run folder. ``run_table`` formats its summary, also for the terminal; ``plots``
and ``classes`` choose what is shown, on the axes of ``axes``, and ``drawing`` draws it. ``page``
(one run), ``comparison`` (several, each an ``Entry`` of ``entries`` with its ``differences``) and
``table_page`` (a table of `classroomkd reproduce`, over its ``seeds``, with ``published`` numbers)
put them together. ``numbers`` formats numbers, ``markup`` writes the HTML, and ``export`` the files
for a paper. Nothing here trains or measures.
"""
