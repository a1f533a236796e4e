"""Estimates of a training run: FLOPs, memory and time, from sizes alone.

shapes.py          sizes of a model
training_setup.py  what is trained and how; sizes of the sequences
step_design.py     which costs a step avoids
flops.py           FLOPs of a step, by part of the model
gpus.py            data sheets of GPUs
assumptions.py     efficiencies and other numbers that are neither counted nor stated
memory.py          bytes on each GPU
work.py            FLOPs and bytes of a step, by kind of kernel
micro_batch_time.py  seconds of a micro-batch
dealing.py         deals the sequences of a step to ranks and micro-batches
step_time.py       seconds of a step
plan.py            all of it together: the estimate of a run
calibration.py     corrections from a measured step
"""
