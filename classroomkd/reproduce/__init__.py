"""`classroomkd reproduce`: the runs of a table, compared with published numbers.

``tables`` defines the classrooms and variants of each table, ``plan`` turns them into tasks,
``runner`` runs each task in a process, ``status`` reads their progress from the run folders, and
``collect`` gathers the results of finished runs. Training belongs to ``classroomkd.runs``,
aggregation over seeds and pages to ``classroomkd.report``.
"""
