"""Which way does a head's effect take?

The embedded model goes on with the right name after "When Laura and Ashley went to the harbor, Laura gave a bowl to".
Patching finds a head in the first layer that matters and adds nothing to the logits itself. Path patching follows its
effect, from the answer backwards.

    python examples/follow_the_paths.py
"""

import causalpatch as cp
from causalpatch.pairs.tasks import generate


def main() -> None:
    model = cp.open_model("zoo:stories")
    pairs = cp.load_pairs(generate("ioi", n=12, templates=["when-went"]), model, name="ioi, one template")
    experiment = cp.Experiment(model, pairs, metric=cp.logit_difference, direction="denoise")
    heads = cp.sweep(experiment, "z").recovered()
    direct = cp.direct_effect(experiment, "head_out").recovered()
    early, late = "head_out.0.2", str(direct["sender"].values[direct.values.argmax()])
    print(f"{early} recovers {float(heads[0, 2]):.2f} of the gap, {float(direct.sel(sender=early)):.2f} of it directly")
    print(f"{late} writes the answer: {float(direct.max()):.2f} directly")

    last = late.removeprefix("head_out.")
    told = cp.path_patch(experiment, "resid_pre.3", [f"{name}.{last}" for name in "qkv"]).recovered()
    by = str(told["receiver"].values[told.values[0].argmax()])
    print(f"it is told by {by}: {float(told.max()):.2f}")

    senders = cp.path_patch(experiment, "head_out", by).recovered()
    print("by", ", ".join(f"{name} {float(share):.2f}" for name, share in top(senders)))

    through = [f"{early} -> v.1.{head} -> {by} -> logits" for head in range(model.n_heads)]
    whole = cp.path_patch(experiment, paths=[through]).recovered()
    print(f"{early} -> values of layer 1 -> {by} -> logits: {float(whole[0]):.2f}")


def top(shares, k=4):
    order = shares[:, 0].values.argsort()[::-1][:k]
    return [(str(shares["sender"].values[n]), shares[n, 0]) for n in order]


if __name__ == "__main__":
    main()
