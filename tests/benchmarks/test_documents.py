"""The figures in the document are those of the results that they name."""

import json

import pytest

from benchmarks import documents
from benchmarks.cases import cpu_cases
from benchmarks.results import Results
from support.invented_results import cpu_results

FOLDER = "benchmarks/results/2026-01-01-fake"


def data() -> dict:
    invented = cpu_results(1.0, 2.0)
    invented["environment"] |= {"cpu_capability": "AVX512", "torch": "2.13.0"}
    return invented


def test_figures_are_those_of_the_results_that_are_named():
    text = (documents.ROOT / documents.DOCUMENT).read_text()
    folder = documents.named_folder(text)
    if folder is None:  # before the first run on a quiet machine
        assert documents.with_block(text, "") == text
        assert not (documents.ROOT / documents.IMAGE).exists()
        return
    results = Results.open(documents.ROOT / folder / "results.json").data
    assert documents.with_block(text, documents.block(results, folder)) == text
    assert folder in (documents.ROOT / documents.IMAGE).read_text()


def test_a_block_says_where_and_when_and_what_was_missed():
    block = documents.block(data(), FOLDER)
    assert "on 2 cores, Fake CPU (AVX512), torch 2.13.0, 1 January 2026" in block
    assert f"[{FOLDER}](../{FOLDER}/report.md)" in block
    goal = "| a training step of the demo, against the FP32 step | >= 1.15 | 2.00 | 2.00 |"
    assert goal in block and "missed" not in block
    slow = cpu_results(2.0, 1.0)
    slow["environment"] = data()["environment"]
    slow["measurements"] = [r for r in slow["measurements"] if r["threads"] != 1]
    block = documents.block(slow, FOLDER)
    assert "against the FP32 step | >= 1.15 | 0.50 (missed) | - |" in block
    assert "2 threads: 800000 GFLOPS and 4000.0 GB/s" in block
    sweep = [case for case in cpu_cases() if case.model == "sweep" and case.threads == 0]
    assert block.count("| torchext_w8a16 | 2 |") == len(sweep)


def test_a_block_replaces_the_former_one():
    text = f"a\n{documents.BEGIN}old\n{documents.END}b\n"
    assert documents.named_folder(text) is None
    new = documents.with_block(text, documents.block(data(), FOLDER))
    assert documents.named_folder(new) == FOLDER
    assert new.startswith("a\n") and new.endswith("b\n") and "old" not in new
    with pytest.raises(ValueError, match="text must contain <!-- python -m benchmarks"):
        documents.with_block("a\nb\n", "new")


def test_the_plot_names_its_results(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    (tmp_path / documents.IMAGE).parent.mkdir(parents=True)
    folder = tmp_path / FOLDER
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(data()))
    (tmp_path / documents.DOCUMENT).write_text(documents.BEGIN + documents.END)
    documents.write(folder)
    image = (tmp_path / documents.IMAGE).read_bytes()
    assert FOLDER.encode() in image
    documents.write(folder)
    assert (tmp_path / documents.IMAGE).read_bytes() == image
    assert documents.named_folder((tmp_path / documents.DOCUMENT).read_text()) == FOLDER
