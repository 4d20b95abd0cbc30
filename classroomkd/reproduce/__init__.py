"""`classroomkd reproduce`: many runs, for tables with the published numbers beside them.

``tables`` says which classrooms and variants a table has, ``plan`` makes tasks of them, ``runner``
runs each as a process of its own, and ``status`` reads from the folders how far they are.
``collect`` gathers what finished runs have left. How a run trains belongs to ``classroomkd.runs``;
sums over seeds and pages belong to ``classroomkd.report``.
"""
