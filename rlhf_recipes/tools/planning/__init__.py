"""Memory of a run, computed before it starts and without its weights."""
