"""From files to batches.

local_files.py, sources.py, readers.py (files → rows) → formats.py (a row → examples) → templates.py (built in:
builtin_templates.py; parts they drop: template_gaps.py), tokens.py, tokenize.py (examples → ids and weights) →
prepare.py (all of it, in parallel: chunks.py, pool.py; once: cache.py; counted: report.py, shown: show.py, progress.py)
→ dataset.py (tokens on disk) → order.py, pack.py or stream.py (which rows a step takes) → batches.py.

prompts.py encodes prompts for the trained model with the tokens of training and finds where its answers end.
"""
