"""The refusal contract: one sentence on stderr, exit code 2, nothing written."""

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import doors


def refuse(door: str, arguments: list[str], out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command in this process; it must refuse, and leave nothing. Returns its sentence."""
    main: Callable[[list[str]], int] = importlib.import_module(f"mutune.{door}").main
    assert main([*arguments, f"out={out}"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"mutune.{door}: ")
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    assert not out.exists()
    return captured.err


WORDS = [
    (
        "train",
        ["--dry-run"],
        "--dry-run is no key=value, which all settings are, without dashes; for example dry_run=",
    ),
    (
        "train",
        ["--transfer", "a.yaml"],
        "without dashes; for example transfer=a.yaml.",
    ),
    ("train", ["-m"], "-m is no key=value, which all settings are, without dashes; for example dry_run=true."),
    ("train", ["--overwrite"], "for example overwrite=true."),
    ("train", ["data=text"], "data is decided elsewhere; for example python -m mutune.transfer target.data=text."),
    ("sweep", ["--seed=3"], "--seed=3 is no key=value, which all settings are, without dashes; for example seed=3."),
    (
        "train",
        ["target.loop.dtype=float32"],
        "target.loop.dtype is decided elsewhere; for example python -m mutune.transfer target.loop.dtype=float32.",
    ),
    ("train", ["transfer={folder}"], "the transfer file {folder} is a folder; for example {folder}/transfer.yaml."),
]


@pytest.mark.parametrize(("door", "words", "sentence"), WORDS)
def test_words_that_belong_elsewhere_are_told_where(
    door: str, words: list[str], sentence: str, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "transfer.yaml").write_text("{}")
    said = refuse(door, [word.format(folder=folder) for word in words], out, capsys)
    assert sentence.format(folder=folder) in said


HORIZON = ["+sweep=smoke", "parametrization.decay=horizon", "hyperparameters.decay_timescale=0.1"]
SWEEP = [
    (["+sweep=smoke", "model.widht=3"], "unknown key model.widht; did you mean model.width?"),
    (["+sweep=smoke", "+model.widht=3"], "unknown key model.widht; did you mean model.width?"),
    (["+sweep=smoke", "+foo=3"], "unknown key foo;"),
    (["+sweep=smoke", "search.pruner=[a]"], "search.pruner=['a'] must be a word; for example search.pruner=null."),
    (["+sweep=smoke", "model.width=abc"], "model.width=abc must be a whole number; for example model.width=32."),
    (["+sweep=smoke", "model.width=1.5"], "model.width=1.5 must be a whole number"),
    (["+sweep=smoke", "dry_run=maybe"], "dry_run=maybe must be true or false"),
    (["+sweep=smoke", "model=3"], "model=3 must be a group of keys"),
    (["+sweep=smoke", "model.head_size=24"], "the nearest that do are model.head_size="),
    (["+sweep=proxy", "model.num_heads=7"], "the nearest that do are model.num_heads=4 and model.num_heads=8"),
    (
        ["+sweep=smoke", "hyperparameters.learning_rate=-1"],
        "hyperparameters.learning_rate=-1.0 must be a finite number",
    ),
    (
        ["+sweep=smoke", "hyperparameters.learning_rate=nan"],
        "hyperparameters.learning_rate=nan must be a finite number",
    ),
    (
        ["+sweep=smoke", "search.space.learning_rate.low=-0.1"],
        "search.space.learning_rate.low=-0.1 must be a finite number above 0",
    ),
    (["+sweep=smoke", "search.space.learning_rate.low=1"], "search.space.learning_rate is empty"),
    (["+sweep=smoke", "search.n_trials=0"], "search.n_trials=0 must be"),
    (["+sweep=smoke", "search.n_trials=null"], "search.n_trials=null is for search.sampler=grid only"),
    (
        ["+sweep=proxy", "search.space.learning_rate.low=0.02"],
        "search.initial[0].learning_rate=0.015625 lies outside search.space.learning_rate (0.02 … 0.125)",
    ),
    (["+sweep=smoke", "search.initial=[{learning_rate: foo}]"], "search.initial[0].learning_rate=foo must be a number"),
    (["+sweep=valley", "search.n_trials=9"], "search.n_trials=9 is not read by search.sampler=grid"),
    (["+sweep=smoke", "run.num_steps=0"], "run.num_steps=0 must be"),
    (["+sweep=smoke", "schedule.warmup_steps=60"], "schedule.warmup_steps=60 must be shorter"),
    (["+sweep=smoke", "schedule=spiral"], "unknown schedule 'spiral'; known: constant, cosine, linear, wsd."),
    (["+sweep=nope"], "unknown sweep 'nope'; known: btlm_proxy, proxy, refine, schedule, smoke, valley."),
    (["sweep=smoke"], "write +sweep=..."),
    ([], "no sweep was chosen; write for example +sweep=proxy"),
    (["+sweep=smoke", "study=../x"], "study=../x must be a plain folder name"),
    (["+sweep=smoke", "study=published"], "study=published is the name of BTLM-3B-8K's own values"),
    (["+sweep=smoke", f"study={'x' * 101}"], "must be a plain folder name of at most 100 bytes"),
    (
        ["+sweep=smoke", "parametrization=mupp"],
        "unknown parametrization 'mupp'; known: btlm, completep, mup,",
    ),
    (
        ["+sweep=smoke", "parametrization.table=mupp"],
        "parametrization.table=mupp is unknown; known tables: btlm, completep, mup,",
    ),
    (
        ["+sweep=smoke", "parametrization.table=mup_table3"],
        "wte.weight is both; untie them (model.tied=false) or take parametrization.table=mup.",
    ),
    (["+sweep=valley", "search.space.table.values=[mup,mup_table3]"], "untie them (model.tied=false) or take"),
    (
        ["+sweep=smoke", "parametrization.depth_exponent=0.5"],
        "parametrization.depth_exponent=0.5 belongs to parametrization.table=completep; leave it out with",
    ),
    (
        ["+sweep=smoke", "parametrization.table=completep", "parametrization.depth_exponent=0.4"],
        "parametrization.depth_exponent=0.4 must be a finite number at least 0.5 and at most 1;",
    ),
    (["+sweep=smoke", "parametrization.decay=slow"], "known decays: table, fixed, scaled, independent, horizon."),
    (
        ["+sweep=smoke", "parametrization.decay_exponent=0.5"],
        "parametrization.decay_exponent=0.5 belongs to parametrization.decay=scaled; set parametrization.decay=scaled",
    ),
    (
        ["+sweep=smoke", "parametrization.decay=horizon"],
        "parametrization.decay=horizon needs hyperparameters.decay_timescale",
    ),
    (
        ["+sweep=smoke", "hyperparameters.decay_timescale=0.1"],
        "hyperparameters.decay_timescale=0.1 is read by parametrization.decay=horizon alone, and decay is table;",
    ),
    (
        [*HORIZON, "hyperparameters.weight_decay=0.2"],
        "hyperparameters.weight_decay=0.2 is not read by parametrization.decay=horizon",
    ),
    (
        [*HORIZON, "+search.space.weight_decay={low: 0.01, high: 0.3}"],
        "search.space.weight_decay is not read by parametrization.decay=horizon, which has decay_timescale in",
    ),
    (
        ["+sweep=smoke", "+search.space.decay_timescale={low: 0.01, high: 0.3}"],
        "search.space.decay_timescale is not read by parametrization.decay=table, which has weight_decay in",
    ),
    (["+sweep=smoke", "device=tpu"], "device=tpu is unknown; known devices: auto, cpu, cuda."),
    (["+sweep=smoke", "seed=-1"], "seed=-1 must be"),
    (["+sweep=smoke", "data=text"], "data=text needs data.path=..."),
    (["+sweep=smoke", "data=text", "data.path=no/such.txt"], "no/such.txt"),
    (["+sweep=smoke", "tokenizer.vocab_size=3"], "tokenizer.vocab_size=3 must be"),
    (["+sweep=valley", "search.space.width.values=[24]"], "does not divide model.width=24"),
    (["+sweep=valley", "search.space.table.values=[mup,mop]"], "parametrization.table=mop is unknown"),
    (["+sweep=smoke", "run.context_length=999999999"], "999999999"),
    (
        ["+sweep=smoke", "search.space.learning_rate={values: [0.01, 0.02]}"],
        "search.space.learning_rate.values is not there yet, so it is added: write +search.space.learning_rate.values=",
    ),
    (["+sweep=smoke", "search.space={width: {values: [16]}}"], "search.space.width is not there yet, so it is added"),
    (["+sweep=smoke", "model={x: 1}"], "unknown key model.x;"),
    (["+sweep=smoke", "device=[a]"], "device=['a'] must be a word; for example device=auto."),
    (["+sweep=smoke", "parametrization.table=[a]"], "must be a word; for example parametrization.table=mup."),
    (
        ["+sweep=[smoke,proxy]"],
        "unknown sweep '[smoke,proxy]'; known: btlm_proxy, proxy, refine, schedule, smoke, valley.",
    ),
    (
        ["+sweep=smoke", f"model.width={'9' * 400}"],
        "model.width=a number of more than 100 digits must be a whole number",
    ),
    (["+sweep=smoke", f"model.width={'9' * 5000}"], "the command line cannot be read"),
    (
        ["+sweep=smoke", f"hyperparameters.learning_rate={'9' * 400}"],
        "a number of more than 100 digits must be a number",
    ),
    (["+sweep=smoke", f"search.space.learning_rate.low={'9' * 400}"], "low=a number of more than 100 digits must be"),
    (["+sweep=smoke", "seed=2147483648"], "seed=2147483648 must be a whole number at least 0 and at most 2147483647;"),
    (["+sweep=smoke", "hyperparameters.beta1=1.0"], "beta1=1.0 must be a finite number at least 0 and below 1;"),
    (["+sweep=smoke", "model.width=1000001"], "the nearest that do are model.head_size=1 and"),
    (["+sweep=smoke", "workers=2", "model.width=1000000"], "2 runs at once need about"),
    (["+sweep=smoke", "workers=1", "run.batch_sequences=1000000000000"], "and this run needs about"),
    (["seed=["], "the command line cannot be read"),
    (["seed"], "the command line cannot be read"),
]


@pytest.mark.parametrize(("arguments", "sentence"), SWEEP, ids=[" ".join(a)[:60] or "nothing" for a, _ in SWEEP])
def test_the_sweep_refuses(arguments: list[str], sentence: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence in refuse("sweep", arguments, out, capsys)


TRANSFER = [
    ([], "study=proxy does not exist in"),
    (["study=../sweeps/smoke"], "study=../sweeps/smoke must be a plain folder name"),
    (["study=published", "target.name=../x"], "target.name=../x must be a plain folder name"),
    (["study=published", 'target.name="a\\nb"'], "must be a plain folder name"),
    (["study=published", "target.data={source: text, path: no.txt}"], "no.txt does not exist"),
    (
        ["study=published", "target=small", "target.stages=[{context_length: 100000000}]"],
        "target.stages[0].context_length=100000000 does not fit into the",
    ),
    (["+sweep=proxy"], "unknown key sweep;"),
    (["study=nope"], "run python -m mutune.sweep +sweep=proxy first"),
    (["study=published", "target=nope"], "unknown target 'nope'; known: btlm_3b, btlm_3b_clean, small."),
    (["study=published", "target.stages=[]"], "target.stages=[] is empty"),
    (["study=published", "target.model.num_heads=7"], "the nearest that do are target.model.num_heads=5 and"),
    (["study=published", "target.stages=[{num_step: 3}]"], "unknown key target.stages[0].num_step; did you mean"),
    (["study=published", "hyperparameters.learning_rate=0"], "hyperparameters.learning_rate=0.0 must be"),
    (["study=published", "hyperparameters.lr=0.1"], "unknown key hyperparameters.lr"),
    (["study=published", "ladder.offsets=[0,1]"], "ladder.offsets=[0.0, 1.0] must hold at least three"),
    (["study=published", "ladder.offsets=[1,2,3]"], "ladder.offsets=[1.0, 2.0, 3.0] must lie on both sides of 0"),
    (["study=published", "ladder.offsets=[-1,0,1e-5,1]"], "at least 0.01 octaves apart"),
    (["study=published", "ladder.widths=[64,64]"], "repeats a rung"),
    (
        ["study=published", "target=small", "target.schedule={kind: linear, warmup_steps: 480}"],
        "transfer: target.schedule.warmup_steps=480 must be shorter than the run of 480 steps; for example "
        "target.schedule.warmup_steps=24.\n",
    ),
    (
        ["study=published", "target=small", "target.schedule.kind=wsd", "target.schedule.decay_steps=480"],
        "transfer: target.schedule.decay_steps=480 leaves no room for the warm-up of 24 of 480 steps; for example "
        "target.schedule.decay_steps=228.\n",
    ),
    (
        ["study=published", "target=small", "target.stages=[{num_steps: 40}]"],
        "transfer: the study's schedule.warmup_steps=95 must be shorter than the run of 40 steps; for example "
        "target.schedule.kind=linear target.schedule.warmup_steps=2.\n",
    ),
    (
        ["study=published", "target=small", "target.model.positions=learned", "target.model.max_positions=5"],
        "transfer: target.model.max_positions=5 is shorter than the context of 512; for example "
        "target.model.max_positions=512.\n",
    ),
    (
        ["study=published", "target=small", "target.schedule.decay_steps=20"],
        "transfer: target.schedule.decay_steps=20 is for target.schedule.kind=wsd, and this is linear; for example "
        "target.schedule.kind=wsd.\n",
    ),
    (["study=published", "target=small", "target.schedule.kidn=wsd"], "did you mean target.schedule.kind?"),
]


@pytest.mark.parametrize(("arguments", "sentence"), TRANSFER, ids=[" ".join(a)[:60] or "nothing" for a, _ in TRANSFER])
def test_the_transfer_refuses(
    arguments: list[str], sentence: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refuse("transfer", arguments, out, capsys)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "transfer= is missing"),
        (["transfer=no/such.yaml"], "the transfer file no/such.yaml cannot be read"),
        (["transfer=LICENSE", "threads=0"], "threads=0 must be"),
        (
            ["transfer=LICENSE", "threads=3000000000"],
            "threads=3000000000 must be a whole number at least 1 and at most 1024",
        ),
        (["transfer=LICENSE", "name=.x"], "name=.x must be a plain folder name"),
    ],
)
def test_train_refuses(arguments: list[str], sentence: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence in refuse("train", arguments, out, capsys)


@pytest.mark.parametrize(
    ("words", "schedule"),
    [
        (
            ["target=small", "target.schedule.kind=cosine"],
            "schedule   cosine decay from warm-up to end, warm-up 24 steps;",
        ),
        (
            ["target=small", "target.schedule.kind=wsd", "target.schedule.warmup_steps=7"],
            "schedule   wsd, decay over the last 96 steps, warm-up 7 steps;",
        ),
        (
            ["target=btlm_3b", "target.schedule.kind=cosine"],
            "schedule   cosine decay from warm-up to end, warm-up 95 steps;",
        ),
        (
            ["target=small", "+target.schedule.kind=cosine"],
            "schedule   cosine decay from warm-up to end, warm-up 24 steps;",
        ),
        (
            ["target=small", "target.stages=[{num_steps: 40}]", "target.schedule.warmup_steps=2"],
            "schedule   linear decay from warm-up to end, warm-up 2 steps;",
        ),
    ],
)
def test_a_part_of_a_target_that_it_may_lack_is_given_key_by_key(
    words: list[str], schedule: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mutune.transfer import main

    assert main(["study=published", f"out={out}", "dry_run=true", *words]) == 0
    assert schedule in capsys.readouterr().out


NONSENSE = [
    ("{", "is not valid YAML"),
    ("", "holds no keys"),
    ("- 1\n- 2\n", "holds no keys"),
    ("verdict: GO\n", "is missing"),
    ("{hello: 1}\n", "unknown key hello"),
]


@pytest.mark.parametrize(("text", "sentence"), NONSENSE)
def test_a_transfer_file_of_nonsense_is_refused(
    text: str, sentence: str, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "transfer.yaml"
    path.write_text(text)
    assert sentence in refuse("train", [f"transfer={path}"], out, capsys)


EDITS: list[tuple[list[str], object, str]] = [
    (["target", "model", "width"], "wide", "target.model.width=wide must be a whole number"),
    (["target", "model", "num_heads"], 7, "does not divide target.model.width=2560"),
    (["hyperparameters", "learning_rate"], -0.1, "hyperparameters.learning_rate=-0.1 must be"),
    (["hyperparameters", "lr"], 0.1, "unknown key hyperparameters.lr"),
    (["parametrization", "table"], "mop", "parametrization.table=mop is unknown"),
    (["verdict"], "GO", "seal="),
    (["hyperparameters", "learning_rate"], 0.006, "make it again with python -m mutune.transfer"),
    (["seal"], "", "seal=none is not that of the transfer file's other keys"),
    (["verdict"], "FINE", "verdict=FINE is unknown; known verdicts: GO, GO WITH CARE, NO-GO, NOT CERTIFIED."),
    (["target", "stages"], [], "stages=[] is empty"),
    (["target", "stages"], 3, "target.stages=3 must be a list"),
    (["base", "width"], 0, "base.width=0.0 must be"),
    (["format"], 9, "format=9 of the transfer file is unknown"),
    (["schedule", "kind"], "spiral", "schedule.kind=spiral is unknown"),
]


@pytest.mark.parametrize(("keys", "value", "sentence"), EDITS, ids=[".".join(keys) for keys, _, _ in EDITS])
def test_an_edited_transfer_file_is_refused(
    keys: list[str], value: object, sentence: str, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mutune.transfer import main

    assert main(["study=published", f"out={tmp_path / 'made'}"]) == 0
    path = tmp_path / "made/transfer/published--btlm_3b/transfer.yaml"
    doors.edit_yaml(path, *keys, value=value)
    capsys.readouterr()
    assert sentence in refuse("train", [f"transfer={path}", "dry_run=true"], out, capsys)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.txt", b"", "empty"),
        ("binary.txt", b"\x00\x01\xff" * 9999, "binary.txt"),
        ("broken.jsonl", b'{"text": "a"}\n{"text"\n', "line 2"),
        ("wrong.csv", b"a,b\n", "wrong.csv"),
        (
            "mute.jsonl",
            b'{"text": ""}\n' * 10_000 + b'{"text": "some"}\n',
            "held-out documents of mute.jsonl hold no text",
        ),
        (
            "tiny.txt",
            b"a few words in a line\n\n" * 20,
            "run.context_length=64 does not fit into the 24 held-out tokens of tiny.txt; for example run.context_le",
        ),
    ],
)
def test_a_corpus_that_cannot_be_used_is_refused(
    name: str, content: bytes, sentence: str, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    arguments = ["+sweep=smoke", "data=text", f"data.path={tmp_path / name}", "tokenizer=bytes"]
    assert sentence in refuse("sweep", arguments, out, capsys)


@pytest.mark.parametrize("where", ["file", "unwritable"])
def test_an_output_folder_that_cannot_be_written_is_refused(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mutune.sweep import main

    (tmp_path / "file").write_text("not a folder")
    place = tmp_path / "file" if where == "file" else Path("/proc/runs")
    assert main(["+sweep=smoke", f"out={place}"]) == 2
    assert f"out={place} cannot be used" in capsys.readouterr().err


def test_a_refusal_is_the_same_in_a_process_of_its_own(tmp_path: Path) -> None:
    result = doors.run("sweep", "+sweep=smoke", "+model.widht=3", cwd=tmp_path, expect=2)
    assert result.stderr == "mutune.sweep: unknown key model.widht; did you mean model.width?\n"
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_another_file_among_the_sweeps_of_the_working_folder_is_no_concern(tmp_path: Path) -> None:
    (tmp_path / "sweeps" / "folder.yaml").mkdir(parents=True)
    (tmp_path / "sweeps" / "list.yaml").write_text("- 1\n")
    (tmp_path / "sweeps" / "torn.yaml").write_text("{")
    mine = doors.ROOT / "sweeps" / "smoke.yaml"
    (tmp_path / "sweeps" / "mine.yaml").write_text(mine.read_text())
    doors.run("sweep", "+sweep=mine", "dry_run=true", cwd=tmp_path)
    for name, sentence in (("list", "list.yaml holds no keys"), ("torn", "torn.yaml is not valid YAML")):
        assert sentence in doors.run("sweep", f"+sweep={name}", cwd=tmp_path, expect=2).stderr


def test_a_dry_run_writes_nothing(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mutune.sweep import main

    assert main(["+sweep=proxy", f"out={out}", "dry_run=true"]) == 0
    printed = capsys.readouterr().out
    assert "48 trials by tpe" in printed
    assert "240 steps × 512 tokens = 122,880 tokens" in printed
    assert not out.exists()
