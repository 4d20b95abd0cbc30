"""`classroomkd reproduce`: tables of many runs, with the published numbers beside them.

``tables`` says which classrooms and variants a table has, ``plan`` makes tasks of them, ``runner``
runs each as a process of its own, and ``status`` reads from the folders how far they are.
``results`` collects what finished runs have left and adds it up over the seeds, ``page`` writes it;
``commands`` is the command line. How a run trains belongs to ``classroomkd.training``, and how a
page looks to ``classroomkd.report``.
"""
