"""Targeted tuning: change what was located, and nothing else; show what else changed.

====================================  ===========================================================
wanted                                say
====================================  ===========================================================
a behaviour and what must not change  ``TuningData.of(model, target, retain)``
the located parts trained             ``tune(experiment, claim, data)``
that it helped to locate them         ``compare_tuning(experiment, claim, data)``: a ``TuningReport``
====================================  ===========================================================

Locating may or may not help editing: the literature is divided. So ``compare_tuning`` trains random components of the
same size as well, and says which of the two did less damage, or that neither is shown to.

References:
    For: Guo et al. 2024, 2410.12949; Yin et al. 2024 (LoFiT), 2406.01563; circuit-tuning 2025, 2502.06106. Against:
    Hase et al. 2023, 2301.04213; Wang & Veitch 2025, 2502.11447; Lee et al. 2025, 2505.16252.
"""
