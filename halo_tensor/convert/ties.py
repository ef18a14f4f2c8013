"""Parameters that several modules of a model hold, as a tied output embedding."""

from torch import nn

from halo_tensor.layers.hooks import update_hooks

#: id of a parameter that several modules hold -> those modules and their names for it
Ties = dict[int, list[tuple[nn.Module, str]]]


def tied_parameters(model: nn.Module) -> Ties:
    """Return the parameters that several modules hold."""
    holders: Ties = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((module, name))
    return {key: held for key, held in holders.items() if len(held) > 1}


def tie_again(ties: Ties) -> None:
    """Where one holder of a tied parameter has got a new one, give it to all of them."""
    for key, holders in ties.items():
        new = [getattr(m, name) for m, name in holders if id(getattr(m, name)) != key]
        for module, name in holders if new else ():
            setattr(module, name, new[-1])
            update_hooks(module)
