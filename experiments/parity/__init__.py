"""Parallel equals single-device: what that means (`compare`), and the whole matrix of meshes (`matrix`)."""
