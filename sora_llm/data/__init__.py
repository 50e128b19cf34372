"""From files to batches: formats.py (rows → examples), tokenize.py (examples → ids and loss mask), loader.py (cache,
order, shares, batches)."""
