"""Relevance propagation by gradients (RelP): the forward is the model's own, the way back goes by other rules.

==============  =====================================================================  =====================
part            rule                                                                   name
==============  =====================================================================  =====================
norms           what they divide by is a constant                                      LN-rule
activations     act(x) = x (act(x) / x), the quotient a constant, act'(0) at x = 0     identity rule
gated MLPs      what goes into the product of gate and up projection counts half       half rule
all else        as it is (linear maps: the 0-rule; attention: its own gradient)
==============  =====================================================================  =====================

Norms are found by their formula (``chains.norm_of``), in all of the model; activations are the modules without weights
in a layer, outside of its attention, that give as many numbers as they take and not the same ones.

References:
    Jafari et al. 2025, "RelP: Faithful and Efficient Circuit Discovery via Relevance Patching", 2508.21258, table 1.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from causalpatch.base.errors import ModelUnsupported
from causalpatch.engine.bypass import in_this_thread
from causalpatch.engine.chains import Norm, norm_of
from causalpatch.engine.slopes import require_one_stream
from causalpatch.models import Model, Port
from causalpatch.models.table import attention_path, join
from causalpatch.sites import Site


class Relevance:
    """The rules in one model.

    Args:
        model: The model.

    Raises:
        ModelUnsupported: Its layers are not known by name, or a norm is of a kind whose formula is not known.
    """

    def __init__(self, model: Model) -> None:
        require_one_stream(model, "the rules of RelP cannot be applied", 'method="atp"')
        if model.family is None or "resid_pre" in model.shape.refused:
            raise ModelUnsupported(
                f"the rules of RelP cannot be applied to '{model.name}'",
                facts=[("why", "its norms, activations and gates are not known by name")],
                fix='method="atp"',
            )
        self.model = model
        layers = [model.tap(Site("resid_post", layer)).port.path for layer in range(model.shape.n_layers)]
        inside = [f"{join(layer, attention_path(model.family))}." for layer in layers]
        self.norms: dict[str, Norm] = {}
        for name, part in model.module.named_modules():
            weight = getattr(part, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 1:
                found = norm_of(part, len(weight))
                if found is not None:
                    self.norms[name] = found
        for layer in layers:
            for norm in model.family.norms:
                if join(layer, norm) not in self.norms:
                    raise ModelUnsupported(
                        f"the rules of RelP cannot be applied to '{model.name}'",
                        facts=[("why", f"'{join(layer, norm)}' is a norm of a kind that is not known")],
                        fix='method="atp"',
                    )
        self.activations = [
            name
            for name, part in model.module.named_modules(remove_duplicate=False)
            if name.startswith(tuple(f"{layer}." for layer in layers))
            and not name.startswith(tuple(inside))
            and not any(True for _ in part.parameters())
            and not any(True for _ in part.children())
            and not isinstance(part, nn.Dropout | nn.Identity)
        ]
        for layer in layers:
            if not any(name.startswith(f"{layer}.") for name in self.activations):
                raise ModelUnsupported(
                    f"the rules of RelP cannot be applied to '{model.name}'",
                    facts=[("why", f"the activation of the MLP in '{layer}' is a function, not a module")],
                    fix='method="atp"',
                )

    @contextmanager
    def applied(self) -> Iterator[Mapping[Port, float]]:
        """Apply the rules while it is open; give what gradients are multiplied by at ports."""
        with ExitStack() as hooks:
            for name, norm in self.norms.items():
                hook = in_this_thread(partial(_fixed_norm, norm))
                hooks.callback(self.model.module.get_submodule(name).register_forward_hook(hook).remove)
            shared = {id(part): part for part in map(self.model.module.get_submodule, self.activations)}
            for module in shared.values():  # layers may have one between them
                hooks.callback(module.register_forward_hook(in_this_thread(_multiple)).remove)
            yield dict.fromkeys(self._gated(), 0.5)

    def describe(self) -> dict[str, Any]:
        """Return the rules that were used, as plain data."""
        return {
            "norms": f"LN-rule: scale fixed in {len(self.norms)} modules",
            "activations": f"identity rule: up to {len(self.activations)} modules without weights",
            "gates": f"half rule at {len(self._gated())} projections",
            "attention": "its own gradient",
        }

    def _gated(self) -> list[Port]:
        refused = self.model.shape.refused
        if "mlp_gate" in refused or "mlp_pre" in refused:
            return []
        layers = range(self.model.shape.n_layers)
        taps = [self.model.tap(Site(name, layer, 0)) for layer in layers for name in ("mlp_pre", "mlp_gate")]
        return list(dict.fromkeys(tap.port for tap in taps))


def _fixed_norm(norm: Norm, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if not (args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and output.requires_grad):
        return output
    straight = norm.fixed(args[0])
    return output.detach() + (straight - straight.detach()).to(output)


def _multiple(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Let an activation go back as a multiple of what it was given."""
    given = args[0] if args else None
    if not (isinstance(given, Tensor) and isinstance(output, Tensor) and output.requires_grad):
        return output
    if output.shape != given.shape or torch.equal(output, given):
        return output
    with torch.enable_grad():
        zero = torch.zeros((), dtype=given.dtype, device=given.device, requires_grad=True)
        (limit,) = torch.autograd.grad(module.forward(zero), zero)
    is_zero = given == 0
    times = torch.where(is_zero, limit, output.detach() / torch.where(is_zero, 1.0, given.detach()))
    straight = given * times
    return output.detach() + (straight - straight.detach())
