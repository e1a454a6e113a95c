"""From end to end: a run with exits tells of each, and its model generates through them."""

import json

from jaxpar.cli import main

TEXT = "def f(x):\n    return x + 1  # a line of text\n"


def test_a_run_with_exits_and_generation_through_them(tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"# {number}\n" + TEXT * 20)
    train = (
        f"train tiny --folder {tmp_path}/run --source {tmp_path}/texts --validation-fraction 0.3 --data.cache-dir {tmp_path}/cache --layers 3 --width 32 "
        "--heads 4 --steps 4 --mesh data=8 --progress off --evaluate-batches 1 --evaluate-every 4 --sample.tokens 0 --no-baseline "
        "--exits.at 1 2 --exits.head own-norm --exits.loss ee-llm --weight 0.5 --course warm_up --over 4 "
        "--skipping layer-skip-dropout --rate 0.2"
    )
    assert main(train.split()) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "exits/1" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for done, line in enumerate(steps):
        rising = 0.5 * done / 4
        expected = rising * (line["exits/1"] + line["exits/2"]) + line["exits/3"]
        assert abs(line["loss"] - expected) < 1e-4 * expected
    # Evaluation is of the last layer alone.
    held_out = next(line["held_out/loss"] for line in lines if "held_out/loss" in line)
    assert held_out < steps[-1]["loss"]
    capsys.readouterr()

    def generated(*more):
        words = ["generate", "--model", f"{tmp_path}/run", "--tokens", "12", "--prompt", "def f", "    ret", *more]
        assert main(words) in (0, None)
        return capsys.readouterr()

    drafted = generated("--decoding", "speculate", "--draft", "3")
    assert "drafts of 3 tokens behind layer 1 of 3" in drafted.err
    assert "tokens for each call of the whole model" in drafted.err
    whole = generated("--decoding", "exit-early", "--threshold.value", "1.0")
    assert whole.out == drafted.out
    assert "0 % of the tokens left behind layer 1" in whole.err
    assert "3.00 of 3 layers a token" in whole.err
