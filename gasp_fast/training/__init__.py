"""Training on one process, under DDP or under DeepSpeed.

loop.py         the training loop: batches, forward, backward, clip, step, log, save
config.py       `TrainConfig`: a run as a recipe describes it; weights of the losses
model.py        the model and its supervision in one module, with the forward pass of a step
sources.py      samples from tracked scenes and from questions about videos
stream.py       which sample comes at which step on which process; the data loader
optim.py        optimizer and parameter groups
state.py        model, optimizer and schedule on the device; how they are saved and loaded
weights.py      trained weights on disk
checkpoints.py  checkpoint folders, rotation, random number generators
distributed.py  rank, process group, DeepSpeed configuration
signals.py      signals that end a run early, saved; ends of loader workers
launch.py       torchrun that passes signals on and ends with the exit code of the ranks
guards.py       checks that stop a run early
log.py          log.jsonl, progress bar, trackers
start_up.py     time to the first step
summary.py      table and figure of a finished run
dry_run.py      `--dry-run`
workload.py     FLOPs of a batch, for the MFU in the log and for `gasp-fast plan`
"""
