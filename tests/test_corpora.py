from functools import cache

import pytest

from hf_moe.corpora import DOMAINS, SHARED_PARAGRAPH, fingerprint, load_corpus, load_text_file, paragraphs, split


cached_corpus = cache(load_corpus)


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_domain_has_text_on_both_sides(domain):
    corpus = cached_corpus(domain)
    assert corpus.name == domain
    assert sum(map(len, corpus.train)) > 100_000
    assert sum(map(len, corpus.held_out)) > 20_000


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_longer_paragraph_is_on_both_sides(domain):
    corpus = cached_corpus(domain)
    sides = [
        {fingerprint(part) for text in side for part in paragraphs(text) if len(part) >= SHARED_PARAGRAPH}
        for side in (corpus.train, corpus.held_out)
    ]
    assert not sides[0] & sides[1]


def test_a_domain_is_the_same_every_time():
    assert load_corpus("reference") == load_corpus("reference")


def test_domains_are_different_texts():
    texts = [cached_corpus(domain).held_out for domain in DOMAINS]
    assert len(set(texts)) == len(DOMAINS)


def test_collection_stops_at_the_limit():
    small = load_corpus("code", max_characters=50_000)
    assert sum(map(len, small.train + small.held_out)) < sum(map(len, load_corpus("code").train))


def test_an_unknown_domain_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"`domain` must be one of reference, .*got 'poems'"):
        load_corpus("poems")


def test_every_fifth_document_is_held_out():
    documents = [f"document {number} " * 30 for number in range(10)]
    corpus = split("x", documents)
    assert corpus.held_out == (documents[2], documents[7])
    assert len(corpus.train) == 8


def test_what_a_held_out_document_says_is_taken_out_of_training():
    quoted = "a sentence that two documents share, wrapped differently in each of them " * 2
    documents = [f"own text of document {number} " * 20 + "\n\n" for number in range(3)]
    documents[0] += quoted.replace(" two ", "\n  two ")
    documents[2] += quoted
    corpus = split("x", documents)
    assert "share" in corpus.held_out[0]
    assert not any("share" in text for text in corpus.train)


def test_the_users_file_is_cut_between_paragraphs(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("\n\n".join(f"paragraph {number}\nsecond line" for number in range(10)))
    corpus = load_text_file(path)
    assert corpus.name == "notes.txt"
    assert corpus.train[0].count("paragraph") == 8
    assert corpus.held_out[0].startswith("paragraph 8\nsecond line\n\nparagraph 9")


def test_a_file_of_single_lines_is_cut_between_lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"line {number}\n" for number in range(5)))
    assert load_text_file(path)[1:] == (("line 0\nline 1\nline 2\nline 3\n",), ("line 4\n",))


@pytest.mark.parametrize("content", [b"", b"\n \t\n"])
def test_an_empty_file_is_named(tmp_path, content):
    (tmp_path / "empty.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"empty\.txt` is empty\. Give a file with text"):
        load_text_file(tmp_path / "empty.txt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("one.txt", b"a single line", "one single line"),
        ("binary.txt", b"\xff\xfe\x00\x01" * 10, "not UTF-8"),
        ("missing.txt", None, "No such file"),
    ],
)
def test_an_unusable_file_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}` .*{message}"):
        load_text_file(tmp_path / name)
