"""Triton only: device functions, kernels and their launch. Imported as ``classroomkd.kernels``."""
