"""Training steps compiled ahead of time for machines that are not there."""
