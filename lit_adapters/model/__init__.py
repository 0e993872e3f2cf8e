"""What is done to a model: choose targets, attach, report, merge, calibrate, shard."""
