"""What the commands share: prompts, output to the character, files that can be written, a warning of repetition."""

import io
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import redraft
from redraft.cli import conversation, doctor, generation, main
from redraft.cli.common import check_writable, plain_console, print_text, read_prompts
from redraft.cli.generation import text_of, warn_of_repetition


@pytest.mark.parametrize("text", ["x[a:cat:2] :100:", "[red]a[/red] [/b]", "1.5 'a' http://b", "y " * 90])
def test_a_text_is_printed_as_it_is(text, capsys):
    plain_console().print(text)
    print_text(plain_console(), text)
    assert capsys.readouterr().out == f"{text}\n" * 2


def test_off_a_terminal_tabs_and_control_characters_stay(capsys):
    print_text(plain_console(), "if x:\n\ty\x0c\r\n", end="")
    assert capsys.readouterr().out == "if x:\n\ty\x0c\r\n"


def piped(monkeypatch, raw):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))


def test_prompts_are_arguments_or_one_text_from_a_pipe(monkeypatch):
    assert read_prompts(("a", "b")) == ["a", "b"]
    assert read_prompts(("",)) == [""]  # asked for: a sample without a prompt
    for given in ((), ("-",)):
        piped(monkeypatch, "naïve\n".encode())
        assert read_prompts(given) == ["naïve\n"]


@pytest.mark.parametrize("given", [(), ("-",)])
@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "there is no prompt: standard input holds no text; got ''"),
        (b" \n", "there is no prompt: standard input holds no text"),
        (b"a\xff", r"standard input must be UTF-8; got b'\\xff'"),
        (b"\xc3(", r"standard input must be UTF-8; got b'\\xc3'"),
    ],
)
def test_a_pipe_without_text_is_refused(given, raw, message, monkeypatch):
    piped(monkeypatch, raw)
    with pytest.raises(ValueError, match=message):
        read_prompts(given)


def test_without_standard_input_there_is_no_prompt(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="there is no prompt"):
        read_prompts(())


@pytest.mark.parametrize("name", ["out.pdf", "out", "out.html.gz", "/dev/null"])
def test_a_page_of_another_format_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"its name must end in \.html or \.json"):
        check_writable(Path(name), ".html", ".json")
    assert list(tmp_path.iterdir()) == []


def test_the_check_leaves_no_file_and_takes_none_away(tmp_path):
    new, empty, full = tmp_path / "new.HTML", tmp_path / "empty.html", tmp_path / "full.json"
    empty.touch()
    full.write_text("{}")
    for path in (new, empty, full):
        check_writable(path, ".html", ".json")
    assert sorted(tmp_path.iterdir()) == [empty, full]
    assert full.read_text() == "{}"


def warning(lm, tokens, capsys, **settings):
    warn_of_repetition(lm, [torch.tensor(tokens)], lm.sampling_config(**settings))
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def test_a_token_that_makes_up_most_of_a_text_is_warned_of_with_what_to_try(text_lm, capsys):
    said = warning(text_lm, [35, *[66] * 9, *range(20, 27)], capsys)
    assert said.startswith(f"warning: 9 of 17 tokens are {text_of(text_lm, 66)!r}.")
    assert said.endswith("Try --preset llada-random --temperature 0.9, or longer training.\n")
    assert said.count("\n") == 1
    drawn = warning(text_lm, [66] * 9, capsys, preset="llada-random", temperature=0.9)
    assert drawn.endswith("repeat their likeliest token. Try longer training.\n")


@pytest.mark.parametrize(
    ("process", "advice"),
    [("uniform", "Try longer training."), ("autoregressive", "Try --temperature 0.9, or longer training.")],
)
def test_what_to_try_suits_the_process(text_lm, process, advice, capsys):
    settings = replace(text_lm.denoiser.settings, process=process)
    lm = replace(text_lm, denoiser=replace(text_lm.denoiser, settings=settings))
    assert warning(lm, [66] * 9, capsys).strip().endswith(advice)


@pytest.mark.parametrize("tokens", [[], [66] * 7, [66] * 8 + [67] * 8, list(range(20, 60))])
def test_a_text_of_different_tokens_and_a_short_one_are_not_warned_of(text_lm, tokens, capsys):
    assert warning(text_lm, tokens, capsys) == ""


def test_sample_infill_and_chat_warn_of_repetition(model_folder, monkeypatch, capsys):
    warned = []
    for module in (generation, conversation):
        warn = "warn_of_repetition"
        monkeypatch.setattr(module, warn, lambda lm, texts, sampling: warned.append((len(texts[0]), sampling)))
    flags = ["--steps=2", "--temperature=0.5", "--stop=None"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n/quit\n"))
    for command in (["sample", "a", "--max-new-tokens=16"], ["infill", "a[MASK:16]b"], ["chat", "--max-new-tokens=16"]):
        with pytest.raises(SystemExit):
            main([command[0], str(model_folder), *command[1:], *flags])
    capsys.readouterr()
    assert [(count, sampling.temperature) for count, sampling in warned] == [(16, 0.5)] * 3


def test_on_a_terminal_the_filled_parts_are_highlighted(model_folder, monkeypatch, capsys):
    terminal = Console(force_terminal=True, color_system="standard", highlight=False, width=200)
    monkeypatch.setattr(generation, "plain_console", lambda: terminal)
    with pytest.raises(SystemExit):
        main(["infill", str(model_folder), "a[MASK:1]b"])
    assert re.search(r"a\x1b\[1;32m.+\x1b\[0mb", capsys.readouterr().out, re.DOTALL)


def test_a_constraint_that_repeats_is_not_warned_of(model_folder, capsys):
    with pytest.raises(SystemExit):
        main(["sample", str(model_folder), "a", "--regex", "x{16}", "--max-new-tokens", "17"])
    printed = capsys.readouterr()
    assert printed.out.startswith("a" + 16 * "x")
    assert printed.err == ""


@pytest.fixture
def _runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/tiny", "runs/mine"):
        Path(name).mkdir(parents=True)


@pytest.mark.usefixtures("_runs")
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("runs/nope", r"no model at runs/nope: the folder does not exist, .*\. runs holds mine, tiny\.$"),
        ("runs/tin", r"no model at runs/tin: the folder does not exist, .*\. Did you mean runs/tiny\?$"),
        ("./runs/tin", r"no model at ./runs/tin: the folder does not exist\. Did you mean runs/tiny\?$"),
        ("no/such-model", "cannot read a model config from no/such-model: .*offline"),
        ("run", r"cannot read a model config from run: .*Did you mean runs\?$"),
    ],
)
def test_a_folder_that_does_not_exist_is_said_to_with_the_names_beside_it(path, message):
    with pytest.raises(ValueError, match=message) as error:
        redraft.load(path)
    assert ("hub" in str(error.value).replace("the hub gave none", "")) == (path in ("no/such-model", "run"))


def test_doctor_reports_that_it_is_offline(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    assert "offline: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set" in printed
    assert "a tiny model runs" in printed


def test_every_extra_that_a_message_names_exists():
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    offered = project["optional-dependencies"]
    for extra, modules in redraft.cli.EXTRAS.items():
        for module in modules:
            assert any(line.replace("-", "_").startswith(module) for line in offered[extra]), (module, extra)


def test_convert_names_the_command_that_its_model_is_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained("source")

    def next_step(*arguments):
        with pytest.raises(SystemExit) as exit_:
            main(["convert", *arguments])
        assert exit_.value.code == 0
        return capsys.readouterr().out.splitlines()[-1].strip()

    new = "redraft train stdlib-small --model.start 'a b' --data.source my_texts/ --out 'a b'-trained"
    assert next_step("source", "a b") == new
    assert next_step("a b", "again") == "redraft sample again 'Once upon a time'"
    assert next_step("source", "ar", "--autoregressive") == "redraft sample ar 'Once upon a time'"
