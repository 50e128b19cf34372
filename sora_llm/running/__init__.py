"""The parts of a run, from its config to its end; `sora_llm.train` puts them in order.

In the order of a run: inputs, unpack · training_data, data_words, held_out · plan · processes · job, announcement,
start · training, assembly · stages, loop · sparsity_controller, alarms · measures, evaluation · snapshot · rounds ·
ending, verified_export, layouts; beside them rehearsal (the dry run), rundir and run_state (its files), stop and
lifeline, packing_proof.
"""
