"""Which tokens make sample i? The order of documents and the cuts between samples, and the samples themselves, packed or of whole documents."""
