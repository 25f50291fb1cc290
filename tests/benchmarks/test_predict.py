"""benchmarks.predict: the table of predictions, what makes a row stale, and the verdicts."""

import pytest

import torchext
from benchmarks import cases, predict, predictions
from benchmarks.cases import Case
from benchmarks.predictions import (
    DEEP_GEMM,
    TORCHEXT,
    Key,
    OutOfTimeError,
    Prediction,
    Predictor,
    Table,
)

SMALL = Case("gemm", cases.FPROP, "small", "", (64, 256, 512))


def prediction(microseconds: float, key: Key) -> Prediction:
    return Prediction(key, "kernel", "code", microseconds, 1.5, 0.25, "consumers 40% full[slot]")


def key(contender: str, shape: str = "64x256x512") -> Key:
    return Key("h100", contender, cases.FPROP, shape, "128x128 split_k=1 cluster=1")


def test_the_table_is_read_back_as_written(tmp_path):
    table = Table(tmp_path / "predictions.csv")
    for contender in (TORCHEXT, DEEP_GEMM):
        table.add(prediction(12.5, key(contender)))
    assert Table(table.path).rows == table.rows


@pytest.fixture(scope="module")
def predicted(tmp_path_factory):
    """A predictor that has predicted SMALL on two GPUs, and what it said."""
    available, reason = torchext.is_available("sim")
    if not available:
        pytest.skip(reason)
    said: list[str] = []
    path = tmp_path_factory.mktemp("predict") / "predictions.csv"
    predictor = Predictor(Table(path), said.append)
    rows = [predictor.ours(SMALL, gpu) for gpu in predict.GPUS]
    return predictor, rows, said


def test_a_prediction_is_made_once(predicted):
    predictor, rows, said = predicted
    assert len(said) == len(rows) == 2 and all("predicted" in line for line in said)
    again = Predictor(Table(predictor.table.path), said.append)
    assert [again.ours(SMALL, gpu).microseconds for gpu in predict.GPUS] == pytest.approx(
        [row.microseconds for row in rows], rel=1e-4
    )
    assert len(said) == 2
    assert 1 < rows[0].microseconds < 20 and "sm90_fp8_gemm_nt" in rows[0].kernels


def test_after_the_deadline_only_the_table_answers(predicted):
    predictor, rows, _ = predicted
    late = Predictor(predictor.table, deadline=0)
    assert late.ours(SMALL, "h100") == rows[0]
    with pytest.raises(OutOfTimeError):
        late.ours(Case("gemm", cases.FPROP, "small", "", (64, 256, 640)), "h100")


def test_other_machine_code_makes_a_row_stale(predicted, monkeypatch):
    predictor, _, said = predicted
    monkeypatch.setattr(predictions, "code_of", lambda contender, kernels: "other")
    before = len(said)
    assert Predictor(predictor.table, said.append).ours(SMALL, "h100").code == "other"
    assert len(said) == before + 1


def test_another_clock_is_noticed(predicted):
    predictor, _, _ = predicted
    assert Predictor(Table(predictor.table.path)).drifted() == []
    table = Table(predictor.table.path)
    for row in list(table.rows.values()):
        table.rows[row.key] = Prediction(**{**vars(row), "microseconds": row.microseconds * 1.01})
    changed = Predictor(table).drifted()
    assert len(changed) == 1 and changed[0].startswith("64x256x512 on h")


def test_goals_that_are_missed_are_said():
    def pair(m: int, ratio: float) -> predict.Pair:
        case = Case("gemm", cases.FPROP, "deepseek-v3", "down_proj", (m, 7168, 2048))
        ours, other = prediction(10, key(TORCHEXT)), prediction(10 * ratio, key(DEEP_GEMM))
        return predict.Pair(case, ours, other)

    rows = predict.verdicts({predict.DENSE: [pair(64, 1.2), pair(4096, 0.9)]})
    found = {row[0]: row[2:] for row in rows[1:]}
    dense = found["dense against DeepGEMM, geometric mean"]
    assert dense[:3] == ["1.04", "**missed**", "2 of 112"]
    assert "0.90 at fprop 4096x7168x2048" in dense[3]
    assert found["every shape against DeepGEMM, the worst"][0] == "0.90"
    assert found["dense, M <= 64, geometric mean"][:3] == ["1.20", "**missed**", "1 of 42"]
    assert found["wgrad against DeepGEMM, geometric mean"][1] == "not predicted"
    assert "predicted" in rows[0][0]


def test_every_class_has_cases_that_both_sides_can_run():
    for kind, of in predict.CLASSES.items():
        wanted = of()
        assert wanted and len(wanted) == len(set(wanted))
        for case in wanted:
            if kind != predict.FUSED:
                assert predictions.deep_kernel(case)
                assert predictions.chosen(case, "h100")


def test_lengths_of_groups_average_to_what_is_expected():
    for groups, expected, step in ((8, 4096, 128), (32, 16, 1), (2, 512, 1), (1, 1024, 1)):
        sizes = predictions.lengths(groups, expected, step)
        assert all(0.65 * expected <= size <= 1.35 * expected for size in sizes)
        assert not any(size % step for size in sizes)
        assert sum(sizes) / groups == pytest.approx(expected, rel=0.05)


def test_the_document_has_a_row_for_each_goal():
    text = predict.DOCUMENT.read_text()
    assert predict.BEGIN in text and predict.END in text
    for goal in predict.GOALS:
        assert f"| {goal.text} |" in text
