"""Plain hooks, so that the tables of the families are held against what the unmodified modules really do."""

import functools

import pytest
import torch

from causalpatch.models import BiasTerm, HeadShare, open_model
from causalpatch.sites import parse
from causalpatch.testing.tiny import tiny_model

torch.set_num_threads(1)


class Probe:
    """A tiny model of one family whose tensors are read and changed through its own taps."""

    def __init__(self, module, ids, family=""):
        self.module, self.family = module, family
        self.model = open_model(module)
        self.ids = ids

    def run(self, ports=(), change=None):
        """Run the model; return its logits and the tensors at the ports. ``change``: (port, function in place)."""
        seen, hooks = {}, []
        for port in {*ports, *([change[0]] if change else [])}:
            part = self.module.get_submodule(port.path)
            hook = functools.partial(self._meet, port, seen, change)
            if port.side == "input":
                hooks.append(part.register_forward_pre_hook(functools.partial(hook, None), with_kwargs=True))
            else:
                hooks.append(part.register_forward_hook(functools.partial(self._after, hook), with_kwargs=True))
        try:
            with torch.no_grad():
                places = torch.arange(self.ids.shape[1]).expand(self.ids.shape)
                output = self.module(**self.model.inputs(self.ids, torch.ones_like(self.ids).bool(), places))
        finally:
            for hook in hooks:
                hook.remove()
        return self.model.logits(output), seen

    def _after(self, hook, module, args, kwargs, output):
        return hook(output, module, args, kwargs)

    def _meet(self, port, seen, change, output, module, args, kwargs):
        if port.side == "input":
            key = 0 if args else next(iter(kwargs))
            tensor = args[0] if args else kwargs[key]
        else:
            key = port.items[0] if port.items else 0 if isinstance(output, tuple) else None
            tensor = output if key is None else output[key]
        # Where rows and positions are elsewhere, they are those of the ids.
        apart = tensor if port.like is None else tensor.reshape(*self.ids.shape, tensor.shape[-1])
        if change is None or change[0] != port:
            seen[port] = apart.clone()
            return None
        apart = apart.clone()
        change[1](apart, seen)
        seen[port] = apart.clone()  # some models add to what they are given in place
        tensor = apart.reshape(tensor.shape)
        if port.side == "input":
            return ((tensor, *args[1:]), kwargs) if args else (args, {**kwargs, key: tensor})
        if key is None:
            return tensor
        if isinstance(output, tuple):
            return (tensor, *output[1:])
        output[key] = tensor
        return output

    def read(self, *texts):
        """Return the values of sites in one run, and the logits last."""
        taps = [self.model.tap(parse(text)) for text in texts]
        logits, seen = self.run({port for tap in taps for port in (tap.port, *tap.companions)})
        values = [tap.view.read(seen[tap.port], tuple(seen[port] for port in tap.companions)) for tap in taps]
        return [*values, logits]

    def tensor(self, port):
        """Return the tensor at a port."""
        return self.run([port])[1][port]

    def write(self, text, make, places=None):
        """Write ``make(value)`` at places (row, position); return the value before and after, and the logits.

        For a head's share or a bias, the value after is the whole output of the projection.
        """
        tap = self.model.tap(parse(text))
        rows, positions = torch.meshgrid(*map(torch.arange, self.ids.shape), indexing="ij")
        index = (rows.flatten(), positions.flatten()) if places is None else tuple(map(torch.tensor, places))
        before, *_ = self.read(text)

        def put(tensor, seen):
            companions = tuple(seen[port] for port in tap.companions)
            tap.view.write(tensor, companions, index, make(tap.view.read(tensor, companions)[index].clone()))

        logits, seen = self.run(tap.companions, change=(tap.port, put))
        companions = tuple(seen[port] for port in tap.companions)
        is_term = isinstance(tap.view, HeadShare | BiasTerm)
        after = seen[tap.port] if is_term else tap.view.read(seen[tap.port], companions)
        return before.detach(), after, logits


@functools.cache
def _probe(family):
    ids = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(5))
    return Probe(tiny_model(family, seed=3), ids, family)


@pytest.fixture
def probe():
    """Return a function from a family's name to its probe."""
    return _probe


@pytest.fixture
def probe_of():
    """Return a function from any module and ids to its probe."""
    return Probe
