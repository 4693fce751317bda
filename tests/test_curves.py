"""curves.png: the right panels with the right lines, and a picture that decodes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from searchr1_fast.curves import draw_curves, eval_kinds, eval_sets, save_curves, smoothed


def make_rows(num_steps: int = 12, sets: tuple[str, ...] = ("world",)) -> list[dict]:
    rows: list[dict] = [{"step": 0}]
    for step in range(1, num_steps + 1):
        rows.append({"step": step, "reward_mean": step / 20, "searches_mean": 1.5, "response_tokens_mean": 80.0 + step})
    for row in rows[::4]:
        for name in sets:
            row |= {f"eval/{name}/em": 0.5, f"eval/{name}/1-hop/em": 0.75, f"eval/{name}/2-hop/em": 0.25}
            row |= {f"eval/{name}/searches_mean": 1.25, f"eval/{name}/f1": 0.6}
    return rows


def write_run(folder, rows) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(axes) -> dict[str, tuple[list, list]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_four_labelled_panels_with_their_data():
    figure = draw_curves({"demo": make_rows()})
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "Reward", "Evaluation EM", "Searches", "Response length",
    ]  # fmt: skip
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)
    reward, em, searches, length = map(lines, figure.axes)
    raw, smooth = reward.values()
    assert raw == (list(range(1, 13)), [step / 20 for step in range(1, 13)])
    assert smooth[0] == raw[0]
    assert {label: values for label, (_, values) in em.items()} == {
        "overall": [0.5] * 4, "1-hop": [0.75] * 4, "2-hop": [0.25] * 4,
    }  # fmt: skip
    assert em["overall"][0] == [0, 4, 8, 12]
    assert searches["training"][1] == [1.5] * 12
    assert searches["evaluation"][1] == [1.25] * 4
    assert length["training"][1][-1] == 92.0


def test_several_sets_and_several_runs_keep_apart():
    two_sets = lines(draw_curves({"demo": make_rows(sets=("easy", "hard"))}).axes[1])
    assert {"easy", "hard", "easy 1-hop", "hard 2-hop"} <= set(two_sets)
    runs = draw_curves({"grpo": make_rows(), "ppo": make_rows()})
    assert list(lines(runs.axes[1])) == ["grpo", "ppo"]  # no hops: too many lines to compare
    colours = [line.get_color() for line in runs.axes[1].lines]
    assert colours[0] != colours[1]


def test_png_decodes_with_ink_in_every_panel(tmp_path):
    write_run(tmp_path / "demo", make_rows())
    path = save_curves(tmp_path / "demo")
    assert path == tmp_path / "demo" / "curves.png"
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
        pixels = np.asarray(image.convert("RGB")).astype(int)
    height, width, _ = pixels.shape
    assert width >= 1200
    assert height >= 900
    coloured = np.ptp(pixels, axis=2) > 60
    quarters = [coloured[rows, columns].sum() for rows in (slice(0, height // 2), slice(height // 2, None))
                for columns in (slice(0, width // 2), slice(width // 2, None))]  # fmt: skip
    assert min(quarters) > 200, quarters
    assert sorted(p.name for p in (tmp_path / "demo").iterdir()) == ["curves.png", "metrics.jsonl"]


def test_comparison_goes_where_it_is_told(tmp_path):
    write_run(tmp_path / "a", make_rows())
    write_run(tmp_path / "b", make_rows(4))
    assert save_curves([tmp_path / "a", tmp_path / "b"], tmp_path / "out" / "both.png").is_file()
    assert not (tmp_path / "a" / "curves.png").exists()


def test_a_run_without_rows_draws_nothing(tmp_path):
    write_run(tmp_path / "empty", [])
    assert save_curves(tmp_path / "empty") is None
    assert not (tmp_path / "empty" / "curves.png").exists()


def test_one_step_and_missing_numbers_still_draw(tmp_path):
    write_run(tmp_path / "short", [{"step": 1, "reward_mean": 0.5, "searches_mean": None}])
    assert save_curves(tmp_path / "short").is_file()


def test_smoothing_has_no_bias_and_follows():
    assert smoothed([0.7] * 5) == pytest.approx([0.7] * 5)
    means = smoothed([0.0] * 5 + [1.0] * 40)
    assert means[:5] == [0.0] * 5
    assert means == sorted(means)
    assert means[-1] > 0.99
    assert smoothed([0.0, 1.0], weight=0.5) == pytest.approx([0.0, 2 / 3])
    assert smoothed([]) == []


def test_sets_and_kinds_are_read_from_the_keys():
    rows = [{"step": 1, "eval/a.b/em": 1, "eval/a.b/3-hop/em": 1, "eval/a.b/f1": 1, "eval/axb/2-hop/em": 0}]
    assert eval_sets(rows) == ["a.b"]
    assert eval_kinds(rows, "a.b") == ["3-hop"]
