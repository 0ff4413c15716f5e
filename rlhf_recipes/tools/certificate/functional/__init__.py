"""The numbers of a reward model's certificate: arrays in, numbers out, without a model."""
