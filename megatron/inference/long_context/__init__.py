"""What a model makes of a long context: its loss by the number of tokens before a token, and whether it finds a number in a long text."""
