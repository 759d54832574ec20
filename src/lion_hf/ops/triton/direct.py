"""Operators of PyTorch whose kernels are launched directly where nothing but autograd sees them.

On the host, a call of an operator of `torch.library` takes longer than the launches inside it. Graphs, dispatch modes
(selective checkpointing, counters of FLOPs), transforms and subclasses of Tensor need the operator; other calls do not.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..checks import makes_graph


_PLAIN = frozenset([Tensor, torch.nn.Parameter])


def _on_its_device(launch: Callable) -> Callable:
    """Make the device of the first tensor current during a call: Triton launches on the current device."""

    @functools.wraps(launch)
    def on_device(first, *arguments):
        if not first.is_cuda or first.get_device() == torch.cuda.current_device():
            return launch(first, *arguments)
        with torch.cuda.device_of(first):
            return launch(first, *arguments)

    return on_device


def is_watched(tensors: Sequence[Tensor]) -> bool:
    """Whether anything but autograd takes part in a call with these tensors."""
    return (
        makes_graph()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or not _PLAIN.issuperset(map(type, tensors))
        or tensors[0].is_meta
        or any(map(torch._C._functorch.is_legacy_batchedtensor, tensors))  # is_grads_batched=True
    )


class KernelOperator:
    """A differentiable function that launches kernels: an operator of PyTorch, or the same without the operator.

    Args:
        name: name of the operator, "namespace::name".
        launch: the function, with type hints as `torch.library.custom_op` requires. The first argument is a tensor,
            all are positional, and no result shares memory with an argument.
        fake: returns empty results for the same arguments.
        save: stores in a context what `differentiate` needs, for (context, arguments, results); nothing by default.
        differentiate: returns the gradient of each argument for a context and the gradients of the results; None
            (default) if there is none.
    """

    def __init__(
        self,
        name: str,
        launch: Callable,
        *,
        fake: Callable,
        save: Callable = lambda ctx, inputs, output: None,
        differentiate: Callable | None = None,
    ):
        launch = self.launch = _on_its_device(launch)
        self.operator = self.differentiable = torch.library.custom_op(name, launch, mutates_args=())
        self.operator.register_fake(fake)
        if differentiate is None:
            return
        self.operator.register_autograd(differentiate, setup_context=save)

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *arguments):  # setup_context would take longer: PyTorch then binds them to the signature
                output = launch(*arguments)
                save(ctx, arguments, output)
                return output

            backward = staticmethod(differentiate)

        self.differentiable = Function.apply

    def __call__(self, *arguments):
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        if is_watched(tensors):
            return self.operator(*arguments)
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return self.differentiable(*arguments)
        return self.launch(*arguments)
