"""Numbers about scores, texts and judgements: estimates with their intervals. Arrays in, numbers out."""
