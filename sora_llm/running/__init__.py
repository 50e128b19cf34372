"""The parts of a run, from its config to its end; `sora_llm.train` puts them in order.

In the order of a run: inputs, run_folders, unpack · training_data, data_summary · data_lineage, held_out · plan ·
processes · job, config_warnings, summary, start · training, assembly · training_loop, optimizer_step · alarms,
early_stopping · metrics, evaluation · snapshot · rounds · finish, verified_export, layouts; and dry_run, rundir
and run_state (the run's files), stop and liveness, packing_check.
"""
