"""Edit distances, warping and the nearest spelling against plain definitions and public golden numbers."""

import random

import numpy as np
import pytest

from ctpd.text.edit_distance import edit_distance_pairing, nearest_tokens, time_warping, token_distances
from tests.fixtures.distillation import VECTORS

# The second case is the golden `mined.dtw.2`.
PUBLISHED = VECTORS["mined.dtw"]
HUGGING = {
    "inputs": {
        "teacher_tokens": ["ĠHugging", "ĠFace", "Ġis", "Ġun", "believ", "able"],
        "student_tokens": ["ĠHug", "ging", "ĠFace", "Ġis", "Ġunbelievable"],
    },
    "expected": {
        "matches": [[0, 0], [0, 1], [1, 2], [2, 3], [3, 3], [4, 3], [5, 4]],
        "cost": 22.0,
        "student_to_teacher": [[0], [0], [1], [2, 3, 4], [5]],
        "matrix": [
            [4, 7, 14, 20, 31],
            [8, 8, 7, 11, 21],
            [11, 11, 11, 7, 18],
            [13, 14, 15, 9, 17],
            [19, 18, 19, 14, 15],
            [23, 22, 21, 18, 22],
        ],
    },
}


@pytest.mark.parametrize("vector", [PUBLISHED, HUGGING], ids=["mined.dtw", "mined.dtw.2"])
def test_warping_equals_the_public_code(vector):
    inputs, expected = vector["inputs"], vector["expected"]
    matches, total = time_warping(token_distances(inputs["teacher_tokens"], inputs["student_tokens"]))
    assert [list(pair) for pair in matches] == expected["matches"]
    np.testing.assert_array_equal(total, np.array(expected["matrix"]))
    assert total[-1, -1] == expected["cost"]
    aligned = [found[0] if len(found) == 1 else -1 for found in expected["student_to_teacher"]]
    assert edit_distance_pairing(inputs["student_tokens"], inputs["teacher_tokens"]) == aligned


def test_vocabulary_map_equals_the_public_code():
    vector = VECTORS["mined.vocab_map.tokenkit"]
    student, teacher = (list(vector["inputs"][f"{role}_vocab"]) for role in ("student", "teacher"))
    found = nearest_tokens(student, teacher).tolist()
    assert found == vector["expected"]["student_to_teacher"]
    assert {token: by_definition(token, teacher[near]) for token, near in zip(student, found, strict=True)} == (
        vector["expected"]["edit_distance"]
    )


def by_definition(a, b):
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        above, row = row, [i]
        for j, right in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (left != right)))
    return row[-1]


def words(draw, number, lengths, alphabet="abcé"):
    return ["".join(draw.choices(alphabet, k=draw.choice(lengths))) for _ in range(number)]


@pytest.mark.parametrize("lengths", [range(10), (0, 1, 63, 64, 65, 130)], ids=["short", "around a machine word"])
def test_distances_are_levenshteins(lengths):
    draw = random.Random(0)
    for _ in range(4):
        ours, theirs = words(draw, 9, lengths), words(draw, 11, lengths, alphabet="abdé")
        wanted = [[by_definition(a, b) for b in ours] for a in theirs]
        assert token_distances(theirs, ours).tolist() == wanted


def test_warping_is_the_recurrence_with_its_order_of_ties():
    draw = random.Random(1)
    for _ in range(100):
        costs = [[draw.randrange(3) for _ in range(draw.randrange(1, 2) * 5)] for _ in range(draw.randrange(1, 7))]
        matches, total = time_warping(np.array(costs))
        wanted = [[0] * len(costs[0]) for _ in costs]
        steps = {}
        for t, row in enumerate(costs):
            for u, cost in enumerate(row):
                ways = [(t - 1, u - 1), (t - 1, u), (t, u - 1)]
                ways = [way for way in ways if min(way) >= 0]
                best = min((wanted[i][j] for i, j in ways), default=0)
                wanted[t][u] = cost + best
                steps[t, u] = next(((i, j) for i, j in ways if wanted[i][j] == best), None)
        assert total.tolist() == wanted
        path = [(len(costs) - 1, len(costs[0]) - 1)]
        while steps[path[-1]] is not None:
            path.append(steps[path[-1]])
        assert matches == path[::-1]


def scanned(token, vocabulary):
    """Tokenkit's search, written as it is described."""
    by_length = sorted(vocabulary, key=len)
    shortest_first = len(token) < len(by_length[len(by_length) // 2])
    best = None
    for candidate in by_length if shortest_first else reversed(by_length):
        if best is None or by_definition(token, candidate) < by_definition(token, best):
            best = candidate
    return best


def test_nearest_is_the_first_of_the_least_distance_in_the_published_order():
    draw = random.Random(2)
    vocabulary = list(dict.fromkeys(words(draw, 60, range(1, 9))))
    tokens = words(draw, 60, range(1, 11), alphabet="abcx")
    found = [vocabulary[index] for index in nearest_tokens(tokens, vocabulary)]
    assert found == [token if token in vocabulary else scanned(token, vocabulary) for token in tokens]


def test_ids_without_a_token_are_never_the_nearest():
    assert nearest_tokens(["a", "", "bb"], ["", "b", "a", "b"]).tolist() == [2, -1, 1]
    assert nearest_tokens(["a"], ["", ""]).tolist() == [-1]


def test_pairing_of_one_side_without_tokens_is_no_pairing():
    assert edit_distance_pairing(["a", "b"], []) == [-1, -1]
    assert edit_distance_pairing([], ["a"]) == []


def test_pairing_ignores_the_space_marks_of_either_tokenizer():
    assert edit_distance_pairing(["▁like", "▁cats"], ["Ġlike", "Ġcats"]) == [0, 1]
    assert token_distances(["Ġlike"], ["▁like"]).tolist() == [[0]]
