"""What a predictor does with a call: its inputs, options and answers."""
