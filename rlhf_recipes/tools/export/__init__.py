"""Export of a finished stage: an adapter or a merged model with its tokenizer and a model card, for use elsewhere."""
