"""Refusals of values of a wrong type, as they are without a type checker looking on.

In these tests beartype stops such a call at the annotation, before the library can answer. So the calls are made in a
process of their own.
"""

import json
import subprocess
import sys
from textwrap import dedent

BEFORE = """
import json, sys
import causalpatch as cp
from causalpatch.testing.tiny import tiny_model

model = cp.open_model(tiny_model("llama"))
rows = [{"clean": [3, 4], "corrupt": [3, 5], "answer_id": 6, "wrong_answer_id": 7}]
pairs = cp.load_pairs(rows, model, name="ids")
experiment = cp.Experiment(model, pairs)
scores = cp.attribute_edges(experiment, "eap")
heard = {}
for call in json.loads(sys.argv[1]):
    try:
        heard[call] = ["nothing", str(eval(call)), 0]
    except cp.CausalPatchError as error:
        heard[call] = [type(error).__name__, str(error), error.exit_code]
print(json.dumps(heard))
"""

CALLS = {
    **{
        f"cp.evaluate_circuit(experiment, {given})": (
            "SettingError",
            f"""
            {name} is no circuit
              needed  a circuit, several, or scores of edges
              fix: cp.discover_circuit(cp.attribute_edges(experiment), 20)
            """,
        )
        for given, name in (
            ('cp.attribute(experiment, "z")', "Scores"),
            ('[cp.attribute(experiment, "z")]', "Scores"),
            ('"circuit.npz"', "str"),
            ("None", "NoneType"),
        )
    },
    'cp.discover_circuit(cp.attribute(experiment, "z"), 3)': (
        "SettingError",
        """
        a circuit cannot be found by Scores
          needed  scores of edges
          fix: cp.attribute_edges(experiment)
        """,
    ),
    "cp.discover_circuit(scores, 2.5)": (
        "SettingError",
        """
        n_edges=2.5 is no whole number from 1 on
          fix: n_edges=20
        """,
    ),
    "cp.learn_edges(experiment, steps=2.5)": (
        "SettingError",
        """
        steps=2.5 is no whole number from 1 on
          fix: steps=300
        """,
    ),
    "scores.confirm(2.5)": (
        "SettingError",
        """
        top=2.5 is no whole number from 0 on
          fix: top=50
        """,
    ),
    "cp.acdc(experiment, '0.1')": (
        "SettingError",
        """
        threshold='0.1' is no number above 0
          fix: threshold=0.01
        """,
    ),
    "cp.patch_edges(experiment, __import__('numpy').array(['m0 -> logits']))": (
        "PathError",
        """
        a mask of edges does not fit: shape (1,)
          needed  (11, 27): senders, receivers
          fix: make it by graph.mask([...])
        """,
    ),
    'cp.discover_circuit(scores, 3, method="ugs")': (
        "SettingError",
        """
        unknown method 'ugs' to find a circuit
          known  top, greedy
          fix: method="top"
        """,
    ),
    'cp.discover_circuit(scores, 3, by="size")': (
        "SettingError",
        """
        unknown by 'size' to find a circuit
          known  importance, magnitude
          fix: by="importance"
        """,
    ),
    'cp.debug(model, [{"prompt": "x", "answer": " y"}], level="atoms")': (
        "SettingError",
        """
        level='atoms' is none
          known  layers, heads, neurons
          fix: level="heads"
        """,
    ),
    'cp.attribute(experiment, "z", "saliency")': (
        "SettingError",
        """
        unknown method 'saliency' for scores
          known  atp, ig, ig-activations, clean-corrupted, atp*, relp
          fix: method="atp"
        """,
    ),
    'cp.attribute_edges(experiment, "acdc")': (
        "SettingError",
        """
        unknown method 'acdc' for scores of edges
          known  eap, eap-ig, eap-ig-activations, clean-corrupted
          fix: method="eap-ig"
        """,
    ),
    'cp.attribute(experiment, "z", "ig", rule="left")': (
        "SettingError",
        """
        unknown rule 'left'
          known  midpoint, eap-ig
          fix: rule="midpoint"
        """,
    ),
    'cp.read_graph("graph.json", model, of="loss function")': (
        "SettingError",
        """
        graph files hold no scores of 'loss function'
          known  loss, metric
          fix: of="loss"
        """,
    ),
    'cp.Experiment(model, pairs, direction="denoising")': (
        "SettingError",
        """
        direction cannot be 'denoising'
          known  denoise, noise
          fix: direction="denoise"
        """,
    ),
    'cp.Experiment(model, pairs, engine="fast")': (
        "SettingError",
        """
        engine cannot be 'fast'
          known  auto, wavefront, restart, graph, rows, reference
          fix: engine="auto"
        """,
    ),
    "cp.Experiment(model, pairs, metric=3)": (
        "MetricError",
        """
        3 is not a metric
          built-in  logit_difference, log_probability, log_probability_difference, probability,
                    probability_difference, answer_logit, rank, top1, cross_entropy, kl_divergence,
                    kl_from_base, cosine, generated_answer
          fix: metric="logit_difference"
        """,
    ),
    'cp.generated_answer.generating(4, patched="answer")': (
        "MetricError",
        """
        what is generated cannot be patched 'answer'
          known  prompt, all
          fix: patched="prompt"
        """,
    ),
    "cp.Experiment(model, pairs, metric=len)": (
        "MetricError",
        """
        <built-in function len> is not a metric
          built-in  logit_difference, log_probability, log_probability_difference, probability,
                    probability_difference, answer_logit, rank, top1, cross_entropy, kl_divergence,
                    kl_from_base, cosine, generated_answer
          fix: wrap a function: causalpatch.metric(function)
        """,
    ),
    'cp.metric("logit_difference")': (
        "MetricError",
        """
        'logit_difference' is not a metric
          needed  a function of (outputs, pairs)
          fix: give a function; built-in metrics go by name: Experiment(…, metric='logit_difference')
        """,
    ),
    "experiment.run(3)": (
        "PatchError",
        """
        3 is not an intervention
          type  int
          fix: give a Patch, a site such as 'z.9.6@-1', or a list of them
        """,
    ),
    "experiment.run([['z.0.1', 3]])": (
        "PatchError",
        """
        3 is not a patch
          type  int
          fix: give a Patch or a site such as 'z.9.6@-1'
        """,
    ),
    'cp.Patch("z.0.1@who", align="middle")': (
        "PatchError",
        """
        there is no alignment 'middle'
          known  first, last, mean
          fix: write align="first"
        """,
    ),
    'cp.Mean(over="heads")': (
        "PatchError",
        """
        a mean cannot be taken over 'heads'
          known  pairs, positions
          fix: Mean(over="pairs") keeps positions apart
        """,
    ),
    "cp.Function(3)": (
        "PatchError",
        """
        3 is not a function of (current, source)
          fix: give for instance Function(lambda current, source: (current + source) / 2)
        """,
    ),
    "cp.parse(3)": (
        "SiteSyntaxError",
        """
        3 is not a site
          problem  it is a value of type int, not a text
          grammar  [STREAM/]NAME[.LAYER[.UNIT]][@POSITION]
          fix: write for instance 'z.9.6@-1'
        """,
    ),
    "cp.open_model(3)": (
        "SettingError",
        """
        no model can be opened from a value of type int
          known  zoo:NAME, path of a folder, name on the hub, any nn.Module
          fix: give for instance "zoo:stories"
        """,
    ),
    "cp.open_model(model.module, tokenizer=3)": (
        "SettingError",
        """
        3 is not a tokenizer
          allowed  a folder, a hub name, a tokenizer of transformers, a causalpatch.base.tokens.Tokenizer
          fix: leave it out for the tokenizer beside the model
        """,
    ),
    "cp.load_pairs(3, model)": (
        "RequestError",
        """
        pairs cannot be read from a value of type int
          known  name of a task, path of a file, list of dicts, Pairs
          fix: give a list of dicts; stacked arrays become pairs with Pairs.from_arrays(…)
        """,
    ),
    'pairs.batch("base")': (
        "SettingError",
        """
        'base' is not a role of a pair
          known  clean, corrupt
          fix: write "clean" or "corrupt"
        """,
    ),
}


def test_values_of_wrong_types_are_refused_in_words():
    command = [sys.executable, "-c", BEFORE, json.dumps(list(CALLS))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    wanted = {call: [kind, dedent(text).strip("\n"), 2] for call, (kind, text) in CALLS.items()}
    assert json.loads(done.stdout) == wanted
