"""The benchmark of linear heads compares one loss with itself, and its record makes the table."""

import json
import sys

import torch

import loss_linear
import result_tables


def test_small_sizes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["loss_linear.py", "--small", "--out", str(tmp_path)])
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(loss_linear, "_CALLS", 1)
    assert loss_linear.main() == 0
    rows = json.loads((tmp_path / "loss_linear.json").read_text())["rows"]
    assert len(rows) == 3 * len(loss_linear.sizes(small=True))
    for row in rows:
        assert row["status"] == "ok" or row["implementation"] == loss_linear.LIGER
        if row["implementation"] == loss_linear.WHOLE:
            assert row["difference"] < 1e-5
    assert loss_linear.THIS in capsys.readouterr().out
    page = result_tables.markdown(json.loads((tmp_path / "loss_linear.json").read_text()))
    assert "| 64 | 512 | 16 | 3 | float32 | fused_linear_classroom_loss |" in page


def test_a_failure_is_a_row(monkeypatch):
    def broken(_):
        raise RuntimeError("broken")

    monkeypatch.setitem(loss_linear.IMPLEMENTATIONS, loss_linear.THIS, broken)
    first, *_ = loss_linear.rows(loss_linear.Size(4, 8, 2, 1))
    assert first["status"] == "failed: RuntimeError('broken')"


def test_on_a_gpu_the_sizes_of_a_vocabulary_are_measured(monkeypatch):
    monkeypatch.setattr(loss_linear, "GPU", True)
    found = loss_linear.sizes(small=False)
    for size in ((8192, 32_768, 2048), (4096, 128_256, 4096)):
        for n_mentors in (1, 3):
            assert (*size, n_mentors) in found


def test_memory_is_that_of_the_call():
    peak = loss_linear._host_peak(lambda: torch.ones(2**24, dtype=torch.uint8).max())
    if peak is not None:  # Linux
        assert 0.95 * 2**24 <= peak < 1.5 * 2**24
