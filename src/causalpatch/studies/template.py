"""The study file that ``causalpatch init`` writes: every key with what it is for, in a study that runs as it is."""

from typing import Final

TEMPLATE: Final = """\
# A study: what is measured, where, and in which steps.    causalpatch run THIS_FILE
# Running it again goes on where it was stopped. A change to what is measured is another run.
# causalpatch check THIS_FILE says what it would cost;  causalpatch schema  says what every key may be.
schema: 1
name: who-copies-the-name

model:
  name: zoo:stories          # zoo:NAME, a folder, or a name on the hub
  # dtype: float32           # by default the checkpoint's own
  # weights: disk            # read them layer by layer, for a model that memory does not hold; or host (CPU memory)
  # memory_gib: 8            # for weights and activations together; changes no number but by rounding
  # source_model: FOLDER     # another checkpoint of the same shape, for the source runs
  # dictionaries: {sae: FOLDER}

pairs:
  name: ioi                  # a task (causalpatch tasks), or a .jsonl, .csv or .parquet file beside this one
  # where: {template: give}  # keep pairs whose columns have these values
  # first: 100               # keep the first pairs only
  # align: difference        # how prompts of different lengths meet: position, difference or spans
  # first_token: true        # cut longer answers to their first token

# metric: logit_difference   # or a list; by default what suits the task
direction: denoise           # denoise: clean into the corrupted run; noise: corrupted into the clean one
seeds: [0]                   # each repeats the steps; claims are made for the first alone

split:                       # searches see the discovery pairs, claims the others; null uses all pairs for all steps
  discovery: 0.5
  seed: 0
  # by: [template]           # the sides share no value of these columns either

budget:
  runs: 200000               # refuse to start when the steps plan more runs of the model
  # gib: 2                   # memory for activations

# shards: {runs: 5000}       # what is measured and stored in one piece; by default what the model's size suggests

executor:                    # who measures; it changes no number
  kind: local                # or processes: one per GPU, or several that share the CPU's cores; or ray: a cluster
  # workers: 2
  # threads: 1
  # device: cuda
  # address: auto            # of ray: the cluster; without it Ray starts on this machine
  # gpus_per_worker: 1

store: studies               # a folder beside this file, or an address such as s3://bucket/place

steps:
  - kind: sweep              # every layer and head, one run each
    name: heads
    site: z@-1

  - kind: localize           # coarse to fine, within a budget
    name: parts
    budget: 2000 runs
    units: heads

  # - {kind: attribute, name: edges, method: eap-ig}
  # - {kind: discover, name: circuit, from: edges, n_edges: 40}
  # - {kind: evaluate, name: faithfulness, from: circuit}

  - kind: confirm            # once, on pairs that no step before has seen
    name: claim
    from: heads
    top: 2
    checks: few              # all makes every control

  # - {kind: tune, from: claim, target: wanted.jsonl, retain: texts.txt, steps: 100}   # train what was found, compared
"""
