"""Models in number formats of few bits: in training (`training`), and with weights quantised once (`weights`).

Free of JAX at import: a run's configuration holds these.
"""
