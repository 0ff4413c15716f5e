"""How much memory a run takes, computed before it starts and without its weights."""
