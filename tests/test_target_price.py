"""`python -m mutune.train` prices a run on named hardware and finds the micro-batch that fits, and writes nothing."""

import json
from pathlib import Path

import pytest

from mutune.scaling.hardware import ACCELERATORS

PRICED = ["dry_run=true", "hardware=h100-sxm", "gpus=8"]


@pytest.fixture(scope="module")
def btlm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return transfer(tmp_path_factory.mktemp("btlm"), "target.loop.dtype=bfloat16")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A target that trains in no time."""
    stages = [
        "{context_length: 64, batch_sequences: 6, num_steps: 90}",
        "{context_length: 128, batch_sequences: 2, num_steps: 30}",
    ]
    out = tmp_path_factory.mktemp("small")
    return transfer(out, "target=small", "target.model.depth=32", f"target.stages=[{','.join(stages)}]")


def transfer(out: Path, *words: str) -> str:
    from mutune.transfer import main

    assert main(["study=published", f"out={out}", *words]) == 0
    (path,) = out.glob("transfer/*/transfer.yaml")
    return f"transfer={path}"


def said(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    from mutune.train import main

    capsys.readouterr()
    assert main(words) == code
    printed = capsys.readouterr()
    return printed.err if code else printed.out


def test_btlm_is_priced_on_eight_h100s(btlm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said([btlm, f"out={tmp_path / 'none'}", *PRICED], capsys)
    hours = 1.21736865e22 / (0.4 * ACCELERATORS["h100-sxm"].bf16_flops) / 3600
    assert f"159,636 steps, {hours / 24 / 8:.1f} days, {hours:,.1f} GPU hours, {2.5 * hours:,.2f} USD" in lines
    assert "627,714,293,760 tokens" in lines
    assert "Adam's moments, fp32" in lines
    assert lines.endswith("dry run: nothing was written; leave out dry_run=true to start.\n")
    assert not (tmp_path / "none").exists()


def test_one_gpu_is_too_few_and_the_words_say_what_would_help(btlm: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused = said([btlm, *PRICED[:2]], capsys, code=2)
    assert refused.startswith("mutune.train: hardware=h100-sxm has 73.6 GB to fill and stage 2 needs ")
    enough = said([btlm, *PRICED[:2], "memory_gb=200"], capsys)
    assert enough.endswith("leave out dry_run=true to start.\n")


def test_the_micro_batch_that_is_named_fits_by_the_same_arithmetic(
    btlm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    full = [btlm, *PRICED[1:], "parallel.activation_checkpointing=full"]
    value, following = said([*full, "fit=true"], capsys).splitlines()[-2:]
    assert following.startswith("next       the same command with that, and dry_run=true in place of fit=true")
    assert value.startswith("set        parallel.micro_sequences=")
    numbers = json.loads(value.rpartition("=")[2])
    assert len(numbers) == 2
    priced = said([*full, "dry_run=true", value.split()[1]], capsys)
    assert all(f"stage {i}    {number} sequences at a time" in priced for i, number in enumerate(numbers, 1))
    assert priced.endswith("leave out dry_run=true to start.\n")
    for number in range(2):
        more = [(2 if i == number else 1) * each for i, each in enumerate(numbers)]
        refused = said([*full, "dry_run=true", f"parallel.micro_sequences={more}"], capsys, code=2)
        assert f" GB to fill and stage {number + 1} needs " in refused


def test_here_it_is_measured(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said([small, "fit=true", "device=cpu", f"out={tmp_path / 'none'}"], capsys).splitlines()
    assert lines[-3].startswith("stage 1    6 of 6 sequences at a time: ")
    assert lines[-2].startswith("stage 2    2 of 2 sequences at a time: ")
    assert all("GiB measured, " in line for line in lines[-3:-1])
    assert lines[-1] == "set        parallel.micro_sequences=6"
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["hardware=h100"], "hardware=h100 is unknown; known: h100-sxm, h100-pcie, "),
        (["gpus=8"], "gpus=8 is read with hardware= and dry_run=true or fit=true; for example hardware=h100-sxm dry"),
        (["gpus=8", "fit=true"], "gpus=8 is read with hardware="),
        ([*PRICED, "fit=true"], "neither writes anything, so give one of them, for example fit=true first."),
        (["gpus=0"], "gpus=0 must be a whole number at least 1"),
        (["memory_gb=80"], "memory_gb=80.0 is read with hardware="),
        (["mfu=40"], "mfu=40.0 must be a finite number above 0 and at most 1; for example mfu=0.4."),
        (["peak_flops=0"], "peak_flops=0.0 must be a finite number above 0"),
        (["gpu_hour=-1"], "gpu_hour=-1.0 must be a finite number above 0"),
        (["writers=[paper]"], "writers=['paper'] has an unknown one; known writers: tensorboard, wandb."),
        ([*PRICED, "gpus=512"], "gpus=512 is more than the 480 sequences of a step; for example gpus=480."),
        ([*PRICED, "parallel.replicas=3"], "parallel.replicas=3 does not divide gpus=8"),
        ([*PRICED, "parallel.micro_sequences=0"], "parallel.micro_sequences=0 must be a whole number at least 1"),
        (
            [*PRICED, "parallel.micro_sequences=[8,0]"],
            "parallel.micro_sequences=[8,0] must have whole numbers of at least 1; for example "
            "parallel.micro_sequences=[8,1].",
        ),
        (["parallel.micro_sequences=[8,all]"], "parallel.micro_sequences[1]=all must be a whole number; for example"),
        (["parallel.micro_sequences=many"], "parallel.micro_sequences=many must be a whole number; for example"),
        (
            ["dry_run=true", "parallel.micro_sequences=[8]"],
            "parallel.micro_sequences=[8] has 1 for a run's 2 stages; for example parallel.micro_sequences=[8,8], or",
        ),
        (
            [*PRICED[1:], "fit=true", "parallel.micro_sequences=[8,4,2]"],
            "for example parallel.micro_sequences=[8,4], or one number",
        ),
        (
            ["dry_run=true", "parallel.micro_sequences=[]"],
            "has 0 for a run's 2 stages; for example parallel.micro_sequences=[1,1], or",
        ),
    ],
)
def test_what_cannot_be_priced_is_refused(
    words: list[str], sentence: str, btlm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = said([btlm, f"out={tmp_path / 'none'}", *words], capsys, code=2)
    assert sentence in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "none").exists()
