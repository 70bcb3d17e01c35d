"""The operator: three maps, their backends, and the functions that users call."""
