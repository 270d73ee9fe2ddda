"""Who reads a site: the linear maps that its value goes into next, by the facts of the family.

What a map cannot see of its input, its null space, has no effect through it. ``z`` goes into the output projection;
what is added to the stream goes, by way of a norm, into the queries, keys and values or into the MLP behind it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from causalpatch.base.errors import SettingError
from causalpatch.models.adapter import Model
from causalpatch.models.table import input_width, plain_rows
from causalpatch.models.views import Columns
from causalpatch.sites.site import Site


@dataclass(frozen=True, eq=False)
class Reader:
    """The linear maps that read a value.

    Args:
        text: Which they are.
        weight: Their weights side by side such that ``value @ weight`` is what they make of the value, biases apart;
            float64, on the CPU.
        precision: Rounding of the numbers that the model holds.
    """

    text: str
    weight: Float[Tensor, "width read"]
    precision: float


def reader_of(model: Model, site: Site) -> Reader | None:
    """Return who reads a named site; None where the facts do not say.

    Args:
        model: The model.
        site: ``z``, or a site of the residual stream or what is added to it.
    """
    if site.name == "z":
        tap = model.tap(site)
        weight = plain_rows(model.module.get_submodule(tap.port.path))
        if weight is None or not isinstance(tap.view, Columns):
            return None
        rows = weight.narrow(0, tap.view.start, tap.view.width)
        return _reader(f"the rows of {tap.port.path} that {site.at(None)} goes into", [rows])
    layer, part = _behind(model, site)
    if part == "head":
        return _of_paths(model, ["(head)"], "the unembedding")
    names = {"attention": ("q", "k", "v"), "mlp": ("mlp_pre", "mlp_gate")}.get(part, ())
    there = [name for name in names if name not in model.shape.refused]
    paths = list(dict.fromkeys(model.tap(Site(name, layer, 0)).port.path for name in there))
    return _of_paths(model, paths, " and ".join(paths))


def named_reader(model: Model, path: str, width: int) -> Reader:
    """Return a module of the model as the reader of values of a width.

    Raises:
        SettingError: There is no such module, or it is not a plain linear map of that width.
    """
    modules = dict(model.module.named_modules())
    weight = plain_rows(modules[path]) if path in modules else None
    if weight is None or len(weight) != width:
        kind = f"{type(modules[path]).__name__}, input {input_width(modules[path])}" if path in modules else "none"
        linear = [name for name, each in modules.items() if input_width(each) == width]
        raise SettingError(
            f"'{path}' is not a linear map of '{model.name}' that reads {width} numbers",
            facts=[("module", kind), ("such maps", ", ".join(linear[:6]) or "none")],
            fix=f'reader="{linear[0]}"' if linear else "leave reader= out",
        )
    return _reader(path, [weight])


def _behind(model: Model, site: Site) -> tuple[int, str]:
    """Return the layer and the part that what is in the stream at a site meets next."""
    layer, has_middle = site.layer or 0, "resid_mid" not in model.shape.refused
    if site.name in ("embed", "pos_embed", "resid_pre"):
        return layer, "attention"
    if site.name == "resid_mid" or (site.name in ("attn_out", "head_out") and has_middle):
        return layer, "mlp"
    if site.name in ("attn_out", "head_out", "mlp_out", "resid_post"):
        return (layer + 1, "attention") if layer + 1 < model.shape.n_layers else (layer, "head")
    return (layer, "head") if site.name == "final_norm" else (layer, "")


def _of_paths(model: Model, paths: Sequence[str], text: str) -> Reader | None:
    given = getattr(model.module, "get_output_embeddings", lambda: None)
    modules = [given() if path == "(head)" else model.module.get_submodule(path) for path in paths]
    weights = [None if module is None else plain_rows(module) for module in modules]
    plain = [weight for weight in weights if weight is not None]
    return _reader(f"{text}, the norm before left out", plain) if plain and len(plain) == len(weights) else None


def _reader(text: str, weights: Sequence[Tensor]) -> Reader:
    wide = torch.cat([weight.detach().double().cpu() for weight in weights], dim=1)
    return Reader(text, wide, torch.finfo(weights[0].dtype).eps)
