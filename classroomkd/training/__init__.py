"""Training: from a recipe and images to trained networks, and the records of how they came to be.

``commands`` reads what was asked into a recipe (``config``; files and overrides are its ``layers``,
``keys`` lists it), looks at the ``folders``, and only then imports torch: the images
(``images``) and the recipe go to ``classroom``, which knows the order of things: mentors
(``mentors``, ``store``), then the student. ``networks`` brings one network to its last epoch, from
wherever it stands, with ``checkpoints`` and ``evaluation``; ``trainer`` is the one loop over
batches, whose step is mentors (``mentor_bank``, ``fold``), method and optimizer, captured on a GPU
(``graph``). ``run`` writes the folder that ``classroomkd.report`` reads. What a loss is, or a
loader, is not decided here.
"""
