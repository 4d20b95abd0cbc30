"""Training: the trainer, its schedules, the run folder, the whole classroom."""
