"""The command line: help, mistakes in one sentence with exit code 2, each command from its arguments to its output."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import searchr1_fast
from searchr1_fast import cli
from searchr1_fast.cli import COMMANDS, model_directory, run_config_path

ROOT = Path(searchr1_fast.__file__).parent.parent
OURS = ["train", "eval", "ask", "data", "index", "serve", "report"]


@pytest.fixture
def run(capsys):
    """Arguments → (exit code, stdout, stderr), in this process; argparse's SystemExit is an exit code too."""

    def run(*argv: object) -> tuple[int, str, str]:
        try:
            code = cli.main([str(argument) for argument in argv])
        except SystemExit as exit:
            code = exit.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("SEARCHR1_DEBUG", "RANK", "WORLD_SIZE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Hugging Face folder with a tiny random model over bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    from searchr1_fast.models import Decoder, DecoderConfig, TextTokenizer, save_model

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(len(alphabet), 16, 32, 1, 2, 1))
    folder = tmp_path_factory.mktemp("model")
    save_model(decoder, folder)
    TextTokenizer(backend).save(folder)
    return folder


CORPUS = [
    {"id": "1", "contents": '"Ann"\nAnn was born in Arden [bold].'},
    {"id": "2", "contents": '"Arden"\nArden was founded by Bela.'},
]
QUESTIONS = [
    {"id": "a", "question": "Where was Ann born?", "golden_answers": ["Arden"], "type": "1-hop"},
    {"id": "b", "question": "Who founded Ann's place of birth?", "golden_answers": ["Bela"], "type": "2-hop"},
]
SMALL = ("rollout.max_turn_tokens=8", "rollout.max_searches=1", "rollout.max_sequence_tokens=400", "run.device=cpu")


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def one_sentence(error: str) -> str:
    """The single line on stderr, without its prefix."""
    assert error.count("\n") == 1, error
    assert error.startswith("searchr1: error: "), error
    return error.removeprefix("searchr1: error: ").rstrip("\n")


# ------------------------------------------------------------------------------------------------ the command itself


def test_help_lists_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.summary)}$", out, re.MULTILINE)


def test_without_a_command_help_is_shown_and_it_is_an_error(run):
    code, out, _ = run()
    assert code == 2
    assert out.startswith("usage: searchr1 COMMAND")


def test_version(run):
    assert run("--version") == (0, f"searchr1_fast {searchr1_fast.__version__}\n", "")


@pytest.mark.parametrize(
    ("typed", "nearest"), [("trian", "train"), ("evaluate", "eval"), ("pretrain", "pretrain-base")]
)
def test_unknown_command_names_the_nearest(run, typed, nearest):
    code, out, error = run(typed, "--help")
    assert (code, out) == (2, "")
    assert one_sentence(error) == f"unknown command `{typed}`: did you mean `searchr1 {nearest}`?"


def test_unknown_command_far_from_all_lists_them(run):
    assert "there are train, eval, ask" in one_sentence(run("zzzzzz")[2])


@pytest.mark.parametrize("name", OURS)
def test_help_of_each_command_has_an_example(run, name):
    code, out, _ = run(name, "--help")
    assert code == 0
    assert out.startswith(f"usage: searchr1 {name}")
    assert f"\nexample:\n  searchr1 {name} " in out


@pytest.mark.parametrize("name", OURS)
def test_help_does_not_wait_for_torch(name):
    """`import torch` takes seconds; somebody who asks for help should not wait for it."""
    program = (
        "import sys; from searchr1_fast.cli import main\n"
        f"try: main(['{name}', '--help'])\n"
        "except SystemExit as exit: assert not exit.code\n"
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"usage: searchr1 {name}" in done.stdout


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}


@pytest.mark.parametrize("module", ["searchr1_fast", "searchr1_fast.cli"])
def test_as_a_program(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "report", "no/such/run"], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert one_sentence(done.stderr) == "no/such/run is not a run folder: it has no metrics.jsonl"


def test_each_command_is_a_module_too():
    done = subprocess.run(
        [sys.executable, "-m", "searchr1_fast.report", "gone"], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "gone is not a run folder" in one_sentence(done.stderr)


def test_a_reader_that_leaves_early_is_no_error():
    program = f"{sys.executable} -m searchr1_fast --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", program], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# ------------------------------------------------------------------------------------------------ configuration errors


@pytest.mark.parametrize("command", ["train", "eval"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml"], "no configuration file missing.yaml"),
        (["ok.yaml", "train.num_step=3"], "unknown key `train.num_step`: did you mean `num_steps`?"),
        (["ok.yaml", "rollout.temperature=-1"], "`rollout.temperature`: Input should be greater than 0"),
        (["ok.yaml", "nonsense"], "override 'nonsense' is not of the form section.key=value"),
        (["broken.yaml"], "broken.yaml is not valid YAML"),
    ],
)
def test_bad_configuration_is_one_sentence(run, tmp_path, command, arguments, message):
    (tmp_path / "ok.yaml").write_text("train: {num_steps: 1}\n")
    (tmp_path / "broken.yaml").write_text("train: [\n")
    code, out, error = run(command, *arguments)
    assert (code, out) == (2, "")
    assert message in one_sentence(error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.yaml", "ok.yaml"]  # nothing half-written


@pytest.mark.parametrize("arguments", [[], ["c.yaml", "--resum"], ["c.yaml", "--no-such"]])
def test_argparse_errors_are_exit_code_2(run, arguments):
    code, out, error = run("train", *arguments)
    assert (code, out) == (2, "")
    assert error.startswith("usage: searchr1 train")


# ------------------------------------------------------------------------------------------------ report


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
    assert table["reward, first 10 → last 10 steps"] == "0.275 → 0.775"
    assert table["training time"] == "1 min 0 s"
    assert table["time in"] == "rollout 50%, search 0%, update 40%, other 10%"
    assert (tmp_path / "runs/demo/curves.png").read_bytes().startswith(b"\x89PNG")


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


# ------------------------------------------------------------------------------------------------ models and runs


def test_model_directory_finds_the_weights_of_a_run(tmp_path):
    run_folder = tmp_path / "runs" / "demo"
    weights = run_folder / "checkpoints" / "step_000010" / "hf"
    weights.mkdir(parents=True)
    (run_folder / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        model_directory(run_folder)
    (run_folder / "checkpoints" / "latest").symlink_to("step_000010", target_is_directory=True)
    (run_folder / "config.yaml").write_text("")
    assert model_directory(run_folder).resolve() == weights
    assert model_directory(weights.parent) == weights
    assert model_directory(weights) == weights
    assert model_directory("builtin:base") == "builtin:base"
    assert run_config_path(model_directory(run_folder)) == run_folder / "config.yaml"
    assert run_config_path("builtin:base") is None
    assert run_config_path(tmp_path) is None


# ------------------------------------------------------------------------------------------------ eval


def write_eval_config(folder: Path) -> Path:
    write_jsonl(folder / "corpus.jsonl", CORPUS)
    write_jsonl(folder / "questions.jsonl", QUESTIONS)
    path = folder / "run.yaml"
    path.write_text("eval: {sets: {tiny: {questions: questions.jsonl, corpus: corpus.jsonl}}}\n")
    return path


def test_eval_prints_a_table_and_writes_every_answer(run, tmp_path, model):
    config = write_eval_config(tmp_path)
    code, out, error = run("eval", config, "--model", model, *SMALL, "--output", "out/answers.jsonl")
    assert code == 0, error
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if len(line.split()) > 5}
    assert rows["all"][:2] == ["2", "0.000"]
    assert rows["1-hop"][0] == "1"
    assert rows["2-hop"][0] == "1"
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [(a["set"], a["id"], a["em"], a["kind"]) for a in answers] == [
        ("tiny", "a", 0.0, "1-hop"), ("tiny", "b", 0.0, "2-hop"),
    ]  # fmt: skip
    assert answers[0]["segments"][0][0] == "prompt"
    assert "Where was Ann born?" in answers[0]["segments"][0][1]


def test_eval_of_several_sets_ends_with_a_table_of_all(run, tmp_path, model):
    config = write_eval_config(tmp_path)
    more = "eval.sets.again={questions: questions.jsonl, corpus: corpus.jsonl, limit: 1}"
    code, out, error = run("eval", config, "--model", model, *SMALL, more)
    assert code == 0, error
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if len(line.split()) > 4}
    assert (rows["tiny"][:2], rows["again"][:2]) == (["2", "0.000"], ["1", "0.000"])
    assert rows["mean"][:4] == ["of", "the", "sets", "0.000"]
    assert "mean of the sets" not in run("eval", config, "--model", model, *SMALL)[1]


def test_eval_is_greedy_and_repeats(run, tmp_path, model):
    config = write_eval_config(tmp_path)
    for name in ("one.jsonl", "two.jsonl"):
        assert run("eval", config, "--model", model, *SMALL, "--output", name)[0] == 0
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()
    assert run("eval", config, "--model", model, *SMALL, "--temperature", "1.5", "--output", "hot.jsonl")[0] == 0
    assert (tmp_path / "hot.jsonl").read_text() != (tmp_path / "one.jsonl").read_text()


def test_eval_of_questions_without_a_corpus_searches_the_training_corpus(run, tmp_path, model):
    config = write_eval_config(tmp_path)
    config.write_text(
        "data: {questions: questions.jsonl, corpus: corpus.jsonl}\neval: {sets: {tiny: {questions: questions.jsonl}}}\n"
    )
    code, _, error = run("eval", config, "--model", model, *SMALL)
    assert code == 0, error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval.sets={}"], "has no eval.sets"),
        (["--sets", "tony"], "--sets tony: the configuration's eval.sets are tiny"),
        (["--temperature", "-1"], "--temperature -1.0: give 0 (greedy) or more"),
        (["--model", "no/such/model"], "no/such/model"),
        (["eval.sets.tiny.questions=gone.jsonl"], "gone.jsonl"),
        (["eval.sets.tiny.corpus=gone.jsonl"], "gone.jsonl"),
        (["eval.sets.tiny.questions=bad.jsonl"], "bad.jsonl, line 2"),
        (["eval.sets.tiny.corpus=empty.jsonl"], "empty.jsonl"),
    ],
)
def test_eval_mistakes(run, tmp_path, model, arguments, message):
    config = write_eval_config(tmp_path)
    (tmp_path / "bad.jsonl").write_text(json.dumps(QUESTIONS[0]) + "\n{oops\n")
    (tmp_path / "empty.jsonl").write_text("")
    code, _, error = run("eval", config, "--model", model, *SMALL, *arguments, "--output", "answers.jsonl")
    assert code == 2
    assert message in one_sentence(error)
    assert not (tmp_path / "answers.jsonl").exists()


# ------------------------------------------------------------------------------------------------ ask


def small_settings() -> list[str]:
    return [word for setting in SMALL for word in ("--set", setting)]


def test_ask_shows_the_transcript_and_ends_with_the_answer(run, tmp_path, model):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", CORPUS)
    code, out, error = run("ask", "--model", model, "--corpus", corpus, *small_settings(), "Who is [red]Ann[/red]?")
    assert code == 0, error
    assert "Who is [red]Ann[/red]?" in out
    assert "searches: 0" in out
    assert out.splitlines()[-1] == "no answer"  # of a random model
    assert "right" not in out
    assert "wrong" not in out


def test_ask_the_world_knows_its_answers(run, model):
    code, out, error = run("ask", "--model", model, "--world", "--number", "3", *small_settings())
    assert code == 0, error
    assert "wrong  expected: " in out
    code, _, error = run("ask", "--model", model, "--world", "--number", "1000000", *small_settings())
    assert code == 2
    assert "--number 1000000: this world has questions 0 to" in one_sentence(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "gone.jsonl", "Who?"], "gone.jsonl"),
        (["--corpus", "gone.jsonl"], "there is no question"),
        (["--corpus", "corpus.jsonl", " "], "the question is empty"),
        (["--corpus", "corpus.jsonl", "Who?", "--set", "rollout.max_searchs=1"], "did you mean `max_searches`"),
        (["--corpus", "corpus.jsonl", "Who?", "--model", "nowhere"], "nowhere"),
    ],
)
def test_ask_mistakes(run, tmp_path, model, arguments, message):
    write_jsonl(tmp_path / "corpus.jsonl", CORPUS)
    code, _, error = run("ask", "--model", model, *arguments)
    assert code == 2
    assert message in one_sentence(error)


def test_ask_needs_something_to_search(run):
    code, _, error = run("ask", "Who?")
    assert code == 2
    assert "one of the arguments --corpus --url --world is required" in error


# ------------------------------------------------------------------------------------------------ serve


@pytest.fixture
def serve_once(run, monkeypatch):
    """Arguments of `searchr1 serve` → (exit code, stdout, stderr, the reply to one request)."""
    pytest.importorskip("uvicorn", reason="the server needs the extra `serve`")
    from searchr1_fast.retrieval import RetrievalServer

    def run_once(*arguments, headers=None):
        replies = []
        serve_forever = RetrievalServer.serve_forever

        def ask_once(server):
            body = json.dumps({"queries": ["who founded Arden"], "topk": 1, "return_scores": True}).encode()
            try:
                with urllib.request.urlopen(urllib.request.Request(server.url, body, headers or {})) as response:
                    replies.append(json.load(response))
            except urllib.error.HTTPError as error:
                replies.append(error.code)
            server.shutdown()

        def serve(server):
            server._socket.listen()  # so that the client's connection waits rather than fails
            client = threading.Thread(target=ask_once, args=(server,))
            client.start()
            serve_forever(server)
            client.join()

        monkeypatch.setattr(RetrievalServer, "serve_forever", serve)
        result = run("serve", *arguments, "--port", "0")
        monkeypatch.setattr(RetrievalServer, "serve_forever", serve_forever)
        return (*result, replies[0])

    return run_once


def test_serve_answers_the_protocol(serve_once, tmp_path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", CORPUS)
    code, out, error, reply = serve_once("--corpus", corpus)
    assert code == 0, error
    assert re.search(r"serving POST http://127\.0\.0\.1:\d+/retrieve", out)
    assert "whoever reaches" not in out
    assert reply["result"][0][0]["document"] == CORPUS[1]


def test_serve_an_index(run, serve_once, tmp_path):
    pytest.importorskip("searchr1_fast._C", reason="the batcher is not compiled")
    corpus = write_jsonl(tmp_path / "corpus.jsonl", CORPUS)
    assert run("index", "build", "--corpus", corpus, "--output", "made.index")[0] == 0
    code, _, error, reply = serve_once("--index", "made.index")
    assert code == 0, error
    assert reply["result"][0][0]["document"] == CORPUS[1]


def test_serve_wants_the_token_of_its_environment(serve_once, tmp_path, monkeypatch):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", CORPUS)
    monkeypatch.setenv("SEARCHR1_TOKEN", "s3cret")
    assert serve_once("--corpus", corpus)[3] == 401
    assert "result" in serve_once("--corpus", corpus, headers={"Authorization": "Bearer s3cret"})[3]
    monkeypatch.delenv("SEARCHR1_TOKEN")
    assert "whoever reaches 0.0.0.0 may search" in serve_once("--corpus", corpus, "--host", "0.0.0.0")[1]


def test_serve_says_what_to_install(run, tmp_path, monkeypatch):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", CORPUS)
    monkeypatch.delitem(sys.modules, "searchr1_fast.retrieval.server_http", raising=False)
    import searchr1_fast.retrieval

    monkeypatch.delattr(searchr1_fast.retrieval, "server_http", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, error = run("serve", "--corpus", corpus, "--port", "0")
    assert code == 2
    assert "needs uvicorn, which is not installed: pip install 'searchr1_fast[serve]'" in one_sentence(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "gone.jsonl", "--port", "0"], "gone.jsonl"),
        (["--corpus", "c.jsonl", "--port", "70000"], "--port 70000: a port is a number from 0 to 65535"),
        (["--corpus", "c.jsonl", "--port", "0", "retrieval.bm25_k=2"], "did you mean `bm25_k1`"),
        (["--index", "gone.index", "--port", "0"], "there is no index gone.index"),
    ],
)
def test_serve_mistakes(run, arguments, message):
    code, _, error = run("serve", *arguments)
    assert code == 2
    assert message in one_sentence(error)


def test_serve_says_that_a_port_is_taken(run, tmp_path):
    from searchr1_fast.retrieval import RetrievalServer

    corpus = write_jsonl(tmp_path / "corpus.jsonl", CORPUS)
    pytest.importorskip("uvicorn", reason="the server needs the extra `serve`")
    with RetrievalServer(None, port=0) as server:
        server._socket.listen()
        port = server.address[1]
        code, _, error = run("serve", "--corpus", corpus, "--port", port)
    assert code == 2
    assert f"port {port}" in one_sentence(error)
