"""torch's optimizers without what slows down the start of a run."""

from __future__ import annotations

import inspect

import torch


class Undecorated(torch.optim.Optimizer):
    """An optimizer of torch without the decorators that keep its methods out of torch.compile.

    The first call of a decorated method imports the compiler (torch._dynamo), which takes 1 s at the start of a run.
    The engine never compiles an optimizer, so the undecorated methods do. tests/engine/test_optim.py checks that they
    do not import the compiler, tests/engine/test_optimizers.py that a step equals torch's, bit for bit.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class AdamW(Undecorated, torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019)."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class SGD(Undecorated, torch.optim.SGD):
    """Stochastic gradient descent with momentum (Sutskever et al. 2013)."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


class Adafactor(Undecorated, torch.optim.Adafactor):
    """Adafactor (Shazeer & Stern 2018); torch does not decorate its step."""
