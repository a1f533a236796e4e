"""What lmms-eval loads: the runner, a model and tasks. It runs in lmms-eval's environment and imports no gasp_fast."""
