"""Feedback of models in place of people's: labels of pairs, and answers that are criticised and revised."""
