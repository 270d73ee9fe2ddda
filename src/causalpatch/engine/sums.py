"""What a family says of the stream: which sites add up to which tensors in a layer.

In most families the stream out of a layer is the stream into it, plus what attention and the MLP add, and what stands
between the two is read by the module that comes next. Where norms follow the sums, each sum is what its norm is given.
Where only some layers attend, what the MLP adds is the difference to what its norm reads.
"""

from dataclasses import dataclass, replace

from causalpatch.models import Model, Port
from causalpatch.sites import Site
from causalpatch.sites.select import part_of

Where = Site | Port


@dataclass(frozen=True)
class Claim:
    """Sites whose sum is a tensor.

    Args:
        parts: What is added.
        totals: Tensors of which at least one is the sum.
        words: The claim as it is read.
    """

    parts: tuple[Where, ...]
    totals: tuple[Where, ...]
    words: str


def claims_about(model: Model, site: Site) -> list[Claim]:
    """Return what is claimed of a site's layer, in the order in which it is to be tried.

    Args:
        model: A model with a family.
        site: ``resid_mid``, ``resid_post``, ``attn_out``, ``cross_attn_out`` or ``mlp_out``.
    """
    stream = site.stream or model.main_stream
    family, refused = model.family_of(stream), part_of(replace(site, stream=stream), model.shape).refused
    if family is None or not {"resid_pre", "resid_post"}.isdisjoint(refused):
        return []
    pre, mid, attn, mlp, post = (
        Site(name, site.layer, stream=stream)
        for name in ("resid_pre", "resid_mid", "attn_out", "mlp_out", "resid_post")
    )
    attends = [attn, *([Site("cross_attn_out", site.layer)] if family.cross else [])]
    path = model.tap(pre).port.path
    into = tuple(_at(path, norm, "input") for norm in family.norms)
    if family.post_norms:
        *first, last = family.post_norms
        before: Where = pre
        claims = []
        for each, norm in zip(attends, first, strict=True):
            claims.append(Claim((before, each), (_at(path, norm, "input"),), f"the stream + {each} in front of {norm}"))
            before = _at(path, norm, "output")
        return [
            *claims,
            Claim((before,), (mid,), f"the output of {first[-1]} as resid_mid"),
            Claim((mid, mlp), (_at(path, last, "input"),), f"resid_mid + mlp_out in front of {last}"),
            Claim((_at(path, last, "output"),), (post,), f"the output of {last} as resid_post"),
        ]
    if "attn_out" in refused:
        if "mlp_out" in refused:
            return []
        return [Claim((norm, mlp), (post,), f"{norm.path}'s input + mlp_out as resid_post") for norm in into[-1:]]
    words = " + ".join(["resid_pre", *(each.name for each in attends), "mlp_out"])
    claims = [Claim((pre, *attends, mlp), (post,), words)]
    if site.name == "resid_mid":
        down = (
            ""
            if "mlp_post" in refused
            else model.tap(replace(mlp, name="mlp_post", unit=0)).port.path.rpartition(".")[0]
        )
        readers = (*into, *([Port(down, "input")] if down not in ("", path) else []))
        claims.append(Claim((pre, *attends), readers, f"{site} as what a module of the layer reads"))
    return claims


def _at(layer: str, module: str, side: str) -> Port:
    """Return a port in a layer whose tensor has rows and positions as the layer's own input does."""
    whole = Port(layer, "input")
    return Port(f"{layer}.{module}", "input" if side == "input" else "output", like=whole)
