"""A labelling page on this machine: people compare answers, and every judgement is kept with where it comes from."""
