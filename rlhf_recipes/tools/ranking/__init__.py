"""Rankings from votes: strengths with intervals, and which pair to ask about next."""
