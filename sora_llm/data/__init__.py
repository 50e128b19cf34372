"""From files to batches.

local_files.py, sources.py, readers.py (files → rows) → formats.py (a row → examples) → templates.py (built in:
builtin_templates.py; what they pass over: template_gaps.py), tokens.py, tokenize.py (examples → ids and weights) →
prepare.py (all of it, in parallel: chunks.py, pool.py; once: cache.py; counted: report.py, shown: show.py, progress.py)
→ dataset.py (tokens on disk) → order.py, pack.py or stream.py (which rows a step takes) → batches.py.

prompts.py is how the model is asked afterwards, with the tokens of training, and where its answers end.
"""
