"""PPO: its maths, configuration, critic and trainer."""
