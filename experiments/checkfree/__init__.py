"""Losing stages in training: CheckFree and what it must be compared with, on the same failures (`compare`)."""
