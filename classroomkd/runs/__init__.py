"""A run: a recipe and images become trained networks in a folder, with the records of each epoch.

``recipe`` holds every value that determines a run; ``recipe_layers`` merges files and overrides,
``recipe_checks`` checks ranges, ``recipe_keys`` lists the keys, and ``identity`` marks those that
identify a result. ``training_run`` executes a run in order: images (``images``), mentors
(``mentor_setup``), student; ``builder`` makes the networks. ``networks`` trains or resumes one
network as described by its job (``jobs``), with ``checkpoints``; mentors trained by earlier runs
come from the ``store`` (``stored_mentors``), and their logits from files (``mentor_answers``).
``context`` has what these parts share. ``run_folder`` writes the folder that ``classroomkd.report``
reads, and ``paths`` finds it without torch. The training step itself is in
``classroomkd.training``.
"""
