"""A vocabulary knows who it is, and refuses dictionaries that do not belong together."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from geneformer_fast.errors import VocabularyError
from geneformer_fast.tokenization.vocabulary import SAVED_FILE, Vocabulary, check_same

GENES = [f"ENSG{i:011d}" for i in range(1, 8)]
MEDIANS = {gene: 0.5 + i for i, gene in enumerate(GENES)}
V1_TOKENS = {"<pad>": 0, "<mask>": 1, **{gene: i + 2 for i, gene in enumerate(GENES)}}
V2_TOKENS = {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3, **{gene: i + 4 for i, gene in enumerate(GENES)}}


def write(folder: Path, tokens, medians, release="", mapping=None, suffix=".pkl") -> Path:
    folder.mkdir(exist_ok=True)
    files = {"token_dictionary": tokens, "gene_median_dictionary": medians, "ensembl_mapping_dict": mapping}
    for kind, content in files.items():
        if content is None:
            continue
        path = folder / f"{kind}{release}{suffix}"
        if suffix == ".json":
            path.write_text(json.dumps(content))
        else:
            path.write_bytes(pickle.dumps(content))
    return folder


@pytest.mark.parametrize("suffix", [".pkl", ".pickle", ".json"])
@pytest.mark.parametrize("release", ["", "_gc30M", "_gc95M", "_gc104M"])
def test_every_name_of_geneformers_files(tmp_path, release, suffix):
    folder = write(tmp_path / "dicts", V2_TOKENS, MEDIANS, release, {"TP53": GENES[0]}, suffix)
    vocabulary = Vocabulary.from_folder(folder)
    assert vocabulary.family == "v2"
    assert vocabulary.special == {"pad": 0, "mask": 1, "cls": 2, "eos": 3}
    assert vocabulary.token_ids == {gene: V2_TOKENS[gene] for gene in GENES}
    assert vocabulary.medians == MEDIANS
    assert vocabulary.aliases == {"TP53": GENES[0]}
    assert (vocabulary.max_len, vocabulary.gene_capacity, vocabulary.n_tokens) == (4096, 4094, 11)
    assert vocabulary.input_ids_dtype == np.int32
    assert vocabulary.name not in ("geneformer-v1", "geneformer-v2")


def test_families(tmp_path):
    v1 = Vocabulary.from_folder(write(tmp_path / "v1", V1_TOKENS, MEDIANS))
    assert (v1.family, v1.cls_id, v1.eos_id, v1.pad_id, v1.mask_id) == ("v1", None, None, 0, 1)
    assert (v1.max_len, v1.gene_capacity, v1.input_ids_dtype) == (2048, 2048, np.int16)
    assert not v1.totals_over_vocabulary
    bionemo = Vocabulary.from_medians(MEDIANS, "bionemo")
    assert bionemo.special == {"cls": 0, "mask": 1, "pad": 2, "sep": 3, "unk": 4}
    assert (bionemo.cls_id, bionemo.eos_id, bionemo.pad_id, bionemo.gene_capacity) == (0, None, 2, 2047)
    assert bionemo.totals_over_vocabulary


def test_ids_beyond_int16_widen_the_stored_type():
    tokens = {gene: 40_000 + i for i, gene in enumerate(GENES)}
    assert Vocabulary("big", "v1", tokens, MEDIANS).input_ids_dtype == np.int32


def test_a_folder_with_both_releases_needs_a_preset(tmp_path):
    write(tmp_path / "d", V1_TOKENS, MEDIANS, "_gc30M")
    folder = write(tmp_path / "d", V2_TOKENS, MEDIANS, "_gc95M")
    with pytest.raises(VocabularyError, match=r"token_dictionary_gc30M\.pkl \(v1\), token_dictionary_gc95M.*v1 or v2"):
        Vocabulary.from_folder(folder)
    assert Vocabulary.from_folder(folder, preset="v1").family == "v1"
    assert Vocabulary.from_folder(folder, preset="v2").family == "v2"


def test_renamed_copies_are_no_ambiguity(tmp_path):
    write(tmp_path / "d", V2_TOKENS, MEDIANS, "_gc95M")
    folder = write(tmp_path / "d", V2_TOKENS, MEDIANS, "_gc104M")
    assert Vocabulary.from_folder(folder).family == "v2"
    write(folder, V2_TOKENS, dict.fromkeys(GENES, 9.0), "_gc104M")
    with pytest.raises(VocabularyError, match=r"several vocabularies.*keep one"):
        Vocabulary.from_folder(folder)


def test_geneformers_package_layout(tmp_path):
    folder = write(tmp_path / "geneformer", V2_TOKENS, MEDIANS, "_gc104M")
    write(folder / "gene_dictionaries_30m", V1_TOKENS, MEDIANS, "_gc30M")
    assert Vocabulary.from_folder(folder, preset="v1").family == "v1"
    assert Vocabulary.from_folder(folder, preset="v2").family == "v2"


def test_wrong_preset_is_refused(tmp_path):
    folder = write(tmp_path / "d", V1_TOKENS, MEDIANS)
    with pytest.raises(VocabularyError, match=r"preset 'v2'.*only token_dictionary\.pkl \(v1\)"):
        Vocabulary.from_folder(folder, preset="v2")
    with pytest.raises(VocabularyError, match="unknown preset 'v3'"):
        Vocabulary.from_folder(folder, preset="v3")


def test_empty_and_absent_folders(tmp_path):
    with pytest.raises(VocabularyError, match="no vocabulary here"):
        Vocabulary.from_folder(tmp_path)
    with pytest.raises(VocabularyError, match="no such folder"):
        Vocabulary.from_folder(tmp_path / "absent")
    (tmp_path / "token_dictionary.pkl").write_bytes(pickle.dumps(V1_TOKENS))
    with pytest.raises(VocabularyError, match=r"found token_dictionary\.pkl"):
        Vocabulary.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("tokens", "medians", "message"),
    [
        (V1_TOKENS, dict.fromkeys(GENES[:4], 1.0), r"3 of 7 genes with a token have no median \(e\.g\. ENSG0"),
        ({**V1_TOKENS, GENES[0]: 3}, MEDIANS, f"token id 3 is used twice, by '{GENES[0]}' and '{GENES[1]}'"),
        ({**V1_TOKENS, GENES[0]: 0}, MEDIANS, "token id 0 is used twice"),
        ({**V1_TOKENS, GENES[0]: -5}, MEDIANS, "non-negative integer"),
        ({**V1_TOKENS, GENES[0]: "7"}, MEDIANS, "not a string and an integer"),
        ({**V1_TOKENS, 7: 7}, MEDIANS, "entry 7: 7"),
        ({key: i for key, i in V2_TOKENS.items() if key != "<eos>"}, MEDIANS, "special tokens missing.*eos"),
        ({key: i for key, i in V1_TOKENS.items() if key != "<pad>"}, MEDIANS, "special tokens missing.*pad"),
        ({"<pad>": 0, "<mask>": 1}, MEDIANS, "holds no genes"),
        (V1_TOKENS, {**MEDIANS, GENES[2]: 0.0}, f"the median of {GENES[2]} is 0.0"),
        (V1_TOKENS, {**MEDIANS, GENES[2]: -1.5}, "is -1.5"),
        (V1_TOKENS, {**MEDIANS, GENES[2]: float("nan")}, "is nan"),
        (V1_TOKENS, {**MEDIANS, GENES[2]: float("inf")}, "is inf"),
        (V1_TOKENS, {**MEDIANS, GENES[2]: "1.0"}, "not a string and a number"),
        ([1, 2], MEDIANS, "holds a list, expected a dictionary"),
        (V1_TOKENS, 3.5, "holds a float, expected a dictionary"),
    ],
)
def test_unusable_dictionaries(tmp_path, tokens, medians, message):
    with pytest.raises(VocabularyError, match=message):
        Vocabulary.from_folder(write(tmp_path / "d", tokens, medians))


def test_save_and_read_back(tmp_path):
    made = Vocabulary.from_medians(
        {"ENSMUSG2": 0.1 + 0.2, "ENSMUSG1": 1e-7, "Ünicode": 3.0},
        "v2",
        name="mouse",
        aliases={"tp53": "ENSMUSG2"},
        symbols={"Tp53": "ENSMUSG2"},
        max_len=100,
    )
    assert made.token_ids == {"ENSMUSG1": 4, "ENSMUSG2": 5, "Ünicode": 6}
    assert made.aliases == {"TP53": "ENSMUSG2"}
    path = made.save(tmp_path / "new" / "folder")
    assert [file.name for file in path.parent.iterdir()] == [SAVED_FILE]
    read = Vocabulary.from_folder(path.parent)
    assert read.to_dict() == made.to_dict()
    assert read.identity() == made.identity()
    with pytest.raises(VocabularyError, match=r"preset 'v1'.*'mouse' of family 'v2'"):
        Vocabulary.from_folder(path.parent, preset="v1")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "cannot be read as JSON"),
        (lambda text: "{}", "not a vocabulary saved"),
        (lambda text: "[]", "holds no JSON object"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "newer"),
        (lambda text: text.replace('"medians"', '"means"'), "'medians' is missing"),
        (lambda text: text.replace('"family": "v2"', '"family": "v9"'), "unknown family 'v9'"),
        (lambda text: text.replace('"max_len": 4096', '"max_len": 4'), "leaves no room"),
        (lambda text: text.replace('"max_len": 4096', '"max_len": "4096"'), "leaves no room"),
        (lambda text: text.replace("1.5", "1.6", 1), "damaged or was changed.*remove its field sha256"),
    ],
)
def test_damaged_saved_vocabulary(tmp_path, damage, message):
    path = Vocabulary.from_medians(MEDIANS).save(tmp_path)
    text = path.read_text()
    path.write_text(damage(text))
    assert path.read_text() != text
    with pytest.raises(VocabularyError, match=message):
        Vocabulary.from_folder(tmp_path)


def test_fingerprint_covers_what_a_model_must_agree_with():
    base = Vocabulary.from_medians(MEDIANS)
    assert Vocabulary.from_medians(dict(reversed(MEDIANS.items()))).fingerprint == base.fingerprint
    nearly = {**MEDIANS, GENES[0]: np.nextafter(MEDIANS[GENES[0]], 1).item()}
    others = [
        Vocabulary.from_medians(nearly),
        Vocabulary.from_medians(MEDIANS, "v1"),
        Vocabulary.from_medians(MEDIANS, max_len=512),
        Vocabulary.from_medians({gene: MEDIANS[gene] for gene in GENES[:-1]}),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 5
    aliased = Vocabulary.from_medians(MEDIANS, aliases={"A": GENES[0]})
    assert aliased.fingerprint == base.fingerprint
    assert aliased.mapping_fingerprint != base.mapping_fingerprint
    # identity pairs and targets without a token change nothing
    idle = Vocabulary.from_medians(MEDIANS, aliases={GENES[0]: GENES[0], "B": "unknown"})
    assert idle.identity() == base.identity()


def test_mixing_vocabularies_is_refused_by_name():
    one = Vocabulary.from_medians(MEDIANS, "v1", name="heart")
    two = Vocabulary.from_medians(MEDIANS, "v2", name="liver")
    one.check_same(Vocabulary.from_medians(MEDIANS, "v1", name="heart"))
    with pytest.raises(VocabularyError, match=r"'heart' \(9 tokens.*'liver' \(11 tokens"):
        one.check_same(two)
    check_same(one.identity(), {"family": "v1", "n_tokens": None})
    check_same(one.identity(), {"name": "heart", "family": "v1", "n_tokens": 9})
    with pytest.raises(VocabularyError, match="n_tokens differs"):
        check_same(one.identity(), {"n_tokens": 25426})


def test_bionemo_text_vocabulary(tmp_path):
    lines = ["[CLS]", "[MASK]", "[PAD]", "[SEP]", "[UKW]", *GENES]
    (tmp_path / "vocab.txt").write_text("\n".join(lines) + "\n")
    with pytest.raises(VocabularyError, match=r"needs one file with medians.*found none"):
        Vocabulary.from_folder(tmp_path)
    (tmp_path / "medians.json").write_text(json.dumps(MEDIANS))
    vocabulary = Vocabulary.from_folder(tmp_path)
    assert vocabulary.family == "bionemo"
    assert vocabulary.special == {"cls": 0, "mask": 1, "pad": 2, "sep": 3, "unk": 4}
    assert vocabulary.token_ids == {gene: i + 5 for i, gene in enumerate(GENES)}
    (tmp_path / "vocab.txt").write_text("\n".join([*lines, GENES[0]]))
    with pytest.raises(VocabularyError, match=r"line 13.*appears twice"):
        Vocabulary.from_folder(tmp_path)


def test_bionemo_json_vocabulary(tmp_path):
    (tmp_path / "geneformer.vocab").write_text(json.dumps({"gene_to_ens": {f"G{i}": g for i, g in enumerate(GENES)}}))
    (tmp_path / "medians.json").write_text(json.dumps(MEDIANS))
    vocabulary = Vocabulary.from_folder(tmp_path)
    assert vocabulary.token_ids == {gene: i + 5 for i, gene in enumerate(GENES)}
    assert vocabulary.symbols["G0"] == GENES[0]


def test_the_official_dictionaries(shared_dir):
    folder = shared_dir / "data" / "dicts"
    with pytest.raises(VocabularyError, match=r"pass preset \(--preset\) v1 or v2"):
        Vocabulary.from_folder(folder)
    v1 = Vocabulary.from_folder(folder, preset="v1")
    assert (v1.name, v1.n_tokens, len(v1.token_ids), v1.token_ids["ENSG00000000003"]) == (
        "geneformer-v1",
        25426,
        25424,
        2,
    )
    v2 = Vocabulary.from_folder(folder, preset="v2")
    assert (v2.name, v2.n_tokens, len(v2.token_ids), v2.token_ids["ENSG00000000003"]) == (
        "geneformer-v2",
        20275,
        20271,
        4,
    )
    assert len(v2.aliases) == 173_697
    bionemo = Vocabulary.from_folder(folder, preset="bionemo")
    assert (bionemo.name, bionemo.n_tokens, bionemo.token_ids["ENSG00000000003"]) == ("bionemo", 25429, 5)
    with pytest.raises(VocabularyError, match=r"'geneformer-v1'.*'geneformer-v2'"):
        v1.check_same(v2)


def test_tokens_of_one_release_with_medians_of_another(shared_dir, tmp_path):
    source = shared_dir / "data" / "dicts"
    shutil.copy(source / "token_dictionary_gc95M.pkl", tmp_path)
    shutil.copy(source / "gene_median_dictionary_gc30M.pkl", tmp_path)
    with pytest.raises(VocabularyError, match=r"of 20271 genes with a token have no median.*do not belong together"):
        Vocabulary.from_folder(tmp_path)


def test_it_is_shown_in_one_line():
    words = Vocabulary.from_medians({f"ENSG{i:011d}": 1.0 for i in range(20_000)}, name="mine")
    assert repr(words) == str(words)
    assert repr(words) == (
        f"Vocabulary('mine', family='v2', 20,000 genes, max_len=4096, fingerprint={words.fingerprint[:12]})"
    )
