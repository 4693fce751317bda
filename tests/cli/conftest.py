"""Fixtures for the tests of the commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from searchr1_fast import cli


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
    """-> a Hugging Face folder with a tiny random model over bytes."""
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
