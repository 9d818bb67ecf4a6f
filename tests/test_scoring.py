"""Text -> answer -> score, against cases written by hand and loops as plain as the formulas."""

import math
import random
import re
from dataclasses import replace

import numpy as np
import pytest

import common
from common import Example
from support import benchmarks

SIDES = ["A. left", "B. right", "C. front", "D. back"]
PAIR = ["A. trash bin", "B. office chair"]


def example(question_type, answer, options=None):
    return Example("id", ("a.jpg",), "single_image", question_type, "question", options, answer)


def think(answer):
    return f"<think>so</think><answer>{answer}</answer>"


# ------------------------------------------------------------------------------------------------
# Text -> answer
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text,answer",
    [
        ("<think>maybe A</think><answer>B</answer>", "B"),
        ("<think>x</think>\n<answer>\n 2.5 \n</answer>\n", "2.5"),
        ("<answer>A</answer> no, <answer>B</answer>", "B"),  # the last word counts
        ("<answer>A<answer>B</answer>", "B"),
        ("<answer></answer>", ""),
        ("  B \n", "B"),  # a direct answer has no tags
        ("<answer>B", "<answer>B"),  # cut before its end: no answer in it
        ("B</answer>", "B</answer>"),
        ("", ""),
        (None, ""),
    ],
)
def test_extract_answer(text, answer):
    assert common.extract_answer(text) == answer


def test_extract_answer_is_the_last_block_that_the_definition_finds():
    block = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
    rng = random.Random(0)
    for _ in range(5000):
        text = "".join(rng.choices(["<answer>", "</answer>", "a", " ", "\n", "<think>"], k=rng.randint(0, 9)))
        found = block.findall(text)
        assert common.extract_answer(text) == (found[-1] if found else text).strip(), text


@pytest.mark.parametrize(
    "text",
    ["B", "b", "(B)", "(b)", "B.", "B)", "B:", "B. right", "b. RIGHT", "(B) right", "B right", "B. right.", "right",
     "Right.", "The answer is B", "the answer is (B).", "The correct answer is B. right", "Answer: B",
     "The correct option is B", " B\n", "The answer is: B", "Answer:B", "The final answer is $\\boxed{B}$.", "My choice: b",
     "**B**", "**B. right**", "**B**. right", "**Answer:** B", "*B*", "`B`", "The answer is: **(B) right**.", "\\boxed{B}",
     "\\boxed{right}", "\\boxed{\\text{B}}", "\\[\\boxed{\\text{B. right}}\\]", "$\\boxed{\\textbf{(B)}}$", "\\(B\\)",
     "B.\n right"],
)  # fmt: skip
def test_parse_choice_reads_one_option(text):
    assert common.parse_choice(text, SIDES) == "B"


@pytest.mark.parametrize(
    "text",
    ["", " ", ".", "()", "A or B", "A, B", "AB", "A B", "A. left B. right", "B. left", "(B) left", "left right", "E",
     "1", "Cannot determine", "None of the above", "not B", "B?A", "The answer is", "The answer is A or B", "rightmost",
     "<answer>B", "A. left, B. right, C. front, D. back", "lef", "\\boxed{A}\\boxed{B}", "\\boxed{A} or \\boxed{B}",
     "**A** **B**", "**A** or **B**", "$A$$B$", "`A` `B`", "The answer is A. The answer is B", "Answer: A Answer: B", "\\boxed{}",
     "\\boxed{B", "**", "The answer is not B", "The answer is:", "either A", "so \\boxed{B}"],
)  # fmt: skip
def test_parse_choice_refuses_no_option_or_several(text):
    assert common.parse_choice(text, SIDES) is None


def test_parse_choice_knows_only_the_options_of_its_question():
    assert common.parse_choice("C", PAIR) is None
    assert common.parse_choice("office chair", PAIR) == "B"
    assert common.parse_choice("chair", PAIR) is None
    assert common.parse_choice("left", ["A. left", "B. left"]) is None  # names both


def test_parse_choice_knows_the_words_of_an_option_as_they_are_written():
    """Decoration is removed from both sides: words of an option are no decoration."""
    options = ["A. Option 1", "B. It is **left**.", "C. $2$", "D. a_b *", "E. the\nrest"]
    for option in options:
        assert common.parse_choice(option, options) == common.parse_choice(option[3:], options) == option[0]


@pytest.mark.parametrize("piece", ["B", "B ", "(", "the answer is ", "right ", "B. right\n", " ", "\n", "\\boxed{", "**", "$",
                                   "\\text{"])
def test_parse_choice_refuses_a_very_long_text(piece):
    assert common.parse_choice(piece * (10_000 // len(piece)), SIDES) is None


@pytest.mark.parametrize(
    "text,number",
    [
        ("7", 7), ("0", 0), ("-3", -3), ("+4", 4), ("2.5", 2.5), (".5", 0.5), ("-.5", -0.5), ("1,200", 1200),
        ("1,234,567.5", 1234567.5), ("1200", 1200), ("007", 7), ("2.50", 2.5), (" 2.5\n", 2.5), ("2.5.", 2.5),
        ("3.", 3), ("two", 2), ("Twelve", 12), ("zero", 0), ("two.", 2), ("2.5 m", 2.5), ("2.5m", 2.5), ("116 cm", 116),
        ("2.5 meters", 2.5), ("2.5 Meters.", 2.5), ("about 2.5 meters", 2.5), ("approximately 15", 15),
        ("15.2 square meters", 15.2), ("15.2 m\u00b2", 15.2), ("15 m2", 15), ("2.5 m^2", 2.5), ("15.2 sq m.", 15.2),
        ("The answer is: 2.5 m", 2.5), ("Answer: 4", 4), ("**4**", 4), ("**4** chairs", 4), ("\\boxed{2.5}", 2.5), ("$2.5$", 2.5),
        ("\\boxed{2.5\\text{ m}}", 2.5), ("\\boxed{2.5\\,\\mathrm{m}^{2}}", 2.5), ("`4`", 4), ("4 chairs", 4), ("20 chairs", 20),
        ("3 office chairs.", 3), ("4 chair(s)", 4), ("four chairs", 4), ("twenty one chairs", 21), ("about two", 2),
        ("~2.5 m", 2.5), ("2.5e0", 2.5), ("1e3", 1000), ("-1.5E-1", -0.15), ("2.5 cm", 2.5), ("2.5 meters long", 2.5),
    ],
)  # fmt: skip
def test_parse_number_reads_one_number(text, number):
    assert common.parse_number(text) == number


@pytest.mark.parametrize(
    "text",
    ["", " ", ".", "-", ",", "2 or 3", "2, 3", "2-3", "2 3", "1 2.5", "2 to 3 meters", "2.5.1", "1,20", "12,34",
     "1,2003", "nan", "NaN", "inf", "-inf", "Infinity", "1e400", "A. 20", "2x", "twenty-one of 3",
     "two or three", "None", "[2]", "--3", "9" * 400, "1" * 10_000 + "x", "two " * 2_500, "<answer>2",
     "4 chairs or 5", "4 chairs or five", "between 2 and 3", "4 chairs, 5", "4 chairs and 2 tables", "four five", "4 to five",
     "**2** **3**", "**2** or **3**", "5**6", "\\boxed{2}\\boxed{3}", "$2$3", "2\\,3", "2/3", "4 (or 5)", "4 +/- 1", "1. 2",
     "2 m 50 cm", "2 m 3", "4 dozen", "4 hundred chairs", "one hundred", "two thirds", "2 point five", "8 feet", "20 mm", "5'",
     "5%", "4 not", "a chair", "no chairs", "2e", "4 x", "1e999", "4 of the red chairs", "4" + " " * 10_000 + "!",
     "4 " + "m " * 10_000],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_parse_number_refuses_none_several_and_endless(text):
    assert common.parse_number(text) is None


def test_parse_number_takes_what_json_may_hold():
    assert common.parse_number(0.7) == 0.7
    assert common.parse_number(116) == 116
    assert common.parse_number(None) is None
    assert common.parse_number(math.nan) is None


def test_parse_boxes_reads_both_orders_of_the_keys():
    for text in ('[{"bbox_2d":[1,2,3,4],"label":"a b"}]', ' [ {"label": "a b", "bbox_2d": [1, 2.0, 3, 4]} ] '):
        assert common.parse_boxes(text) == [{"bbox_2d": [1, 2, 3, 4], "label": "a b"}]
    assert len(common.parse_boxes('[{"bbox_2d":[1,2,3,4],"label":"a"},{"bbox_2d":[0,0,1,1],"label":"a"}]')) == 2
    assert common.parse_boxes("[]") == []


@pytest.mark.parametrize("fence", ["```json\n{}\n```", "```\n{}```", " ```json {} ```\n", "```json\r\n{}\r\n```"])
def test_parse_boxes_reads_a_fenced_list(fence):
    text = '[{"bbox_2d": [1, 2, 3, 4], "label": "a ``b"}]'
    assert common.parse_boxes(fence.replace("{}", text)) == [{"bbox_2d": [1, 2, 3, 4], "label": "a ``b"}]


@pytest.mark.parametrize(
    "text",
    ["", "null", "3", "{}", "[1]", "[null]", "[[1,2,3,4]]", '{"bbox_2d":[1,2,3,4],"label":"a"}',
     '[{"bbox_2d":[1,2,3,4]}]', '[{"label":"a"}]', '[{"bbox_2d":[1,2,3,4],"label":7}]',
     '[{"bbox_2d":[1,2,3],"label":"a"}]', '[{"bbox_2d":[3,2,1,4],"label":"a"}]', '[{"bbox_2d":[1,4,3,2],"label":"a"}]',
     '[{"bbox_2d":[1,2,1,4],"label":"a"}]', '[{"bbox_2d":["1","2","3","4"],"label":"a"}]',
     '[{"bbox_2d":[1,2,3,NaN],"label":"a"}]', '[{"bbox_2d":[1,2,3,Infinity],"label":"a"}]',
     '[{"bbox_2d":[1,2,3,1e999],"label":"a"}]', '[{"bbox_2d":[1,2,3,4],"label":"a"}] and more',
     '[{"bbox_2d":[1,2,3,4],"label":"a"}', "[" * 100_000, "```", "``````", '```json\n[{"bbox_2d":[1,2,3,4],"label":"a"}]',
     '```json\n[]\n```\n```json\n[]\n```', "`" * 10_000], ids=lambda text: text[:44],
)  # fmt: skip
def test_parse_boxes_refuses_everything_else(text):
    assert common.parse_boxes(text) is None


@pytest.mark.parametrize("digits", [400, 5000])
def test_parse_boxes_survives_a_number_that_no_float_can_hold(digits):
    """A model that falls into repeating a digit must not end the run."""
    assert common.parse_boxes('[{"bbox_2d":[1,2,3,' + "9" * digits + '],"label":"a"}]') is None


@pytest.mark.parametrize(
    "text",
    ["<think>a</think><answer>B</answer>", "<think>a</think>\n<answer>B</answer>",
     " \n<think>\na\n\nb</think> <answer>\nB\n</answer>\n", "<think></think><answer></answer>",
     "<think>1 < 2 and <b> is fine</think><answer>B</answer>"],
)  # fmt: skip
def test_format_of_one_think_and_one_answer_is_right(text):
    assert common.score_format([text]).tolist() == [1.0]


@pytest.mark.parametrize(
    "text",
    ["", "B", "<answer>B</answer>", "<think>a</think>", "<think>a</think>B", "so <think>a</think><answer>B</answer>",
     "<think>a</think> so <answer>B</answer>", "<think>a</think><answer>B</answer>.",
     "<answer>B</answer><think>a</think>", "<think>a</think><answer>A</answer><answer>B</answer>",
     "<think>a</think><think>b</think><answer>B</answer>", "<think>a<think>b</think></think><answer>B</answer>",
     "<think>a<answer>A</answer></think><answer>B</answer>", "<think>a</think><answer><answer>B</answer></answer>",
     "<think>a</think><answer>B<think></answer>", "<think>a</think><answer>B", "<think>a<answer>B</answer>",
     "<Think>a</Think><Answer>B</Answer>", "<think>" * 3_000], ids=lambda text: text[:50] or "empty",
)  # fmt: skip
def test_format_of_anything_else_is_wrong(text):
    assert common.score_format([text]).tolist() == [0.0]


def test_format_scores_each_text_of_a_batch():
    assert common.score_format([think("B"), "B", think("7"), ""]).tolist() == [1, 0, 1, 0]


# ------------------------------------------------------------------------------------------------
# Answer -> score
# ------------------------------------------------------------------------------------------------


def counted_iou(a, b):
    """Intersection over union of boxes with whole corners, by counting pixels."""
    inside = [{(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])} for box in (a, b)]
    return len(inside[0] & inside[1]) / len(inside[0] | inside[1])


def test_box_iou_equals_counting_pixels():
    rng = np.random.default_rng(0)
    corners = np.sort(rng.integers(0, 12, (300, 2, 2, 2)), axis=2)  # (pairs, box of pair, low/high, x/y)
    corners[:, :, 1] += 1  # no empty box
    a, b = corners[:, 0].reshape(-1, 4).tolist(), corners[:, 1].reshape(-1, 4).tolist()
    wanted = [counted_iou(*pair) for pair in zip(a, b)]
    assert 0 < sum(value == 0 for value in wanted) < 200
    np.testing.assert_allclose(common.box_iou(a, b), wanted, atol=1e-12)


def test_box_iou_of_touching_equal_and_empty_boxes():
    box, beside, inner = [0, 0, 10, 10], [10, 0, 20, 10], [0, 0, 5, 10]
    assert common.box_iou([box, box, box, [0, 0, 0, 0]], [box, beside, inner, box]).tolist() == [1, 0, 0.5, 0]


def slow_mra(prediction, truth):
    """Mean over theta of [ |p - g| / g <= 1 - theta ], one float64 at a time, as the published scorers compute it."""
    hits = 0
    for theta in np.linspace(0.5, 0.95, 10).tolist():
        if truth == 0:
            hits += prediction == 0
        else:
            hits += abs(prediction - truth) / abs(truth) <= 1 - theta
    return hits / 10


def test_relative_accuracy_equals_the_slow_loop():
    rng = np.random.default_rng(0)
    predictions = [*rng.uniform(0, 10, 300), *rng.uniform(-10, 0, 20), 0.0, 5.0, math.nan]
    truths = [*rng.uniform(0.1, 10, 300), *rng.uniform(0.1, 10, 20), 0.0, 0.0, 1.0]
    wanted = [slow_mra(*pair) for pair in zip(predictions, truths)]
    assert len(set(wanted)) == 11
    assert common.mean_relative_accuracy(predictions, truths).tolist() == wanted


@pytest.mark.parametrize(
    "prediction,truth,score",
    [(10, 10, 1.0), (9.51, 10, 1.0), (9.2, 10, 0.9), (10.8, 10, 0.9), (8.1, 10, 0.7), (5.1, 10, 0.1), (4.9, 10, 0.0),
     (20, 10, 0.0), (-10, 10, 0.0), (0, 0, 1.0), (0.001, 0, 0.0), (math.nan, 10, 0.0), (math.inf, 10, 0.0),
     (math.nan, 0, 0.0), (1e308, 1e-300, 0.0)],
)  # fmt: skip
def test_relative_accuracy_by_hand(prediction, truth, score):
    assert common.mean_relative_accuracy([prediction], [truth]).tolist() == [score]


def test_relative_accuracy_counts_the_border_itself_in_float64():
    """Errors of exactly one half and one quarter are met at theta = .50 and .75; one float64 beyond them is not. And an
    error of .2 misses theta = .8, because 1 - .8 is a little less in float64: so say all published scorers."""
    assert common.mean_relative_accuracy([5.0, np.nextafter(5.0, 0)], [10.0, 10.0]).tolist() == [0.1, 0.0]
    assert common.mean_relative_accuracy([7.5, np.nextafter(7.5, 0)], [10.0, 10.0]).tolist() == [0.6, 0.5]
    assert common.mean_relative_accuracy([8.0, 9.0], [10.0, 10.0]).tolist() == [0.6, 0.9]


def test_boxes_are_matched_by_label_and_used_once():
    first, second, other = [0, 0, 4, 4], [5, 5, 9, 9], [1, 1, 2, 2]
    wanted = [{"bbox_2d": first, "label": "chair"}, {"bbox_2d": second, "label": "chair"},
    {"bbox_2d": other, "label": "bed"}]
    said = [{"bbox_2d": other, "label": " Bed "}, {"bbox_2d": second, "label": "chair"},
    {"bbox_2d": other, "label": "lamp"}]
    assert common.match_boxes(said, wanted) == [second, [0, 0, 0, 0], other]
    assert common.match_boxes(None, wanted) == [[0, 0, 0, 0]] * 3


CHAIR, BED = {"bbox_2d": [0, 0, 10, 10], "label": "chair"}, {"bbox_2d": [20, 20, 30, 40], "label": "bed"}
BOTH = '[{"bbox_2d":[0,0,10,10],"label":"chair"},{"bbox_2d":[20,20,30,40],"label":"bed"}]'
HALF = '[{"bbox_2d":[0,0,10,5],"label":"chair"}]'
MIXED = [  # text, example, score, legal: by hand
    (think("B"), example("relative direction", "B", SIDES), 1.0, True),
    (think("A"), example("relative direction", "B", SIDES), 0.0, True),
    ("right", example("relative direction", "B", SIDES), 1.0, True),
    (think("A or B"), example("relative direction", "B", SIDES), 0.0, False),
    ("trash bin", example("relative distance", "A", PAIR), 1.0, True),
    (think("B"), example("relative distance", "A", PAIR), 0.0, True),
    (think("9"), example("object size", "10"), 0.9, True),
    ("2.0 m", example("absolute distance", "2.0"), 1.0, True),
    ("four", example("object count", "4"), 1.0, True),
    ("4 or 5", example("object count", "4"), 0.0, False),
    (think("**4 chairs**"), example("object count", "4"), 1.0, True),
    (think("The answer is: \\boxed{B}"), example("relative direction", "B", SIDES), 1.0, True),
    (think("2.5 m^2"), example("room size", "2.5"), 1.0, True),
    (think("1e400"), example("room size", "15.2"), 0.0, False),
    (BOTH, example("locate", [CHAIR, BED]), 1.0, True),
    (BOTH, example("locate", [CHAIR]), 0.5, True),  # a box too many halves the score
    (HALF, example("locate", [CHAIR]), 0.5, True),
    (f"```json\n{HALF}\n```", example("locate", [CHAIR]), 0.5, True),
    (HALF, example("locate", [CHAIR, BED]), 0.25, True),
    (HALF, example("locate", [BED]), 0.0, True),
    ("[]", example("locate", [BED]), 0.0, True),
    ("the chair", example("locate", [CHAIR]), 0.0, False),
]


def test_scores_of_a_mixed_batch_by_hand():
    texts, examples, scores, legal = zip(*MIXED)
    got = common.score_answers(texts, examples)
    np.testing.assert_allclose(got[0], scores, atol=1e-12)
    assert got[0].dtype == np.float64 and got[1].tolist() == list(legal)


def slow_score(text, example):
    """One answer, as the docstring of score_answers says it."""
    answer = common.extract_answer(text)
    if example.question_type == "locate":
        left, total = common.parse_boxes(answer) or [], 0.0
        count = max(len(left), len(example.answer))
        for wanted in example.answer:
            for box in left:
                if box["label"].lower() == wanted["label"].lower():
                    total += counted_iou(box["bbox_2d"], wanted["bbox_2d"])
                    left = [other for other in left if other is not box]
                    break
        return total / count
    if example.options:
        return float(common.parse_choice(answer, example.options) == example.answer)
    number = common.parse_number(answer)
    return 0.0 if number is None else slow_mra(number, float(example.answer))


def test_scores_of_a_shuffled_batch_equal_a_loop_over_its_items():
    rng = np.random.default_rng(0)
    texts, examples = [], []
    for _ in range(40):
        size, box = rng.integers(1, 200), [*rng.integers(0, 9, 2), *rng.integers(10, 20, 2)]
        said = [{"bbox_2d": [int(x) for x in box], "label": ("chair", "bed")[rng.integers(2)]}] * rng.integers(1, 3)
        texts += [think("ABCD"[rng.integers(4)]), f"{size * rng.uniform(0.4, 1.6):.2f}", common.boxes_text(said),
        "nothing"]
        examples += [example("relative direction", "ABCD"[rng.integers(4)], SIDES), example("object size", str(size))]
        examples += [example("locate", [CHAIR, BED][: rng.integers(1, 3)]), example("object count", "3")]
    order = rng.permutation(len(texts))
    texts, examples = [texts[i] for i in order], [examples[i] for i in order]
    wanted = [slow_score(*pair) for pair in zip(texts, examples)]
    assert len(set(wanted)) > 12
    np.testing.assert_allclose(common.score_answers(texts, examples)[0], wanted, atol=1e-12)
    assert [common.score_answers([t], [e])[0][0] for t, e in zip(texts, examples)] == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    "text",
             ["", " ", None, "<answer></answer>", think(""), think(" "), think("A, B, C, D"), think("None"),
              think("0123456789"), think("A. left B. right C. front D. back"), "<answer>B", "A" * 10_000,
              think("left right front back"), think("3 chairs or 15.2"), think("\\boxed{A}\\boxed{B}\\boxed{C}\\boxed{D}"),
              think("\\boxed{3}\\boxed{15.2}"), "```json\n```", "The answer is:"],
    ids=lambda text: str(text)[:50],
)  # fmt: skip
def test_saying_nothing_or_everything_earns_nothing(text):
    """The empty text is part of every truth: a reward by `in` would pay for it."""
    examples = [example("relative direction", letter, SIDES) for letter in "ABCD"]
    examples += [example("object count", "3"), example("room size", "15.2"), example("locate", [CHAIR])]
    scores, _ = common.score_answers([text] * len(examples), examples)
    assert scores.tolist() == [0.0] * len(examples)


def test_scores_of_no_texts_are_empty():
    scores, legal = common.score_answers([], [])
    assert len(scores) == len(legal) == 0


# ------------------------------------------------------------------------------------------------
# The baseline
# ------------------------------------------------------------------------------------------------


def test_constant_guess_of_numbers_is_the_training_answer_with_the_highest_relative_accuracy():
    train = [example("object size", size) for size in ("100", "100", "10", "105")]
    test = [example("object size", size) for size in ("100", "80", "1000", "100")]
    # 100 scores 1, 1, 0, .9+ on the training answers, more than 10 (1 of 4) and 105 (.9, .9, 0, 1) do.
    # On the test: 1; |100 - 80| / 80 = .25 is met by .50 ... .75, so .6; 0; 1.
    assert benchmarks.constant_guess(train, test) == {"single_image: object size": pytest.approx((1 + 0.6 + 0 + 1) / 4)}


def test_constant_guess_of_choices_is_the_most_frequent_training_answer():
    train = [example("relative distance", letter, PAIR) for letter in "BBA"]
    test = [example("relative distance", letter, PAIR) for letter in "ABBB"]
    train += [example("relative direction", letter, SIDES) for letter in "CCA"]
    test += [example("relative direction", letter, SIDES) for letter in "CABD"]
    assert benchmarks.constant_guess(train, test) == {
        "single_image: relative direction": 0.25,
        "single_image: relative distance": 0.75,
    }


def test_constant_guess_tells_directions_with_other_words_apart():
    corners = ["A. left-front", "B. left-back", "C. right-front", "D. right-back"]
    train = [example("relative direction", letter, SIDES) for letter in "AAB"]
    train += [example("relative direction", letter, corners) for letter in "DDDC"]
    test = [example("relative direction", "A", SIDES), example("relative direction", "D", corners)]
    assert benchmarks.constant_guess(train, test) == {"single_image: relative direction": 1.0}


def test_constant_guess_is_of_words_whatever_their_letter():
    """Three of four training answers are "left", under two letters: "left" is the guess, not a letter."""
    mirrored = ["A. right", "B. left", "C. front", "D. back"]
    train = [example("relative direction", "A", SIDES), example("relative direction", "B", mirrored)]
    train += [example("relative direction", "B", mirrored), example("relative direction", "B", SIDES)]
    test = [example("relative direction", "A", SIDES), example("relative direction", "B", mirrored)]
    assert benchmarks.constant_guess(train, test) == {"single_image: relative direction": 1.0}


def test_constant_guess_tells_kinds_of_pictures_apart():
    """One picture: the commonest of 3, 3, 2 is right once of two. Video: of 9, 9, 4 once of three. In the order of DATA_TYPES."""
    train = [example("object count", count) for count in "332"] + [video("object count", count) for count in "994"]
    test = [video("object count", "9"), *(example("object count", count) for count in "37"), *(video("object count", "1"),) * 2]
    guess = benchmarks.constant_guess(train, test)
    assert list(guess.items()) == [("single_image: object count", 0.5), ("video: object count", pytest.approx(1 / 3))]


def video(*parts):
    return replace(example(*parts), data_type="video")


def test_skill_is_the_share_of_the_way_from_the_guess_to_perfect():
    guess = {"relative direction": 0.25, "object size": 0.6}
    assert benchmarks.skill({"relative direction": 0.25, "object size": 0.6}, guess) == 0
    assert benchmarks.skill({"relative direction": 1.0, "object size": 1.0}, guess) == 1
    assert benchmarks.skill({"relative direction": 0.55, "object size": 0.5}, guess) == pytest.approx((0.4 - 0.25) / 2)
