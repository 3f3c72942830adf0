"""`make gpu` tested on a CPU: its verdicts, its tables, its budget, and that it finds a wrong number."""

import json
import os
import time
from functools import partial

import pytest
import torch

from tests.gpu.check import cli, grouped, machine, parity, project
from tests.gpu.check.parts import PARTS
from tests.gpu.check.report import (
    FAILED,
    OK,
    SKIPPED,
    Record,
    Report,
    at_least,
    at_most,
    exactly,
    exit_code,
    judge,
    markdown,
    part_verdict,
    plain_table,
    read_records,
)
from tests.gpu.check.runner import Check, Options, Part, run_parts


@pytest.fixture
def options(tmp_path) -> Options:
    return Options(tmp_path, "cpu", time.time(), budget=600)


def check_of(options: Options, part: str) -> Check:
    return Check(options, Report(options.results, part, options.start), options.ends)


def verdicts(options: Options) -> dict[str, str]:
    return {record.case: record.verdict for record in read_records(options.results)}


@pytest.mark.parametrize(
    "value, limit, why",
    [
        (0.5, at_most(1), ""),
        (1.5, at_most(1), "error 1.5 is above 1"),
        (0.5, at_least(1), "error 0.5 is below 1"),
        (0, exactly(0), ""),
        (1e-9, exactly(0), "error 1.00e-09 is above 0"),
        (float("nan"), at_most(1), "error is nan"),
        (float("inf"), at_least(0), "error is inf"),
        (None, at_most(1), "error is None"),
    ],
)
def test_a_figure_outside_its_limit_fails(value, limit, why):
    assert judge({"error": value, "speed": float("nan")}, {"error": limit}) == why


def test_a_limit_without_a_figure_fails():
    assert judge({}, {"error": at_most(1)}) == "error is None"


def records_of(part: str, *verdicts: str) -> list[Record]:
    return [Record(part, f"case {i}", verdict, 0.0, why="because") for i, verdict in enumerate(verdicts)]


def test_the_verdict_of_a_part_follows_from_its_cases():
    assert part_verdict(records_of("a", OK, FAILED, SKIPPED)) == (FAILED, "1 of 3 cases: case 1: because")
    assert part_verdict(records_of("a", SKIPPED, SKIPPED)) == (SKIPPED, "because")
    assert part_verdict(records_of("a", OK, SKIPPED))[0] == OK
    assert part_verdict([]) == (FAILED, "recorded nothing")


def test_exit_code_is_1_if_a_part_failed_or_recorded_nothing():
    records = [*records_of("a", OK), *records_of("b", SKIPPED), *records_of("c", FAILED)]
    assert exit_code(records, ["a", "b"]) == 0
    assert exit_code(records, ["a", "b", "c"]) == 1
    assert exit_code(records, ["a", "d"]) == 1


def test_tables_show_verdicts_and_figures():
    records = [
        Record("speed", "base", OK, 1.0, {"tokens_per_second": 123456.0, "mfu": 0.2513}),
        Record("speed", "liger", FAILED, 2.0, {"tokens_per_second": 1.5, "kernels": 1200}, why="loss is nan"),
    ]
    assert plain_table(records, ["speed"]).splitlines()[1] == "speed  FAILED   1 of 2 cases: liger: loss is nan"
    table = markdown(records, "### A GPU").splitlines()
    assert table[0] == "### A GPU"
    assert table[2] == "| speed | tokens per second | mfu | kernels | verdict |"
    assert table[4:] == ["| base | 123,456 | 0.2513 |  | ok |", "| liger | 1.5 |  | 1,200 | FAILED |"]


def test_results_are_strict_json(options):
    Report(options.results, "a", 0.0).check("one", {"x": at_most(1)}, x=float("nan"))
    assert json.loads(options.results.read_text(), parse_constant=pytest.fail)["figures"] == {"x": "nan"}
    assert verdicts(options) == {"one": FAILED}


def test_an_unfinished_last_line_is_dropped(options):
    Report(options.results, "a", 0.0).check("one", {"x": exactly(1)}, x=1)
    with options.results.open("a") as file:
        file.write('{"part": "a", "ca')
    assert [record.case for record in read_records(options.results)] == ["one"]


def _fine(check: Check) -> None:
    check.report.check("fine", {"x": exactly(1)}, x=1)


def _raises(check: Check) -> None:
    check.case("inside", partial(int, "no number"))
    raise ValueError("outside")


def _crashes(check: Check) -> None:
    os.abort()


def test_the_next_part_runs_after_one_that_fails_or_crashes(options):
    parts = [Part("raises", _raises, "", 60), Part("crashes", _crashes, "", 60), Part("fine", _fine, "", 60)]
    run_parts([*parts, Part("gpu only", _fine, "", 1, on_cpu=False)], options)
    records = read_records(options.results)
    found = {r.part: part_verdict(q for q in records if q.part == r.part) for r in records}
    assert found["raises"][0] == FAILED
    assert found["raises"][1].startswith("2 of 2 cases: inside: ValueError: invalid literal for int()")
    assert "ValueError: outside" in records[1].why and "Traceback" in records[1].why
    assert found["crashes"] == (FAILED, "the process was ended by SIGABRT")
    assert found["fine"] == (OK, "1 case")
    assert found["gpu only"] == (SKIPPED, "needs a CUDA device")


def test_a_part_that_does_not_fit_the_budget_is_skipped(tmp_path):
    options = Options(tmp_path, "cpu", time.time(), budget=30)
    run_parts([Part("long", _fine, "", 100)], options)
    (record,) = read_records(options.results)
    assert record.verdict == SKIPPED and record.why.startswith("no time left: it needs about 100 s, and 2")


def test_a_case_that_does_not_fit_the_budget_is_skipped(options):
    check = check_of(options, "a")
    check.case("long", partial(_fine, check), seconds=1000)
    assert verdicts(options) == {"long": SKIPPED}


def test_parity_passes_on_the_cpu(options):
    parity.check_case(check_of(options, "parity"), "dropout, top-2", [torch.float32])
    assert verdicts(options) == {"dropout, top-2, float32": OK}


def test_parity_finds_a_gradient_that_is_a_tenth_too_large(options, monkeypatch):
    exact = project.gradients

    def wrong(model):
        found = exact(model)
        found["blocks.1.attention.wo"] *= 1.1 if next(calls) else 1.0
        return found

    calls = iter([0, 1])  # 0 for the reference, which is computed first, 1 for the device
    monkeypatch.setattr(project, "gradients", wrong)
    parity.check_case(check_of(options, "parity"), "chunks", [torch.float32])
    (record,) = read_records(options.results)
    assert record.verdict == FAILED and record.figures["tensor"] == "blocks.1.attention.wo"


def test_grouped_finds_a_gradient_of_an_expert_without_rows(options, monkeypatch):
    exact = grouped._product

    def wrong(*args):
        out, to_rows, to_weight = exact(*args)
        to_weight[1] += 1e-6  # the group without rows
        return out, to_rows, to_weight

    case = grouped.cases(False)["an empty group, a group of one row"][:2] + ([5, 0, 100, 1], 7)
    grouped._check(check_of(options, "grouped"), "right", case)
    monkeypatch.setattr(grouped, "_product", wrong)
    grouped._check(check_of(options, "grouped"), "wrong", case)
    assert verdicts(options) == {"right": OK, "wrong": FAILED}
    assert "idle_gradient" in read_records(options.results)[1].why


def test_the_command_runs_parts_and_writes_both_files(tmp_path, capsys):
    assert cli.main(["--device", "cpu", "--part", "random", "machine", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "\nmachine  ok" in output and "\nrandom   ok" in output
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {line["part"] for line in lines} == {"machine", "random"}
    assert (tmp_path / "gpu.md").read_text().startswith("### CPU, torch ")


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="there is a GPU")
def test_without_a_gpu_it_prints_one_line_with_the_reason(tmp_path, capsys):
    assert cli.main(["--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gpu: torch ")
    assert not (tmp_path / "out").exists()


def test_on_several_gpus_only_their_own_part_runs():
    assert [part.name for part in cli.chosen_parts(None, 8)] == ["machine", "ranks"]
    assert {part.name for part in cli.chosen_parts(None, 1)} == set(PARTS) - {"ranks"}
    assert [part.name for part in cli.chosen_parts(["speed", "parity"], 8)] == ["parity", "speed"]


def test_all_parts_together_need_at_most_nine_minutes():
    assert sum(part.seconds for part in cli.chosen_parts(None, 1)) <= 540


def test_the_reason_names_the_driver_if_there_is_no_device(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "driver_version", lambda: "535.1")

    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old\nmore")

    monkeypatch.setattr(torch.cuda, "init", too_old)
    why = machine.why_no_cuda()
    assert why is not None and "\n" not in why
    assert "the driver is 535.1: The NVIDIA driver on your system is too old" in why
