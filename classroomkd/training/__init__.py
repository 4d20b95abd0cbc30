"""The training loop and evaluation.

``trainer`` is the loop: images and targets from a loader, mentors (``mentor_bank``, with batch
norms folded by ``fold``), a method's loss, and the optimizer, with a ``schedule``. On a GPU it is
captured in a CUDA graph (``graph``); several processes can share it (``distributed``).
``mentor_cache`` reads mentors' logits from ``logits_files`` instead of running the mentors, and
``mentor_check`` looks for faults in them. ``evaluation`` measures a network, and ``config`` holds a
recipe's training values. This package knows nothing about runs or the command line.
"""
