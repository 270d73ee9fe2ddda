"""Refusals of pairs: files, columns, answers, spans, positions, alignment and splits."""

import numpy as np

import causalpatch as cp
from causalpatch.base.errors import AnswerError, PairError, PairFileError, SettingError, TaskNotFound

GOOD = '{"clean": "Mary met John", "corrupt": "Mary met Anna", "answer": " left", "wrong_answer": " came"}\n'


def test_prompts_of_unequal_length_are_not_walked_along_unaligned(refuses, llama, uneven):
    with refuses(
        PairError,
        """
        pair 0 of 'uneven.jsonl' cannot be aligned by position
          clean      5 tokens: ... ' John' ' again'
          corrupted  6 tokens: ... ' Jo' ' Ann' ' again'
          fix: drop it (pairs.drop(0)) or align by span (pairs.align("spans"))
        """,
    ):
        cp.sweep(cp.Experiment(llama, uneven), "resid_pre")


def test_prompts_of_unequal_length_are_not_patched_whole_unaligned(refuses, llama):
    row = {"clean": "Mary met John", "corrupt": "Mary met Jo Ann", "answer": " left", "wrong_answer": " came"}
    pairs = cp.load_pairs([row], llama, name="uneven.jsonl")
    with refuses(
        PairError,
        """
        pair 0 of 'uneven.jsonl' cannot be aligned by position
          clean      4 tokens: ... ' John'
          corrupted  5 tokens: ... ' Jo' ' Ann'
          fix: drop it (pairs.drop(0)) or align by token difference (pairs.align("difference"))
        """,
    ):
        cp.Experiment(llama, pairs).run(["z.0.1"])


def test_an_empty_file_holds_no_pairs(refuses, llama, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with refuses(
        PairFileError,
        """
        'empty.jsonl' holds no pairs
          size  0 bytes
          fix: write one pair per line, for instance {"clean": "…", "corrupt": "…", "answer": " …"}
        """,
    ):
        cp.load_pairs(tmp_path / "empty.jsonl", llama)


def test_a_malformed_line_is_named_by_its_number(refuses, llama, tmp_path):
    (tmp_path / "ioi.jsonl").write_text(GOOD + GOOD + '{"clean": "Mary met John", "corrupt"\n')
    with refuses(
        PairFileError,
        """
        line 3 of 'ioi.jsonl' is malformed
          line     {"clean": "Mary met John", "corrupt"
          problem  Expecting ':' delimiter: line 1 column 37 (char 36)
          fix: write one JSON object per line
        """,
    ):
        cp.load_pairs(tmp_path / "ioi.jsonl", llama)


def test_a_line_of_csv_with_too_many_cells_is_named_by_its_number(refuses, llama, tmp_path):
    lines = ["clean,corrupt,answer", "Mary met John,Mary met Anna, left", "Mary, met John,Mary met Anna, left"]
    (tmp_path / "ioi.csv").write_text("\n".join(lines))
    with refuses(
        PairFileError,
        """
        line 3 of 'ioi.csv' is malformed
          line     Mary, met John,Mary met Anna, left
          problem  4 cells under 3 columns
          fix: put cells that hold a comma in "quotes"
        """,
    ):
        cp.load_pairs(tmp_path / "ioi.csv", llama)


def test_a_missing_column_is_answered_with_those_present(refuses, llama, tmp_path):
    (tmp_path / "ioi.jsonl").write_text('{"clean": "Mary met John", "corupt": "Mary met Anna", "answer": " left"}\n')
    with refuses(
        PairFileError,
        """
        line 1 of 'ioi.jsonl' has no column 'corrupt'
          columns  clean, corupt, answer
          fix: rename it, or load_pairs(…, columns={"corrupt": "corupt"})
        """,
    ):
        cp.load_pairs(tmp_path / "ioi.jsonl", llama)


def test_an_unknown_ending_is_answered_with_those_known(refuses, llama, tmp_path):
    (tmp_path / "ioi.xlsx").write_text("")
    with refuses(
        PairFileError,
        """
        'ioi.xlsx' has an ending that is not known
          ending  .xlsx
          known   .jsonl .csv .parquet
          fix: save the pairs as JSON lines, or read them yourself and give a list of dicts
        """,
    ):
        cp.load_pairs(tmp_path / "ioi.xlsx", llama)


def test_a_file_that_is_not_there_is_answered_with_its_neighbours(refuses, llama, tmp_path):
    (tmp_path / "ioi.jsonl").write_text(GOOD)
    with refuses(
        PairFileError,
        """
        there is no file 'TMP/oi.jsonl'
          pairs beside it  ioi.jsonl
          fix: correct the path
        """,
    ):
        cp.load_pairs(tmp_path / "oi.jsonl", llama)


def test_an_unknown_task_is_answered_with_the_closest(refuses, llama):
    with refuses(
        TaskNotFound,
        """
        there is no task 'inductoin'
          tasks  induction, ioi, agreement, greater_than
          fix: name a task, or a file that ends in .jsonl .csv .parquet
        """,
    ):
        cp.load_pairs("inductoin", llama)


def test_an_unreadable_source_is_answered_with_what_can_be_read(refuses, llama):
    with refuses(
        cp.RequestError,
        """
        pairs cannot be read from a value of type ndarray
          known  name of a task, path of a file, list of dicts, Pairs
          fix: give a list of dicts; stacked arrays become pairs with Pairs.from_arrays(…)
        """,
    ):
        cp.load_pairs(np.zeros(3), llama)


def test_an_answer_of_several_tokens_does_not_fit_a_metric_of_one(refuses, llama):
    row = {"clean": "Mary met John", "corrupt": "Mary met Anna", "answer": " and left", "wrong_answer": " came"}
    with refuses(
        AnswerError,
        """
        answer of pair 0 of 'long.jsonl' has 2 tokens; logit_difference reads one
          tokens  [14, 12]
          metric  logit_difference
          fix: measure log_probability (whole answers), or load_pairs(…, first_token=True)
        """,
    ):
        cp.Experiment(llama, cp.load_pairs([row], llama, name="long.jsonl"))


def test_a_metric_that_needs_a_wrong_answer_says_which_pair_has_none(refuses, llama):
    row = {"clean": "Mary met John", "corrupt": "Mary met Anna", "answer": " left"}
    with refuses(
        AnswerError,
        """
        pair 0 of 'half.jsonl' has no wrong_answer, which logit_difference needs
          pair    0
          metric  logit_difference
          fix: add a column 'wrong_answer', or choose a metric that does without, such as kl_divergence
        """,
    ):
        cp.Experiment(llama, cp.load_pairs([row], llama, name="half.jsonl"))


def test_an_answer_cannot_be_right_and_wrong(refuses, llama):
    row = {"clean": "Mary met John", "corrupt": "Mary met Anna", "answer": " left", "wrong_answer": " left"}
    with refuses(
        AnswerError,
        """
        an answer of row 0 of 'rows' is both right and wrong
          ids  [12]
          fix: give different answers
        """,
    ):
        cp.load_pairs([row], llama)


def test_an_answer_outside_the_vocabulary_is_refused(refuses, llama):
    row = {"clean": "Mary met John", "corrupt": "Mary met Anna", "answer_id": 40, "wrong_answer_id": 3}
    with refuses(
        AnswerError,
        """
        'answer' of row 0 of 'rows' holds 40, which is no token id
          ids  0 to 39
          fix: check that the pairs were made for this model's tokenizer
        """,
    ):
        cp.load_pairs([row], llama)


def test_a_text_needs_a_tokenizer(refuses, tagger):
    with refuses(
        PairError,
        """
        'clean' of row 0 of 'rows' is a text, but the model has no tokenizer
          text  'Mary met John'
          fix: open_model(…, tokenizer=…), or give token ids or arrays
        """,
    ):
        cp.load_pairs([{"clean": "Mary met John", "corrupt": "Mary met Anna", "answer_id": 4}], tagger)


def test_a_span_that_is_missing_is_answered_with_those_there(refuses, llama, uneven):
    with refuses(
        PairError,
        """
        pair 0 of 'uneven.jsonl' has no span 'whom'
          its spans  who
          fix: name it in the column spans, for instance {"whom": " Mary"}
        """,
    ):
        cp.Experiment(llama, uneven).run(["z.0.1@whom"])


def test_a_span_whose_text_does_not_stand_in_the_prompt_is_refused(refuses, llama):
    row = {"clean": "Mary met John", "corrupt": "Mary met Anna", "answer": " left", "spans": {"who": " John"}}
    with refuses(
        PairError,
        """
        span 'who' (' John') does not occur in the corrupted prompt of row 0 of 'rows'
          prompt  'Mary met Anna'
          fix: give its tokens instead: {"who": [first, last + 1]}
        """,
    ):
        cp.load_pairs([row], llama)


def test_spans_of_unequal_length_must_be_told_how_to_meet(refuses, llama, uneven):
    with refuses(
        PairError,
        """
        pair 0 of 'uneven.jsonl' has 2 and 1 tokens at '@who'
          base    tokens [3, 4]
          source  tokens [3]
          fix: say how they meet: Patch('z.0.1@who', align='first'), 'last' or 'mean'
        """,
    ):
        cp.Experiment(llama, uneven).run(["z.0.1@who"])


def test_a_position_out_of_range_is_answered_with_the_prompt_s_length(refuses, llama, pairs):
    with refuses(
        PairError,
        """
        @4 lies outside the corrupted prompt of pair 0 of 'two.jsonl'
          corrupted  4 tokens: @0 to @3, or @-4 to @-1
          fix: name a position that every prompt has, such as @-1, or a span
        """,
    ):
        cp.Experiment(llama, pairs).run(["z.0.1@4"])


def test_an_unknown_way_to_align_is_answered_with_those_known(refuses, uneven):
    with refuses(
        SettingError,
        """
        pairs cannot be aligned by 'length'
          known  position, difference, spans, map
          fix: pairs.align("difference")
        """,
    ):
        uneven.align("length")


def test_pairs_that_hang_together_cannot_be_split(refuses, pairs):
    with refuses(
        PairError,
        """
        'two.jsonl' has 2 independent components, too few to split
          pairs   2
          needed  4 components, 2 on each side
          fix: add pairs that share no prompt, entity or group with these
        """,
    ):
        pairs.split()


def test_a_selection_of_nothing_is_refused(refuses, llama):
    rows = [{"clean": "Mary met John", "corrupt": "Mary met Anna", "answer": " left", "kind": "a"}]
    pairs = cp.load_pairs(rows, llama, name="one.jsonl")
    with refuses(
        PairError,
        """
        no pairs are left of 'one.jsonl'
          fix: select at least one
        """,
    ):
        pairs.where(kind="b")


def test_a_column_to_select_by_must_exist(refuses, pairs):
    with refuses(
        PairError,
        """
        'two.jsonl' has no column 'kind'
          columns  group, id, split
          fix: select by one of these
        """,
    ):
        pairs.where(kind="b")


def test_prompts_do_not_fit_a_model_of_arrays(refuses, classifier, pairs):
    with refuses(
        PairError,
        """
        'two.jsonl' holds prompts, but 'Sequential' takes arrays
          fix: make pairs of arrays: Pairs.from_arrays(clean, corrupt, answer=…)
        """,
    ):
        cp.Experiment(classifier, pairs)


def test_arrays_of_several_shapes_do_not_make_a_batch(refuses, classifier):
    pairs = cp.Pairs.from_arrays([np.zeros(4), np.zeros(5)], [np.ones(4), np.ones(5)], [0, 0], [1, 1])
    with refuses(
        PairError,
        """
        inputs of 'arrays' cannot stand in one batch: their shapes differ
          shapes  (4,), (5,)
          fix: bring them to one shape first: pairs.transformed(function)
        """,
    ):
        cp.Experiment(classifier, pairs).run(["module(0).output"])


def test_what_stands_beside_prompts_must_be_an_argument_of_the_forward(refuses, llama):
    pairs = cp.load_pairs([{"clean": [1, 5], "corrupt": [1, 6], "answer_id": 3}], llama, name="seen")
    with refuses(
        PairError,
        """
        'seen' gives 'LlamaForCausalLM' an argument 'pixel_values' that its forward does not take
          takes  nothing beside the input
          fix: leave it out
        """,
    ):
        cp.Experiment(llama, pairs.with_beside(pixel_values=np.zeros((1, 3))), cp.answer_logit)


class Seeing:
    """A model without a tokenizer that is also given pictures."""

    tokenizer, further = None, ("pixel_values", "image_sizes")


def test_a_further_argument_is_given_for_both_sides(refuses):
    row = {"clean": [1, 5], "corrupt": [1, 6], "clean_pixel_values": [[0.0]]}
    with refuses(
        PairError,
        """
        row 0 of 'rows' has 'clean_pixel_values', but no 'pixel_values' for the other side
          needed  clean_pixel_values and corrupt_pixel_values
          fix: give both, or 'pixel_values' for both sides
        """,
    ):
        cp.load_pairs([row], Seeing())


def test_a_column_of_arrays_must_be_an_argument_of_the_forward(refuses):
    row = {"clean": [1, 5], "corrupt": [1, 6], "pixels": "data.npz:images[0]"}
    with refuses(
        PairError,
        """
        row 0 of 'rows' gives the model 'pixels', which its forward does not take
          takes  pixel_values, image_sizes
          fix: call the column 'pixel_values'
        """,
    ):
        cp.load_pairs([row], Seeing())
