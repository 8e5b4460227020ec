import numpy as np
import pytest

from components.items.codes import (
    attribute_vectors,
    codes_of,
    guidance_vectors,
    lexical_vectors,
    list_words,
    name_hashes,
    query_vector,
)


def test_codes_are_fixed_unit_vectors_nearly_orthogonal():
    ids = np.array([1, 2, 3, 10**12, -5])
    codes = codes_of(ids, 256)
    np.testing.assert_array_equal(codes, codes_of(ids, 256))
    np.testing.assert_array_equal(codes[3], codes_of(ids[3:4], 256)[0])
    np.testing.assert_allclose(np.linalg.norm(codes, axis=1), 1, rtol=1e-5)
    many = codes_of(np.arange(2000), 256)
    products = (many @ many.T)[np.triu_indices(2000, 1)]
    assert abs(products.mean()) < 1e-3
    assert products.std() == pytest.approx(1 / 16, rel=0.02)
    assert codes_of(ids, 0).shape == (5, 0)


def test_names_are_the_same_with_the_same_words_in_the_same_order():
    meat, same, turned, milk, *empty = name_hashes(
        ["Meat - shelf stable", "MEAT/Shelf  stable", "shelf stable meat", "milk", "", "?"]
    )
    assert meat == same and len({meat, turned, milk, np.uint64(0)}) == 4
    assert empty == [0, 0]


def test_a_query_finds_the_text_with_its_words_and_rare_words_count_more():
    texts = ["Red lip balm", "Red nail polish", "Red shampoo for dry hair", ""]
    vectors, present = lexical_vectors(texts, 1024)
    assert present.tolist() == [True, True, True, False]
    np.testing.assert_allclose(np.linalg.norm(vectors[:3], axis=1), 1, atol=0.15)
    np.testing.assert_array_equal(vectors[3], 0)
    scores = vectors @ query_vector("shampoo, RED", 1024)
    assert scores.argmax() == 2
    assert vectors[0] @ query_vector("balm", 1024) > vectors[0] @ query_vector("red", 1024) > 0.1


def test_a_query_has_the_same_vector_in_any_order_and_none_without_words():
    np.testing.assert_array_equal(query_vector("lip balm", 128), query_vector("Balm  lip balm", 128))
    np.testing.assert_array_equal(query_vector("?!", 128), np.zeros(128))
    assert query_vector("lip balm", 0).shape == (0,)


def test_a_guidance_has_those_of_its_words_that_the_texts_have():
    known = [list_words(["Dry skin balm", "against all"]), list_words(["care > skin"])]
    assert (np.diff(known[0].astype(object)) > 0).all()
    lexical, category = guidance_vectors("Against DRY, unheard-of skin!", known, [256, 128])
    two = np.sqrt(2)  # dry and skin, in both spaces; "against" says nothing
    np.testing.assert_allclose(lexical, (query_vector("dry", 256) + query_vector("skin", 256)) / two, atol=1e-6)
    np.testing.assert_allclose(category, query_vector("skin", 128) / two, atol=1e-6)
    for vector, width in zip(guidance_vectors("dry skin", known[:1] * 2, [256, 128]), (256, 128), strict=True):
        np.testing.assert_allclose(vector, query_vector("skin dry", width), atol=1e-6)  # as a query has them


def test_a_guidance_without_a_known_word_has_no_vector():
    known = [list_words(["lip balm for you"]), list_words([""]), list_words([])]
    for text in ("quantum zebra", "For you", "", "?!"):
        for vector, width in zip(guidance_vectors(text, known, [128, 64, 0]), (128, 64, 0), strict=True):
            np.testing.assert_array_equal(vector, np.zeros(width, dtype=np.float32))
    assert guidance_vectors("balm", [], []) == []


def test_equal_attributes_have_equal_codes_and_unknown_ones_none():
    codes, present = attribute_vectors(["Nivea", None, "Nivea", "Dove"], 128)
    assert present.tolist() == [True, False, True, True]
    np.testing.assert_array_equal(codes[0], codes[2])
    np.testing.assert_array_equal(codes[1], 0)
    assert codes[0] @ codes[0] == pytest.approx(1)
    assert abs(codes[0] @ codes[3]) < 0.4
