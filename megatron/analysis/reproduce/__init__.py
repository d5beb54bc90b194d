"""The papers' claims in miniature: the protocol, its runs, and the document that they become."""
