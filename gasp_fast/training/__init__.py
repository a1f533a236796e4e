"""Training on one process, under DDP or under DeepSpeed.

the loop
  loop.py         next batches, forward, backward, clip, step, log, evaluate, save
  objective.py    what the loop asks of the thing that it trains
  averages.py     what the losses of a step are averaged over
  optim.py        optimizer and parameter groups
  state.py        model, optimizer and schedule on the device; how they are saved and loaded
  held_out.py     evaluation on held-out scenes: when, and what follows from it

GASP
  gasp.py         GASP as the loop sees it
  model.py        the model and its supervision in one module, with the forward pass of a step
  workload.py     FLOPs of a batch, for the MFU in the log and for `gasp-fast plan`

data
  sources.py      samples from tracked scenes and from questions about videos
  stream.py       which sample comes at which step on which process
  sizes.py        the predicted size of a sample, by which a step is dealt to the processes
  loader.py       batches that are ready for a step
  replacing.py, skipped.py    samples that could not be used, and those in their place

checkpoints
  checkpoints.py  folders that are complete or absent; which one a run continues from
  saving.py       writes them, also while training goes on
  weights.py, optimizer_state.py, random_state.py    what they hold
  earlier_checkpoints.py                             reads those of earlier versions
  same_run.py     what may change between a run and its continuation

start and end
  config.py       `TrainConfig`: a run as a recipe describes it
  distributed.py  rank, process group, DeepSpeed configuration
  launch.py       torchrun that passes signals on and ends with the exit code of the ranks
  signals.py      signals that end a run early, saved; ends of loader workers
  guards.py       checks that stop a run early
  start_up.py     time to the first step
  starts.py       run.json: what ran
  dry_run.py      `--dry-run`

reports
  log.py          log.jsonl, progress bar, trackers
  summary.py      table and figure of a finished run
  curves.py       curves of one run or of several
"""
