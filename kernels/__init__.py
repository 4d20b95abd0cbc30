"""Triton only: device functions, the kernels made of them, and their launch.

Imported as ``classroomkd.kernels``. ``device`` has what kernels share. The loss is ``classroom``,
whose rows stay in registers, or ``tiled`` with ``tiled_scan``, for rows too long for that; the
resident loader's batches are ``augment``. ``launch`` cuts the work into blocks and makes the
outputs; ``ahead_of_time`` compiles everything for GPUs that need not be there. Nothing here checks
arguments or knows of defaults: tensors come checked from ``classroomkd.loss`` and
``classroomkd.data``.
"""
