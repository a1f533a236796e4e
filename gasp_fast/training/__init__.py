"""The training engine, one idea a file: `settings`, `data`, `modality`, `optim`, `guards`, `log`, `trainer`."""
