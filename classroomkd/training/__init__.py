"""The training step: one loop over batches, and the measurement of what it has trained.

``trainer`` is the loop: images and targets from a loader, mentors (``mentor_bank``, with their
batch norms folded by ``fold``), a method's loss, and the optimizer, on a ``schedule``; captured on
a GPU (``graph``) and shared among processes (``distributed``). ``evaluation`` measures a network,
``config`` has the values that determine a training. This package knows nothing of runs, files or
the command line.
"""
