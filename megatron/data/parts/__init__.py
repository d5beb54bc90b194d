"""Large corpora, a file at a time: each input file becomes a part that is kept, and the parts become one pair."""
