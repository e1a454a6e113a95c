"""One file a command: options as a dataclass, and a call of what does the work."""
