"""`searchr1 report`."""

from __future__ import annotations

import re

from commands import write_jsonl


def metrics_rows(em: float) -> list[dict]:
    rows: list[dict] = [{"step": 0, "eval/world/em": 0.1, "eval/world/2-hop/em": 0.0, "eval/world/searches_mean": 1.0}]
    for step in range(1, 21):
        rows.append(
            {"step": step, "reward_mean": step / 20, "searches_mean": 2.0, "response_tokens_mean": 100.0,
             "time_step": 3.0, "time_rollout": 1.5, "time_update": 1.2, "tokens_per_second": 1000.0}
        )  # fmt: skip
    rows[-1] |= {"eval/world/em": em, "eval/world/2-hop/em": em / 2, "eval/world/searches_mean": 2.0}
    return rows


def test_report_summarises_and_draws(run, tmp_path):
    write_jsonl(tmp_path / "runs" / "demo" / "metrics.jsonl", metrics_rows(0.9))
    code, out, _ = run("report", "runs/demo")
    assert code == 0
    lines = {line.strip() for line in out.splitlines()}
    table = {match[1]: match[2] for line in lines if (match := re.fullmatch(r"(.+?)  +(.+)", line))}
    assert table["steps"] == "20"
    assert table["eval world EM"] == "0.100 → 0.900"
    assert table["eval world 2-hop EM"] == "0.000 → 0.450"
    assert table["eval world best EM"] == "0.900 at step 20"
    assert table["reward, start → end"] == "0.275 → 0.775"
    assert table["training time"] == "1 min 0 s"
    assert table["time in"] == "rollout 50%, search 0%, update 40%, other 10%"
    assert (tmp_path / "runs/demo/curves.png").read_bytes().startswith(b"\x89PNG")


def test_of_few_steps_none_is_both_start_and_end(run, tmp_path):
    write_jsonl(tmp_path / "short" / "metrics.jsonl", metrics_rows(0.9)[:6])
    _, out, _ = run("report", "short")
    assert re.search(r"reward, start → end +0\.075 → 0\.225", out)  # steps 1 and 2, steps 4 and 5


def test_report_compares_runs_side_by_side(run, tmp_path):
    write_jsonl(tmp_path / "a" / "metrics.jsonl", metrics_rows(0.9))
    write_jsonl(tmp_path / "b" / "metrics.jsonl", metrics_rows(0.7))
    code, out, _ = run("report", "a", "b", "--output", "both.png")
    assert code == 0
    line = next(line for line in out.splitlines() if "eval world EM" in line)
    assert line.split()[3:] == ["0.100", "→", "0.900", "0.100", "→", "0.700"]
    assert all((tmp_path / path).is_file() for path in ("a/curves.png", "b/curves.png", "both.png"))


def test_report_of_a_run_that_has_only_begun(run, tmp_path):
    write_jsonl(tmp_path / "[new]" / "metrics.jsonl", [])
    code, out, _ = run("report", "[new]")
    assert code == 0
    assert "[new]: no rows yet, no curves" in out
