"""The geometric loss, from its arguments to PyTorch operators.

function.py        `gasp_loss`: one call for all layers
module.py          `GaspLoss`: the same as an `nn.Module`
matches.py         `Matches`: the ground truth, validated once
metric.py          `in_metric`: embeddings that stand for longer vectors
frame_matching.py  `frame_match`: each query token against each frame of its sequence
naive.py           `naive_loss`: the definition in plain PyTorch; the tests compare with it in float64
dense.py           the `torch` backend
config.py          `LossConfig`: the arguments that a recipe sets
arguments.py       checks of arguments
reduction.py       from terms to a loss
autograd.py        gradients of the operators
operators.py       PyTorch operators on top of `gasp_fast.kernels`
"""
