"""A run: a recipe and images become trained networks in a folder, with the records of each epoch.

``recipe`` holds every value that decides a run: files and overrides are its ``recipe_layers``,
``recipe_checks`` has their ranges, ``recipe_keys`` lists its keys, and ``identity`` says which of
them tell results apart.
``training_run`` has the order of a run: the images (``images``), the mentors (``mentor_setup``),
then the student; ``builder`` makes them. ``networks`` trains one network to its last epoch, or
resumes it, with ``checkpoints``; what it is in the run is its job (``jobs``), and mentors trained
before come from the ``store``, as ``stored_mentors`` says. ``run_folder`` writes the folder that
``classroomkd.report`` reads, ``paths`` finds it without torch. The step itself is
``classroomkd.training``.
"""
