"""How components and edges of a decoder are called, and the order in which they stand.

Senders are the embedding ``embed``, heads ``a0.h3`` and MLPs ``m1``; receivers a head's queries, keys and values
``a0.h3<q>``, MLPs ``m1`` and ``logits``. An edge goes from a sender to a later receiver: ``a0.h3 -> a1.h0<q>``.
"""


def sender_labels(n_layers: int, n_heads: int) -> tuple[str, ...]:
    """Return all senders, in the order in which they add to the stream.

    Examples:
        >>> sender_labels(1, 2)
        ('embed', 'a0.h0', 'a0.h1', 'm0')
    """
    layers = ([*(f"a{layer}.h{head}" for head in range(n_heads)), f"m{layer}"] for layer in range(n_layers))
    return ("embed", *(node for layer in layers for node in layer))


def receiver_labels(n_layers: int, n_heads: int) -> tuple[str, ...]:
    """Return all receivers, in the order in which they read the stream.

    Examples:
        >>> receiver_labels(1, 1)
        ('a0.h0<q>', 'a0.h0<k>', 'a0.h0<v>', 'm0', 'logits')
    """
    found: list[str] = []
    for layer in range(n_layers):
        found += [f"a{layer}.h{head}<{kind}>" for kind in "qkv" for head in range(n_heads)]
        found.append(f"m{layer}")
    return (*found, "logits")


def node_labels(n_layers: int, n_heads: int) -> tuple[str, ...]:
    """Return all components: senders, and the logits."""
    return (*sender_labels(n_layers, n_heads), "logits")


def edge_labels(n_layers: int, n_heads: int) -> tuple[str, ...]:
    """Return all edges, sender by sender.

    Examples:
        >>> edge_labels(1, 1)[4:]
        ('embed -> logits', 'a0.h0 -> m0', 'a0.h0 -> logits', 'm0 -> logits')
    """
    senders = [(each, _stage(each, n_layers)) for each in sender_labels(n_layers, n_heads)]
    receivers = [(each, _stage(each, n_layers)) for each in receiver_labels(n_layers, n_heads)]
    return tuple(f"{sender} -> {receiver}" for sender, at in senders for receiver, then in receivers if at < then)


def ends(edge: str) -> tuple[str, str]:
    """Return the components at both ends of an edge.

    Examples:
        >>> ends("m0 -> a1.h0<v>")
        ('m0', 'a1.h0')
    """
    sender, _, receiver = edge.partition(" -> ")
    return sender, receiver.partition("<")[0]


def _stage(node: str, n_layers: int) -> int:
    """Return when a component is computed: heads of layer l at 2 l, its MLP at 2 l + 1."""
    if node in ("embed", "logits"):
        return -1 if node == "embed" else 2 * n_layers
    return 2 * int(node[1:].partition(".")[0]) + (node[0] == "m")
